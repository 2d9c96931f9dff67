"""`python run.py` in processes of its own, and what their folders tell afterwards."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lab.core.sources import ROOT as ROOT

TOKENS = {"WANDB_API_KEY": "5ec2e7" * 6 + "c0de", "HF_TOKEN": "hf_" + "S3cretHubT0ken" * 2}
FAST = [
    "experiment=house_price",
    "tracker=none",
    "budget.horizon=5",
    "budget.multiple=2",
    "budget.points=5",
]


def start(folder, *arguments, env=None):
    """A run whose working directory is ``folder``, in a session of its own so that `kill` reaches
    its children. It can import helpers of the tests and what lies in ``folder``.
    """
    places = [str(ROOT), str(ROOT / "tests/helpers"), str(folder)]
    paths = {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=folder,
        env={**(env or os.environ), **paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process, code=0, seconds=300):
    """Standard output and error of a process that ends with ``code``."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def kill(process):
    """`kill -9` of a process and of all that it started."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def until(ready, message, seconds=300):
    """Wait for ``ready()`` to be true, at most ``seconds``; returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (result := ready()):
        if time.monotonic() > deadline:
            pytest.fail(f"{message() if callable(message) else message}: not in {seconds} s")
        time.sleep(0.1)
    return result


def found_records(folder):
    """Records below ``folder``, oldest first."""
    paths = sorted(folder.rglob("record.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text()) for path in paths]


def hashes(folder):
    """Content hashes of the finished runs, by immunizer."""
    return {r["immunizer"]: r["content_hash"] for r in found_records(folder) if r["status"] == "ok"}


def computed(folder):
    """Keys of the stages that the run logs below ``folder`` say were computed, once per time."""
    lines = [line for path in folder.rglob("run.log") for line in path.read_text().splitlines()]
    return [line.rpartition(" ")[2] for line in lines if "lab.runner.experiment: computed " in line]


def telling(folder, *texts):
    """Files below ``folder`` and ``texts`` that hold one of `TOKENS`."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    held = {**files, **{text[:40]: text.encode() for text in texts}}
    return [
        name
        for name, body in held.items()
        if any(token.encode() in body for token in TOKENS.values())
    ]
