"""A launch that fails early, in this process: its record, its exit code, and what a process leaves
for its parent.
"""

import errno
import json
import os

import pytest
import torch
from entry_point import call_entry
from omegaconf import OmegaConf

from lab.cluster.launch import _as_error, _first_failure
from lab.core import record as records
from lab.core.errors import UserError
from lab.runner import worker

STUDY = ["experiment=house_price", "seeds=[0]"]


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call_entry(
        monkeypatch, capfd, *STUDY, "hydra.run.dir=run", *arguments
    )


def test_a_tracker_that_cannot_be_built_leaves_a_record(cli, tmp_path):
    code, _, err = cli("tracker=[wandb]", "tracker.wandb.timeout_s=0")
    assert code == 2
    assert "tracker.wandb.timeout_s=0" in err
    record = records.read(tmp_path / "run/record.json")
    assert (record["status"], record["error"]["key"]) == ("failed", "tracker.wandb.timeout_s")


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["launch=cpu", "launch.num_processes=0"], "launch.num_processes"),
        (["launch=none", "launch.name=many"], "launch.name"),
    ],
)
def test_the_record_of_an_earlier_run_does_not_outlive_a_wrong_option(
    cli, tmp_path, arguments, key
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/record.json").write_text("of an earlier run")
    assert cli("tracker=none", *arguments)[0] == 2
    record = records.read(tmp_path / "run/record.json")
    assert (record["status"], record["error"]["key"]) == ("failed", key)


def test_a_wrong_option_on_the_second_machine_leaves_the_first_ones_record(cli, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/record.json").write_text("of the first machine")
    code, _, err = cli(
        "tracker=none", "launch=cpu", "launch.num_machines=2", "launch.machine_rank=1"
    )
    assert code == 2
    assert "launch.main_process_ip" in err
    assert (tmp_path / "run/record.json").read_text() == "of the first machine"


# ---- one process


@pytest.fixture
def works(tmp_path, monkeypatch):
    """Exit code of a process whose device does not do, and the failure that its parent finds."""

    def taken(cfg):
        raise UserError("backbone.device", "cuda", "is taken.")

    def call(processes=1):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setattr(worker, "_device", taken)
        OmegaConf.save({"launch": {"timeout_s": 1, "check_every": 1}}, tmp_path / "launch.yaml")
        rank = worker.Rank(tmp_path / "ranks")
        (tmp_path / "ranks/0.json").write_text(json.dumps({"state": "running", "failure": None}))
        code = worker.work(tmp_path / "launch.yaml", rank)
        return code, _first_failure(tmp_path, [0])

    return call


def test_only_what_was_told_to_all_ends_with_code_0(works, monkeypatch):
    def nobody_there(*_, **__):
        raise torch.distributed.DistStoreError("timed out")

    code, failure = works()
    assert (code, failure["key"]) == (0, "backbone.device")
    monkeypatch.setattr("lab.runner.spread.dist.rendezvous", nobody_there)
    code, failure = works(processes=2)
    assert (code, failure["key"], failure["echo"]) == (1, "backbone.device", False)


def test_the_end_by_torchrun_is_not_taken_for_the_cause(works, monkeypatch):
    def ended(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_unfit", ended)
    code, failure = works(processes=2)
    assert (code, failure["echo"]) == (1, True)


def test_a_full_disk_does_not_look_like_a_kill(works, monkeypatch, tmp_path, capfd):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lab.core.hashing.write_atomically", full)
    code, failure = works()
    assert (code, failure["told"]) == (0, "backbone.device=cuda: is taken.")
    assert "No space left on device. backbone.device=cuda: is taken." in capfd.readouterr().err
    error = _as_error(failure, tmp_path, [0], 0)
    assert isinstance(error, UserError)
    monkeypatch.setattr(worker.Rank, "_write_over", lambda *_: None)
    assert works() == (0, None)
    assert "is taken." in capfd.readouterr().err
