"""Input that cannot work is refused with its key, and as early as it can be known."""

import errno
from dataclasses import replace

import pytest
import torch
from entry_point import call_entry
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tiny import image_case, linear_case, linear_classes

from lab.cli.errors import report_error
from lab.core.errors import UserError, explain
from lab.core.sources import ROOT
from lab.runner.assemble import _build, assemble, check_cases


def parts(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return assemble(compose("config", overrides=["experiment=house_price", *overrides]))


# ── what a user types


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["immunize.epochs=1.5"], "immunize.epochs"),
        (["scenario.test_share=abc"], "scenario.test_share"),
        (["attacks.linear_probe.standardize=1"], "attacks.linear_probe.standardize"),
        (["eval.conditioning.groups=0"], "eval.conditioning.groups"),
        (["backbone.init=5"], "backbone.init"),
        (["immunize.name=step"], "immunize.name"),
        (["immunize.name=none"], "immunize.name"),
        (["eval.conditioning.name=norms"], "eval.conditioning.name"),
        (["+budget.horizn=1"], "budget.horizn"),
        (["budget.horizon=true"], "budget.horizon"),
        (["~budget.horizon"], "budget.horizon"),
        (["budget=5"], "budget"),
        (["seeds=1.5"], "seeds"),
        (["seeds=[0,0]"], "seeds"),
    ],
)
def test_values_that_cannot_work_are_refused_when_the_run_is_put_together(arguments, key):
    with pytest.raises(UserError) as error:
        parts(*arguments)
    assert error.value.key == key


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def call(*arguments, first=()):
        fixed = ["experiment=house_price", "tracker=none", "dry_run=true"]
        code, _, err = call_entry(monkeypatch, capfd, *first, *fixed, *arguments)
        return code, err

    return call


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("immunize=kapa", "immunize=kapa: there is no such choice; did you mean kappa"),
        ("attacks=[linear_prob]", "attacks=linear_prob: there is no such choice"),
        ("immunize.lambda_pp=1", "immunize.lambda_pp: there is no such key; did you mean immunize"),
        ("sedes=[1]", "sedes: there is no such key; did you mean seeds"),
        ("immunize.name.x=1", "immunize.name"),
        ("immunize.epochs=1.5", "immunize.epochs=1.5"),
        ("immunize=[kappa,none]", "immunize=[kappa,none]: takes one choice"),
        ("action=raport", "action=raport: did you mean report"),
        ("force=evel", "force=evel: did you mean eval"),
        ("name=../elsewhere", "name=../elsewhere: names a folder"),
        ("dry_run=yess", "dry_run=yess: must be true or false"),
        ("scenario.path=/data/Müller", "inside of quotes, e.g. 'scenario.path=\"VALUE\"'"),
        ("action=leaderboard", "dry_run=True: plans action=run | search | audit only"),
        ("paths.outputs=" + "x" * 300, "File name too long; paths.outputs=DIR"),
    ],
)
def test_the_command_says_so_in_one_line_and_exits_with_2(cli, argument, message):
    code, err = cli(argument)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err


OWN = ROOT / "docs" / "examples" / "own_methods"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["immunize=partial_whitening", "immunize.pwoer=0.3"], "did you mean immunize.power"),
        (["immunize=partial_whitenin"], "did you mean partial_whitening"),
    ],
)
def test_hints_know_the_configs_of_ones_own(cli, arguments, hint):
    code, err = cli(*arguments, first=("--config-dir", str(OWN / "conf")))
    assert code == 2
    assert hint in err


# ── errors of the machine, of packages and of launchers


class TerminatedWorkerError(Exception):
    __module__ = "joblib.externals.loky.process_executor"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "", "/there"), 2, "/there: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "", "lab/world.bin"), 1, "FileNotFoundError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "batch_size"),
        (RuntimeError("shape mismatch"), 1, "RuntimeError: shape mismatch"),
        (ModuleNotFoundError("gone", name="open_clip.x"), 2, 'pip install "open_clip_torch"'),
        (ModuleNotFoundError("gone", name="optuna"), 2, '"immunization-bench[search]"'),
        (ModuleNotFoundError("gone", name="lab.gone"), 1, "ModuleNotFoundError"),
        (ValueError("Could not find plugin hydra_plugins.x"), 2, "immunization-bench[slurm]"),
        (TerminatedWorkerError("killed"), 2, "the same command continues"),
    ],
)
def test_what_a_user_can_mend_is_told_in_one_line_and_a_defect_with_its_traceback(
    error, code, words, capsys
):
    assert report_error(error) == code
    err = capsys.readouterr().err
    assert words in err
    assert (err.count("\n") == 1) == (code == 2)


def test_a_package_that_a_part_needs_or_a_module_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "mine_needs.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="a_package_that_nobody_has"):
        _build(OmegaConf.create({"_target_": "mine_needs.Thing"}), "immunize")
    with pytest.raises(UserError, match="PYTHONPATH"):
        _build(OmegaConf.create({"_target_": "mine_gone.Thing"}), "immunize")
    assert explain(UserError("a", 1, "no.")) == "a=1: no."


# ── parts that do not fit the data


def test_a_logistic_probe_on_a_regression_is_refused_before_anything_runs():
    chosen = parts("attacks=[linear_probe,probe_logistic]", "eval=[conditioning]")
    with pytest.raises(UserError, match=r"attacks\.probe_logistic\.loss=cross_entropy"):
        check_cases(chosen, (linear_case(),))
    check_cases(chosen, (linear_classes(),))


def test_a_deep_attacker_checks_its_loss_too():
    chosen = parts(
        "attacks=[extractor_full_finetune]",
        "attacks.extractor_full_finetune.loss=cross_entropy",
        "eval=[conditioning]",
    )
    with pytest.raises(UserError, match=r"attacks\.extractor_full_finetune\.loss=cross_entropy"):
        check_cases(chosen, (linear_case(),))
    check_cases(chosen, (image_case(),))


def test_an_attack_that_the_model_cannot_take_is_refused_before_anything_runs(cli):
    words = ["experiment=relearn", "attacks=[lora,full_finetune]", "backbone.dtype=bf16"]
    code, err = cli(*words)
    assert code == 2
    assert "backbone.dtype=torch.bfloat16" in err


def test_accuracies_need_classification_and_transfer_needs_eight_cases():
    chosen = parts("eval=[probe_accuracy]")
    with pytest.raises(UserError, match="eval=probe_accuracy"):
        check_cases(chosen, (linear_case(),))
    check_cases(chosen, (linear_classes(),))
    chosen = parts("eval=[transfer]")
    many = tuple(replace(linear_case(), name=f"case{i}") for i in range(8))
    check_cases(chosen, many)
    with pytest.raises(UserError, match="eval=transfer"):
        check_cases(chosen, many[:7] + many[:1])


def test_metrics_that_the_run_leaves_out_are_not_checked():
    check_cases(parts("eval=[transfer]", "immunize=none"), (linear_case(),))
    check_cases(parts("eval=[probe_accuracy]", "attacks=none"), (linear_case(),))


# ── parts of somebody else's


def test_an_attacker_that_misses_a_part_of_the_contract_is_told_which(monkeypatch):
    class Half:
        name = "linear_probe"

        def __call__(self, model, task, **kwargs):
            raise NotImplementedError

    import lab.runner.assemble as module

    built = module._build
    swapped = lambda config, key, *more: (  # noqa: E731
        replace(built(config, key, *more), obj=Half())
        if key == "attacks.linear_probe"
        else built(config, key, *more)
    )
    monkeypatch.setattr(module, "_build", swapped)
    with pytest.raises(
        UserError,
        match=r"attacks\.linear_probe=Half: must be a subclass of lab.core.types.Attacker",
    ):
        parts()


def test_options_of_an_attacker_without_its_name_are_told():
    with pytest.raises(UserError, match=r"attacks\._target_=.*stands without a name"):
        parts("+attacks._target_=attacks.probes.linear_probe.LinearProbe")
