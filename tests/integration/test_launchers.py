"""Sweeps whose jobs run in other processes of this machine (Slurm: test_slurm.py), and how they say
what is missing.
"""

import os
import subprocess
import sys
from collections import Counter

import pytest
from omegaconf import OmegaConf
from presets import composed
from processes import FAST, ROOT, TOKENS, computed, ended, found_records, start, telling

from lab.cluster.status import status
from lab.core.errors import UserError
from lab.runner import batch

QUICK = [*FAST, "threads=1", "seeds=[0]", "immunize.epochs=2"]


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """The answer of `action=status` about a folder."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        capsys.readouterr()
        status(composed("action=status", *overrides))
        return capsys.readouterr().out.splitlines()

    return call


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_a_sweep_in_processes_shares_its_stages_and_goes_on_after_a_failed_job(
    launcher, tmp_path, told
):
    pytest.importorskip(
        f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher", reason="needs the extra slurm"
    )
    grid = ["immunize=kappa,kappa_opt", "immunize.lambda_p=1,-1"]
    sweep = start(
        tmp_path, "-m", f"hydra/launcher={launcher}", *QUICK, *grid, env=os.environ | TOKENS
    )
    out, err = ended(sweep, code=2)
    assert telling(tmp_path, out, err) == []
    assert "Traceback" not in err
    found = found_records(tmp_path)
    assert Counter(record["status"] for record in found) == {"ok": 2}
    wanted = Counter(stage["key"] for record in found for stage in record["stages"])
    assert Counter(computed(tmp_path)) == dict.fromkeys(wanted, 1), "a stage ran twice, or never"
    assert max(wanted.values()) == 2, "the baseline model is shared"
    lines = told()
    assert lines[-1] == "2 ok, 2 failed"
    assert sum("immunize.lambda_p" in line for line in lines) == 2


# ---- one job: signals, and the folder that it works in

JOB = """
import os, signal, sys
from lab.runner.batch import fail_slurm_job, interruptible
def requeue(*_):
    print("requeued", flush=True)
    sys.exit(255)
signal.signal(signal.SIGUSR2, requeue)  # as submitit does
try:
    with interruptible(job={job}):
        os.kill(os.getpid(), signal.{first})
except KeyboardInterrupt as told:
    print("record of", told, flush=True)
for _ in range(3):
    os.kill(os.getpid(), signal.SIGUSR1)  # scancel repeats itself
print("in order")
fail_slurm_job(7)
"""


@pytest.mark.parametrize(
    ("first", "executor", "job", "code", "words"),
    [
        ("SIGUSR1", "slurm", True, 255, ["requeued"]),
        ("SIGUSR2", "local", True, 255, ["requeued"]),
        ("SIGTERM", "slurm", True, 130, []),  # cancelled or preempted: Slurm knows which
        ("SIGTERM", None, True, 0, ["record of SIGTERM", "in order"]),
        # a process that a job has started
        ("SIGUSR1", "slurm", False, 7, ["record of SIGUSR1", "in order"]),
    ],
)
def test_signals_of_a_batch_system(first, executor, job, code, words):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SUBMITIT", "SLURM"))}
    env |= {"PYTHONPATH": str(ROOT)} | ({"SUBMITIT_EXECUTOR": executor} if executor else {})
    command = [sys.executable, "-c", JOB.format(first=first, job=job)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (code, words, "")


def folder(place, process=None, action="run"):
    """A run folder as hydra and `lab.runner.batch.claim` leave it."""
    (place / ".hydra").mkdir(parents=True)
    (place / ".hydra/config.yaml").write_text(f"action: {action}\ndry_run: false\n")
    if process:
        (place / batch.PROCESS).write_text(OmegaConf.to_yaml(OmegaConf.create(process)))
    return place


SQUEUE = """#!/bin/sh
cat <<END
7_0|PENDING|BeginTime|{here}|study
7_1|RUNNING|None|{here}|study
7_2|PENDING|Resources|{here}|study
7_3|RUNNING|None|{here}|study
9|PENDING|Priority|{here}|by_hand
11|PENDING|Priority|/elsewhere|not_ours
END
"""


@pytest.fixture
def runs(tmp_path):
    """A sweep of four jobs: 0 was put back in the queue, 1 runs, 2 waits, 3 begins."""
    runs = tmp_path / "outputs/runs/study"
    worker = {"host": "node", "pid": 1, "started": 0.0}
    folder(runs / "multirun/0-kappa", process=worker | {"job": "7_0"})
    folder(runs / "multirun/1-kappa", process=worker | {"job": "7_1"})
    folder(runs / "killed")
    return runs


def test_status_tells_queued_running_and_killed_apart(told, runs, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(SQUEUE.format(here=tmp_path))
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    with batch.claim(runs / "here"):
        lines = told()
    begins = [(line.split()[0], line.split("  ")[-1]) for line in lines[:-1]]
    assert begins == [
        ("queued", "Slurm job 7_2 study waits: Resources"),
        ("running", "Slurm job 7_3 study begins"),
        ("queued", "Slurm job 9 by_hand waits: Priority"),
        ("running", f"process {os.getpid()} on {os.uname().nodename}; begins"),
        ("killed", "no record and no living process: the same command continues it"),
        ("queued", "Slurm job 7_0 study waits: BeginTime; it will continue"),
        ("running", "Slurm job 7_1 study begins"),
    ]
    assert lines[-1] == "3 queued, 3 running, 1 killed"


def test_status_without_slurm(told, runs, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert told()[-1] == "1 killed, 2 unknown"


def test_status_tells_how_actions_without_a_record_ended(told, tmp_path):
    runs = tmp_path / "outputs/runs"
    begun = {"host": "node", "pid": 1, "started": 0.0, "job": None}
    for action in batch.LASTING:
        folder(runs / f"{action}-killed", begun, action)
    assert told()[-1] == "4 killed"
    with batch.claim(runs / "search-killed"):
        pass
    with pytest.raises(UserError), batch.claim(runs / "train-killed"):
        raise UserError("train.steps", 0, "must be at least 1.")
    with (
        pytest.raises(KeyboardInterrupt),
        batch.claim(runs / "audit-killed"),
    ):
        raise KeyboardInterrupt
    lines = told()
    assert lines[-1] == "1 ok, 1 failed, 1 preempted, 1 killed"
    assert any("train.steps=0: must be at least 1." in line for line in lines)


def test_a_folder_is_claimed_until_its_process_dies(tmp_path, monkeypatch):
    code = """
import sys, time
from pathlib import Path
from lab.runner.batch import claim
with claim(Path("here")):
    print("claimed", flush=True)
    time.sleep(100)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    assert batch.is_claimed(tmp_path / "here")
    monkeypatch.setattr(batch, "PATIENCE", 0.1)
    with (
        pytest.raises(UserError, match=r"hydra\.run\.dir=.*here: another process is at work"),
        batch.claim(tmp_path / "here"),
    ):
        pytest.fail("two processes at work in one folder")
    process.kill()
    process.communicate()
    assert not batch.is_claimed(tmp_path / "here")
    assert OmegaConf.load(tmp_path / "here" / batch.PROCESS).pid == process.pid
