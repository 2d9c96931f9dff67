"""Options of `launch=…`: what is refused, what accelerate is told, where processes meet, how an end
is explained.
"""

import json
import logging
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lab.cluster import launch
from lab.cluster.launch import Launch
from lab.core.errors import RankFailed, UserError, defect
from lab.runner.worker import _device

ROOT = Path(__file__).resolve().parents[4]
MACHINES = {"num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 29500}


def options(group="cpu", **changes):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose("config", overrides=[f"launch={group}"]).launch
    return Launch.read(OmegaConf.merge(node, changes))


@pytest.fixture
def gpus(monkeypatch):
    """A machine with as many GPUs as told."""

    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("launch.name", {"name": "gpu"}),
        ("launch.num_processes", {"num_processes": 0}),
        ("launch.num_processes", {"num_processes": "two"}),
        ("launch.num_processes", {"num_processes": 3, **MACHINES}),
        ("launch.machine_rank", {"num_processes": 2, **MACHINES, "machine_rank": 2}),
        ("launch.main_process_ip", {"num_processes": 2, **MACHINES, "main_process_ip": None}),
        ("launch.main_process_port", {"num_processes": 2, **MACHINES, "main_process_port": None}),
        ("launch.main_process_port", {"main_process_port": 70000}),
        ("launch.timeout_s", {"timeout_s": 0}),
        ("launch.check_every", {"check_every": 0}),
    ],
)
def test_an_option_that_cannot_work_names_its_key(key, changes):
    with pytest.raises(UserError) as caught:
        options(**changes)
    assert caught.value.key == key


def test_a_group_that_was_replaced_by_a_value_is_refused():
    with pytest.raises(UserError, match="launch"):
        Launch.read("cpu")


def test_gpus_are_counted(gpus):
    gpus(0)
    with pytest.raises(UserError, match="no CUDA device"):
        options("multi_gpu")
    gpus(4)
    assert options("multi_gpu").num_processes == 4
    assert options("multi_gpu", **MACHINES).num_processes == 8
    assert list(options("multi_gpu", **MACHINES, machine_rank=1).ranks) == [4, 5, 6, 7]
    with pytest.raises(UserError, match="torch sees 4"):
        options("multi_gpu", num_processes=5)


def test_threads_are_the_cores_divided(monkeypatch, caplog):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert options(num_processes=3).threads(None) == 2
    assert options(num_processes=3).threads(5) == 5
    with caplog.at_level(logging.WARNING):
        assert options(num_processes=9).threads(None) == 1
    assert "8 cores for 9 processes" in caplog.text


def test_the_command_has_accelerates_own_flags(gpus):
    words = options(num_processes=2, args=["--same_network"]).command(
        Path("run/launch.yaml"), 1, 29501
    )
    parser = __import__(
        "accelerate.commands.launch", fromlist=["launch_command_parser"]
    ).launch_command_parser()
    told = parser.parse_args(words[words.index("accelerate.commands.launch") + 1 :])
    assert (told.num_processes, told.main_process_port, told.num_cpu_threads_per_process) == (
        2,
        29501,
        1,
    )
    assert told.multi_gpu
    assert told.same_network
    assert told.module
    assert told.training_script == "lab.runner.worker"
    assert told.training_script_args == ["--config", "run/launch.yaml", "--watch_stdin"]
    told = parser.parse_args(
        options(num_processes=2, **MACHINES, machine_rank=1).command(Path("x"), 1, 29500)[3:]
    )
    assert (told.num_machines, told.machine_rank, told.main_process_ip) == (2, 1, "10.0.0.1")
    assert parser.parse_args(options(num_processes=1).command(Path("x"), 1, 29500)[3:]).cpu
    gpus(1)
    assert not parser.parse_args(options("multi_gpu").command(Path("x"), 1, 29500)[3:]).cpu


def test_a_port_in_use_is_replaced_on_one_machine_and_refused_on_several(caplog):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = options(main_process_port=port).port()
        assert found not in (port, 0)
        assert f"main_process_port={port} is in use" in caplog.text
        with pytest.raises(UserError) as caught:
            options(num_processes=2, **{**MACHINES, "main_process_port": port}).port()
        assert caught.value.key == "launch.main_process_port"
        # the second machine does not listen: the port is the first one's
        assert (
            options(
                num_processes=2, **{**MACHINES, "main_process_port": port}, machine_rank=1
            ).port()
            == port
        )
    assert options(main_process_port=found).port() == found


def test_a_port_lost_at_the_last_moment_is_tried_again(tmp_path, monkeypatch, caplog):
    """The first command ends before any process has begun, while somebody listens there."""
    busy = socket.socket()
    ports = []

    def wait(command, env):
        ports.append(
            next(int(word.partition("=")[2]) for word in command if "main_process_port" in word)
        )
        if len(ports) == 1:
            busy.bind(("", ports[0]))
            busy.listen()
            return 1
        return 0

    monkeypatch.setattr(launch, "_wait", wait)
    with busy:
        assert launch._attempts(options(), tmp_path / "launch.yaml", 1) == 0
    assert len(set(ports)) == 2
    assert "was taken at the last moment" in caplog.text


def test_only_echoes_and_silence_become_the_dead_process(tmp_path, capsys):
    def told(*states):
        folder = tmp_path / "ranks"
        folder.mkdir(exist_ok=True)
        for rank, state in enumerate(states):
            (folder / f"{rank}.json").write_text(json.dumps(state))
        failure = launch._first_failure(tmp_path, range(len(states)))
        return launch._as_error(failure, tmp_path, range(len(states)), 1)

    def failed(order=1, echo=False, **more):
        plain = {
            "rank": 1,
            "type": "ValueError",
            "message": "no",
            "told": None,
            "key": None,
            "value": None,
            "fix": None,
            "part": "attacks.mine",
        }
        facts = {
            "step": None,
            "cell": None,
            "traceback": "Traceback of it",
            "order": order,
            "echo": echo,
        }
        return {"state": "failed", "failure": plain | facts | more}

    running = {"state": "running", "failure": None}
    error = told(failed(echo=True, rank=0), running)
    assert isinstance(error, RankFailed)
    assert (error.rank, error.type) == (1, "Killed")
    error = told(failed(order=2, rank=0), failed(order=1, message="first"))
    assert defect(error) == "attacks.mine: process 1: ValueError: first"
    assert "Traceback of it" in capsys.readouterr().err
    error = told(failed(told="seeds: wrong", key="seeds", value="x", fix="wrong"), running)
    assert isinstance(error, UserError)
    assert error.key == "seeds"
    error = launch._as_error(None, tmp_path / "nothing", range(2), 7)
    assert "code 7" in str(error)


@pytest.mark.parametrize(
    ("capability", "placed", "precision", "key"),
    [
        ((7, 5), "auto", "bfloat16", "immunize.precision"),
        ((8, 0), "cuda:0", "float32", "backbone.device"),
        ((8, 0), "auto", "bfloat16", None),
        ((7, 5), "auto", "float32", None),
    ],
)
def test_what_a_gpu_cannot_do_is_told_before_anything_runs(
    gpus, monkeypatch, capability, placed, precision, key
):
    gpus(2)
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    cfg = OmegaConf.create(
        {
            "backbone": {"device": placed},
            "immunize": {"precision": precision},
            "launch": {"num_processes": 2},
        }
    )
    if key is None:
        _device(cfg)
    else:
        with pytest.raises(UserError) as caught:
            _device(cfg)
        assert caught.value.key == key
    assert chosen == [1]


def test_children_of_the_launcher_do_not_die_of_a_batch_systems_signals():
    code = (
        "import signal; print(*(signal.getsignal(n) == signal.SIG_IGN for n in "
        "(signal.SIGUSR1, signal.SIGUSR2)))"
    )
    command = [sys.executable, "-c", code]
    deaf = launch._deaf_to_batch_signals
    done = subprocess.run(command, preexec_fn=deaf, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
    assert signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN
