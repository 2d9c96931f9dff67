"""Input that cannot work is refused with its key, and as early as it can be known."""

import errno
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from presets import composed
from tiny import linear_case, linear_classes

from lab.cli.errors import report_error
from lab.core.errors import UserError
from lab.core.sources import ROOT
from lab.models.devices import limit_threads
from lab.runner.assemble import assemble, check_cases


def parts(*overrides):
    return assemble(composed("experiment=house_price", *overrides))


# ── what a user types


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["immunize.epochs=1.5"], "immunize.epochs"),
        (["scenario.test_share=abc"], "scenario.test_share"),
        (["attacks.linear_probe.standardize=1"], "attacks.linear_probe.standardize"),
        (["eval.conditioning.groups=0"], "eval.conditioning.groups"),
        (["backbone.init=5"], "backbone.init"),
        (["eval.conditioning.name=norms"], "eval.conditioning.name"),
        (["+budget.horizn=1"], "budget.horizn"),
        (["budget.horizon=true"], "budget.horizon"),
        (["~budget.horizon"], "budget.horizon"),
        (["budget=5"], "budget"),
        (["seeds=1.5"], "seeds"),
        (["seeds=[0,0]"], "seeds"),
        (["immunize=kappa_closed_form", "backbone=efficientnet_lite0"], "backbone"),
        (["+attacks._target_=attacks.probes.linear_probe.LinearProbe"], "attacks._target_"),
    ],
)
def test_values_that_cannot_work_are_refused_when_the_run_is_put_together(arguments, key):
    with pytest.raises(UserError) as error:
        parts(*arguments)
    assert error.value.key == key


@pytest.mark.parametrize("threads", [0, "two", 1.5])
def test_a_number_of_threads_that_cannot_be_is_refused(threads):
    with pytest.raises(UserError, match="threads="):
        limit_threads(threads)


@pytest.fixture
def refused(cli):
    """What is told about words that end a dry run with code 2."""
    fixed = ["experiment=house_price", "tracker=none", "dry_run=true"]
    return lambda *words, first=(): cli(*first, *fixed, *words, code=2).err


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
        ("force=all", "force=all: choose one of attack, eval, immunize, train"),
        ("list", "list: must be KEY=VALUE; did you mean action=list?"),
        ("immunize=kappa,none", "add -m to run each: python run.py -m immunize=kappa,none"),
        ("name=../elsewhere", "name=../elsewhere: names a folder"),
        ("dry_run=yess", "dry_run=yess: must be true or false"),
        ("scenario.path=/data/Müller", "inside of quotes, e.g. 'scenario.path=\"VALUE\"'"),
        ("action=leaderboard", "dry_run=True: plans action=run | search | audit only"),
        ("dry_run=false paths.outputs=" + "x" * 300, "File name too long; paths.outputs=DIR"),
    ],
)
def test_the_command_says_so_in_one_line_and_exits_with_2(refused, argument, message):
    err = refused(*argument.split(" "))
    assert message in err
    assert "Traceback" not in err


def test_all_mistakes_are_listed_at_once(refused):
    err = refused("immunize.epochs=1.5", "fail_on=bad", "seeds=[0,0]", "budget.horizon=true")
    assert all(k in err for k in ("4 mistakes", "epochs=1.5", "fail_on=bad", "seeds", "horizon"))
    assert "run folder" not in err


OWN = ROOT / "docs" / "examples" / "own_methods"


def test_hints_know_the_configs_of_ones_own(refused):
    words = ["immunize=partial_whitening", "immunize.pwoer=0.3"]
    told = refused(*words, first=("--config-dir", str(OWN / "conf")))
    assert "did you mean immunize.power" in told


# ── errors of the machine, of packages and of launchers


class TerminatedWorkerError(Exception):
    __module__ = "joblib.externals.loky.process_executor"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "", "/there"), 2, "/there: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "", "lab/world.bin"), 1, "FileNotFoundError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "batch_size"),
        (BrokenPipeError(errno.EPIPE, "another pipe than the output"), 1, "another pipe"),
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


# ── parts that do not fit the data


def test_a_logistic_probe_on_a_regression_is_refused_before_anything_runs():
    chosen = parts("attacks=[linear_probe,probe_logistic]", "eval=[conditioning]")
    with pytest.raises(UserError, match=r"attacks\.probe_logistic\.loss=cross_entropy"):
        check_cases(chosen, (linear_case(),))
    check_cases(chosen, (linear_classes(),))


@pytest.mark.parametrize("attack", ["full_finetune", "controlnet"])
def test_an_attack_that_the_model_cannot_take_is_refused_before_anything_runs(refused, attack):
    few = [
        *(f"scenario.{part}=4" for part in ("own", "train", "prior", "reference", "keep")),
        *("scenario=relearn_quick", "scenario.unrelated=4", "scenario.regularizers=4"),
    ]
    words = ["experiment=relearn", f"attacks=[lora,{attack}]", "backbone.dtype=bf16"]
    assert "backbone.dtype=torch.bfloat16" in refused(*words, *few)


def test_accuracies_need_classification_and_transfer_needs_eight_cases():
    chosen = parts("eval=[probe_accuracy]")
    with pytest.raises(UserError, match="eval=probe_accuracy"):
        check_cases(chosen, (linear_case(),))
    check_cases(chosen, (linear_classes(),))
    many = tuple(replace(linear_case(), name=f"case{i}") for i in range(7))
    with pytest.raises(UserError, match="eval=transfer"):
        check_cases(parts("eval=[transfer]"), many)


# ── parts of somebody else's


class Half:
    name = "linear_probe"

    def __init__(self, **options):
        self.options = options


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (f"{__name__}.Half", "must be a subclass of lab.core.types.Attacker"),
        ("mine_gone.Thing", "PYTHONPATH"),
    ],
)
def test_a_class_that_is_no_attacker_or_not_there(target, message):
    with pytest.raises(UserError, match=message):
        parts(f"attacks.linear_probe._target_={target}")


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    """As in ``action=list | head``."""
    command = f"{sys.executable} {ROOT / 'run.py'} action=list | head -n 1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("experiment=\n", "")
