"""A launch that fails early, in this process: its record, its exit code, and what a process leaves
for its parent.
"""

import threading

import pytest
from omegaconf import OmegaConf

from lab.core.errors import UserError, explain
from lab.runner import worker
from lab.runner.executors import ProcessStates

STUDY = ["experiment=house_price", "seeds=[0]"]


@pytest.fixture
def refused(cli):
    return lambda *words: cli(*STUDY, "hydra.run.dir=run", *words, code=2).err


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["tracker=[wandb]", "tracker.wandb.timeout_s=0"], "tracker.wandb.timeout_s"),
        (["tracker=none", "launch=cpu", "launch.num_processes=0"], "launch.num_processes"),
        (["tracker=none", "launch=none", "launch.name=many"], "launch.name"),
        (
            ["tracker=none", "launch=cpu", "launch.num_machines=2", "launch.machine_rank=1"],
            "launch.main_process_ip",
        ),
    ],
)
def test_a_wrong_option_changes_nothing(refused, tmp_path, arguments, key):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/record.json").write_text("of an earlier run")
    assert key in refused(*arguments)
    assert (tmp_path / "run/record.json").read_text() == "of an earlier run"


# ---- one process


def work(folder, monkeypatch, error):
    """What a process leaves for its parent that ``error`` ends while it takes its device."""

    def fails(cfg):
        raise error

    monkeypatch.setattr(worker, "take_device", fails)
    states = ProcessStates(folder / "ranks")
    states.write(0, "running")
    OmegaConf.save({"launch": {"timeout_s": 1}}, folder / "launch.yaml")
    worker.work(folder / "launch.yaml", 0, threading.Event())
    return states


def test_a_user_error_of_a_process_reaches_its_parent(tmp_path, monkeypatch):
    error = UserError("backbone.device", "cuda", "is taken.")
    failure = work(tmp_path, monkeypatch, error).first_failure()
    assert (failure.key, explain(failure)) == (error.key, "backbone.device=cuda: is taken.")


def test_a_process_that_the_user_stopped_has_not_failed(tmp_path, monkeypatch):
    states = work(tmp_path, monkeypatch, KeyboardInterrupt())
    assert states.first_failure() is None
    assert states.read()[0]["state"] == "stopped"
