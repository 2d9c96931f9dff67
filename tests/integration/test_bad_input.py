"""Input that cannot work is refused with key, value and fix, and as early as it can be known."""

import errno
import os
import re
from dataclasses import replace

import pytest
import torch
from entry_point import call_entry
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tiny import image_case, linear_case, linear_classes

from lab.core import options
from lab.core.errors import UserError
from lab.core.sources import ROOT
from lab.runner import failures
from lab.runner.assemble import _build, assemble, check_cases
from lab.runner.failures import explain


def parts(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return assemble(compose("config", overrides=["experiment=house_price", *overrides]))


# ── the shared checks


@pytest.mark.parametrize(
    "value", ["abc", "1", True, None, [1], float("nan"), float("inf"), -1, 0, 2.5]
)
def test_number_takes_finite_numbers_in_the_range_only(value):
    with pytest.raises(UserError, match=r"k=.*: must be a number > 0 and ≤ 2\."):
        options.number("k", value, above=0, high=2)
    assert options.number("k", 2, above=0, high=2) == 2.0
    assert isinstance(options.number("k", 2), float)


@pytest.mark.parametrize("value", ["3", 3.0, True, None, 1, 9])
def test_count_takes_whole_numbers_in_the_range_only(value):
    with pytest.raises(UserError, match=r"k=.*: must be a whole number from 2 to 8\."):
        options.count("k", value, 2, 8)
    assert options.count("k", 8, 2, 8) == 8


def test_choice_flag_and_names():
    assert options.choice("k", "adam", ("adam", "sgd")) == "adam"
    with pytest.raises(UserError, match="did you mean adam"):
        options.choice("k", "adm", ("adam", "sgd"))
    for value in (0, 1, "true", None):
        with pytest.raises(UserError, match="true or false"):
            options.flag("k", value)
    assert options.names("k", "a") == ("a",)
    assert options.names("k", ["a", 2010]) == ("a", "2010")
    for value in (None, True, [None], {"a": 1}):
        with pytest.raises(UserError, match="list of names"):
            options.names("k", value)


# ── what a user types


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["immunize.epochs=1.5"], "immunize.epochs=1.5: must be a whole number ≥ 1"),
        (["immunize.batch_size=2.5"], "immunize.batch_size=2.5: must be a whole number ≥ 2"),
        (["immunize.lambda_h=abc"], "immunize.lambda_h=abc: must be a number ≥ 0"),
        (["immunize.preconditioned=3"], "immunize.preconditioned=3: must be true or false"),
        (
            ["immunize=kappa_imma", "immunize.w_prior=abc"],
            "immunize.w_prior=abc: must be a number ≥ 0",
        ),
        (["scenario.test_share=abc"], "scenario.test_share=abc: must be a number > 0 and < 1"),
        (
            ["attacks=[probe_sgd]", "attacks.probe_sgd.lr=abc"],
            "attacks.probe_sgd.lr=abc: must be auto or a number",
        ),
        (
            ["attacks=[probe_sgd]", "attacks.probe_sgd.lr_trials=1.5"],
            "attacks.probe_sgd.lr_trials=1.5",
        ),
        (
            ["attacks.linear_probe.standardize=1"],
            "attacks.linear_probe.standardize=1: must be true or false",
        ),
        (["eval.conditioning.groups=0"], "eval.conditioning.groups=0: "),
        (["eval.conditioning.size=1"], "eval.conditioning.size=1: "),
        (
            ["eval=[conditioning_ridge]", "eval.conditioning_ridge.ridge=inf"],
            "eval.conditioning_ridge.ridge=inf: ",
        ),
        (
            ["eval=[conditioning_ridge]", "eval.conditioning_ridge.ridge=0"],
            "eval.conditioning_ridge.ridge=0.0: ",
        ),
        (["eval.geometry.energy=abc"], "eval.geometry.energy=abc: "),
        (["eval.geometry.dim=2.5"], "eval.geometry.dim=2.5: "),
        (
            ["eval.convergence.rfd_smallest=null"],
            "eval.convergence.rfd_smallest=None: ",
        ),
        (
            ["eval=[transfer]", "eval.transfer.draws=many"],
            "eval.transfer.draws=many: ",
        ),
        (["eval.verdict.min_slowdown=x"], "eval.verdict.min_slowdown=x: "),
        (["immunize.name=step"], "immunize.name=step: is a word of every curve"),
        (["immunize.name=none"], "immunize.name=none: is the name of the baseline model"),
        (["eval.conditioning.name=norms"], "eval.conditioning.name=norms: is not the key"),
        (
            ["budget.points=7", "budget.at=[0,5]"],
            "budget.points=7: is read with budget.at=null only",
        ),
        (["backbone.init=5"], "backbone.init=5: choose one of identity, random"),
        (
            ["+budget.horizn=1"],
            "budget.horizn=1: there is no such key; did you mean budget.horizon",
        ),
        (["budget.horizon=true"], "budget.horizon=True: must be a whole number"),
        (["budget.points=1"], "budget.points=1: must be a whole number ≥ 2"),
        (["~budget.horizon"], "budget.horizon=None: needs a value"),
        (["budget=5"], "budget=5: must be a group"),
        (["seeds=1.5"], "seeds=[1.5]: must be a list"),
        (["seeds=abc"], "seeds=['abc']: must be a list"),
        (["seeds=[true]"], "seeds=[True]: must be a list"),
    ],
)
def test_values_that_cannot_work_are_refused_when_the_run_is_put_together(arguments, key):
    with pytest.raises(UserError) as error:
        parts(*arguments)
    assert key in str(error.value)


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def call(*arguments, first=()):
        fixed = ["experiment=house_price", "tracker=none", "dry_run=true"]
        code, _, err = call_entry(monkeypatch, capfd, *first, *fixed, *arguments)
        return code, err

    return call


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("+budget.foo=1", "budget.foo=1: there is no such key; "),
        ("immunize.epochs=1.5", "immunize.epochs=1.5"),
        ("force=evel", "force=evel: did you mean eval"),
        ("+foo=3", "foo=3: is no key of this project"),
        ("name=../elsewhere", "name=../elsewhere: names a folder"),
        ("immunize.name=3", "immunize.name=3: names a folder"),
        ("dry_run=yess", "dry_run=yess: must be true or false"),
        ("scenario.path=/data/Müller", "inside of quotes, e.g. 'scenario.path=\"/data/Müller\"'"),
        ("scenario.path=~/houses", "scenario.path=~/houses: cannot be read"),
        ("push_to=me/model", "push_to=me/model: is read by action=export, and this is action=run"),
        ("records=[x]", "records=['x']: is read by action=report"),
        (
            "export.model=none",
            "export.model=none: is read by action=export, and this is action=run",
        ),
        ("action=leaderboard", "dry_run=True: is read by action=run | search | audit"),
        (
            "paths.outputs=" + "x" * 300,
            "the name is too long for the file system: set paths.outputs=DIR",
        ),
    ],
)
def test_the_command_says_so_in_one_line_and_exits_with_2(cli, argument, told):
    code, err = cli(argument)
    assert code == 2, err
    assert told in err
    assert "Traceback" not in err


def test_a_key_of_ones_own_may_be_added_where_something_reads_it(cli):
    assert cli("+foo=3", "immunize.epochs=${foo}")[0] == 0


def test_a_key_that_is_there_may_be_set_with_two_signs(cli):
    assert cli("++seeds=[0]")[0] == 0


OWN = ROOT / "docs" / "examples" / "own_methods"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["immunize=partial_whitening", "immunize.pwoer=0.3"], "did you mean immunize.power"),
        (["immunize=partial_whitenin"], "did you mean partial_whitening"),
        (["attacks=[accelerated_prob]"], "did you mean accelerated_probe"),
        (
            ["attacks=[accelerated_probe]", "attacks.accelerated_probe.setps=3"],
            "attacks.accelerated_probe.",
        ),
    ],
)
def test_hints_know_the_configs_of_ones_own(cli, arguments, told):
    code, err = cli(*arguments, first=("--config-dir", str(OWN / "conf")))
    assert code != 0
    assert told in err


def test_a_place_that_cannot_be_written_is_told(cli):
    code, err = cli("dry_run=false", "paths.outputs=/proc/x")
    assert code == 2, err
    assert "/proc/x: cannot be created here" in err


# ── errors of the operating system


@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.EACCES, errno.ENOSPC]
)
def test_advice_about_outputs_is_given_for_outputs_only(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def told(name, *arguments):
        return explain(OSError(number, os.strerror(number), name), ["run.py", *arguments])

    assert "paths.outputs=DIR" in told("outputs/cache/a")
    assert "paths.outputs=DIR" in told("/there/cache/a", "paths.outputs=/there")
    assert "set paths.cache=DIR" in told("/c/a", "paths.cache='/c'")
    assert "set hydra.run.dir=DIR" in told("here/x", "hydra.run.dir=here")
    assert "set path=DIR" in told("/there/.e.partial-1", "path=/there/e")
    assert "paths.outputs" not in told("/data/D1.csv", "paths.outputs=/there")
    assert "/data/D1.csv" in told("/data/D1.csv")


def test_a_missing_file_is_a_defect_unless_it_lies_in_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = FileNotFoundError(errno.ENOENT, "No such file", str(ROOT / "lab/minisd/glyphs.bin"))
    assert explain(missing, ["seeds=[0]"]) is None
    assert "paths.runs=DIR" in explain(
        FileNotFoundError(errno.ENOENT, "No such file", "/proc/x"), ["paths.runs=/proc/x"]
    )
    assert explain(OSError("no number"), []) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: "
            "you tried ..."
        ),
    ],
)
def test_exhausted_memory_names_the_options_that_lower_it(error):
    told = explain(error)
    for key in (
        "immunize.batch_size",
        "attacks.NAME.batch_size",
        "gradient_checkpointing",
        "sampling.count",
    ):
        assert key in told
    assert explain(RuntimeError("shape mismatch")) is None


# ── parts that do not fit the data


def test_a_logistic_probe_on_a_regression_is_refused_before_anything_runs():
    chosen = parts("attacks=[linear_probe,probe_logistic]", "eval=[conditioning]")
    with pytest.raises(
        UserError, match=r"attacks\.probe_logistic\.loss=cross_entropy: task good is a regression"
    ):
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
    code, err = cli("experiment=relearn", "attacks=[lora,full_finetune]", "backbone.dtype=bf16")
    assert code == 2
    assert (
        "backbone.dtype=torch.bfloat16: attackers that move the model's own weights "
        "train in float32" in err
    )


def test_accuracies_need_classification_and_transfer_needs_eight_cases():
    chosen = parts("eval=[probe_accuracy]")
    with pytest.raises(UserError, match="eval=probe_accuracy: needs classification"):
        check_cases(chosen, (linear_case(),))
    check_cases(chosen, (linear_classes(),))
    chosen = parts("eval=[transfer]")
    many = tuple(replace(linear_case(), name=f"case{i}") for i in range(8))
    check_cases(chosen, many)
    with pytest.raises(UserError, match="eval=transfer: needs a scenario with at least 8 cases"):
        check_cases(chosen, many[:7] + many[:1])


def test_metrics_that_the_run_leaves_out_are_not_asked():
    check_cases(parts("eval=[transfer]", "immunize=none"), (linear_case(),))
    check_cases(parts("eval=[probe_accuracy]", "attacks=none"), (linear_case(),))


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("open_clip", "pip install open_clip_torch"),
        ("nudenet", 'pip install "immunization-bench[nudenet]"'),
        ("optuna.samplers", 'pip install "immunization-bench[search]"'),
        ("lpips", "pip install lpips"),
    ],
)
def test_a_missing_package_is_told_with_what_to_install(module, command):
    assert command in explain(ModuleNotFoundError("gone", name=module))
    assert explain(ModuleNotFoundError("gone", name="lab.gone")) is None, (
        "a module of ours is a defect"
    )


def test_extras_and_packages_that_messages_name_exist():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\n", text, re.DOTALL)[1]
    assert set(failures._EXTRAS.values()) <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))
    assert all(f'"{name}>=' in text for name in failures._DISTRIBUTIONS.values())


def test_a_package_that_a_part_needs_or_a_module_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "mine_needs.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="pip install a_package_that_nobody_has"):
        _build(OmegaConf.create({"_target_": "mine_needs.Thing"}), "immunize")
    with pytest.raises(UserError, match="PYTHONPATH"):
        _build(OmegaConf.create({"_target_": "mine_gone.Thing"}), "immunize")


# ── groups of one choice, and parts of somebody else's


def test_a_list_for_a_group_of_one_choice_is_refused(monkeypatch, capfd, tmp_path):
    """Hydra would merge the two files and name the mixture after the last."""
    monkeypatch.chdir(tmp_path)
    for words in (["immunize=[kappa_pencil,kappa_closed_form]"], ["backbone=[linear]"]):
        code, _, err = call_entry(
            monkeypatch, capfd, "experiment=house_price", "dry_run=true", *words
        )
        group, _, value = words[0].partition("=")
        assert code == 2
        assert f"error: {group}=" in err
        assert f"takes one choice; for a run of each: -m {group}={value[1:-1]}." in err


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
    with pytest.raises(UserError, match=r"attacks\.linear_probe=Half: .*it has no accepts"):
        parts()


def test_an_attacker_goes_by_the_name_that_it_stands_under():
    with pytest.raises(UserError, match=r"attacks\.linear_probe\.name=other: is not the key"):
        parts("attacks.linear_probe.name=other")


def test_options_of_an_attacker_without_its_name_are_told():
    with pytest.raises(UserError, match=r"attacks\._target_=.*stands without a name"):
        parts("+attacks._target_=attacks.probes.linear_probe.LinearProbe")
