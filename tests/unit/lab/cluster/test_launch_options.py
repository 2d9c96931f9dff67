"""Options of `launch=…`: what is refused, what accelerate is told, how an end is explained."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lab.cluster import launch
from lab.core.config import bind
from lab.core.errors import RunFailed, UserError
from lab.core.sources import ROOT
from lab.runner.executors import ProcessStates
from lab.runner.worker import take_device

MACHINES = {"num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 29500}


def options(group="cpu", **changes):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose("config", overrides=[f"launch={group}"]).launch
    return bind(launch.Launch, OmegaConf.merge(node, changes), "launch")


@pytest.fixture
def gpus(monkeypatch):
    """A machine with as many GPUs as told."""

    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


def test_an_option_that_cannot_work_names_its_key():
    with pytest.raises(UserError, match=r"launch\.num_processes=0"):
        options(num_processes=0)
    with pytest.raises(UserError, match=r"launch\.main_process_ip"):
        options(num_processes=2, num_machines=2)


def test_gpus_are_counted(gpus):
    gpus(0)
    with pytest.raises(UserError, match="no CUDA device"):
        options("multi_gpu")
    gpus(4)
    assert (options("multi_gpu").total, options("multi_gpu", **MACHINES).total) == (4, 8)
    assert list(options("multi_gpu", **MACHINES, machine_rank=1).ranks) == [4, 5, 6, 7]


def test_the_first_failure_is_the_cause_and_a_process_without_an_end_was_killed(
    tmp_path, monkeypatch
):
    cfg = OmegaConf.create({"threads": 1})

    def ends_as(code, **ends):
        def wait(command, env, states):
            for rank, (state, failure) in enumerate(ends.values()):
                states.write(rank, state, failure)
            return code

        monkeypatch.setattr(launch, "wait", wait)
        with pytest.raises(RunFailed) as caught:
            launch.run_processes(options(), cfg, tmp_path)
        return caught.value

    first, second = (RunFailed("ValueError", text, rank=1) for text in ("first", "second"))
    assert ends_as(0, a=("failed", first), b=("failed", second)).message == "first"
    assert ends_as(1, a=("failed", first), b=("running", None)).message == "first"
    lost = RunFailed("Killed", "another process was killed")
    assert "process 1" in ends_as(1, a=("failed", lost), b=("running", None)).message
    assert "code 7" in ends_as(7).message
    assert ProcessStates(tmp_path / "ranks").first_failure() is None, "earlier ends are forgotten"


def test_a_process_takes_its_own_gpu(gpus, monkeypatch):
    gpus(2)
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    take_device(OmegaConf.create({"backbone": {"device": "auto"}, "launch": {"num_processes": 2}}))
    assert chosen == [1]
    with pytest.raises(UserError, match=r"backbone\.device=cuda:0"):
        take_device(
            OmegaConf.create({"backbone": {"device": "cuda:0"}, "launch": {"num_processes": 2}})
        )
