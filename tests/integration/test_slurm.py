"""Sweeps on a real Slurm of one node: signals, preemption, kill -9, and what `action=status` says
meanwhile.
"""

import os
import random
import shlex
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from doc_blocks import blocks
from presets import composed
from processes import (
    FAST,
    ROOT,
    TOKENS,
    computed,
    ended,
    found_records,
    kill,
    start,
    telling,
    until,
)

from lab.cluster.status import status
from lab.core import record as records

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

PAGE = ROOT / "docs/cluster.md"
SLURM = [
    "-m",
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.cpus_per_task=1",
    "threads=1",
    "seeds=[0]",
    *FAST,
]
KILLS = int(os.environ.get("KILLS", "1"))
LONG = [
    "immunize.epochs=300",
    "immunize.checkpoint_every=20",
]  # ten seconds on a free core: time enough to strike


@pytest.fixture
def told(cluster, tmp_path, monkeypatch, capsys):
    """The answer of `action=status` about the runs in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, cluster.environment[key])

    def call():
        capsys.readouterr()
        status(composed("action=status", "records=[outputs/runs]"))
        return capsys.readouterr().out

    yield call
    cluster.cancel()


@pytest.fixture
def submit(cluster, tmp_path, told):
    """Starts a sweep in ``tmp_path`` and waits until its jobs are in the queue."""
    started = []

    def submitted(jobs, *arguments):
        before = set(cluster.queue())
        process = start(tmp_path, *SLURM, *arguments, env=cluster.environment | TOKENS)
        started.append(process)
        found = until(
            lambda: len(set(cluster.queue()) - before) == jobs and set(cluster.queue()) - before,
            cluster.logs,
        )
        return process, sorted(found), told

    yield submitted
    for process in started:
        if process.poll() is None:
            kill(process)


def folder_of(job):
    """The run folder of a job of the array, once it has begun to work."""
    number = job.partition("_")[2] or "0"  # a single job is no array
    return until(
        lambda: next(Path.cwd().glob(f"outputs/runs/*/*/{number}-*/run.log"), None),
        f"job {job} begins",
    ).parent


def test_a_sweep_of_two_by_two_goes_on_after_a_signal_and_a_preemption(submit, cluster, tmp_path):
    words = next(block for block in blocks(PAGE) if "submitit_slurm" in block.text).commands()[0]
    sweep, jobs, told = submit(
        4, *LONG, *(word for word in words if word not in SLURM)
    )  # what the page tells to run
    assert (
        sum(one.startswith("queued") for one in told().splitlines()) >= 2
    )  # of four jobs two fit on the node
    signalled = jobs[0]
    first = folder_of(signalled)
    until(lambda: list(tmp_path.rglob("*.ckpt")), "a checkpoint")
    assert f"Slurm job {signalled}" in told()
    # without --ctld, scancel 24.11 repeats the signal for a minute while other jobs of the array
    # wait
    cluster.call("scancel", "--ctld", "--signal=USR1", signalled)
    until(lambda: cluster.queue()[signalled] == "PENDING", cluster.logs)
    assert records.read(first / "record.json")["status"] == "preempted"
    assert next(line for line in told().splitlines() if first.name in line).startswith("queued")

    cluster.call(
        "sbatch", "--partition=urgent", "--cpus-per-task=1", "--output=/dev/null", "--wrap=sleep 1"
    )
    preempted = until(lambda: [j for j in jobs[1:] if cluster.restarts(j)], cluster.logs)[0]
    for job in (signalled, preempted):
        cluster.begin(job)
    ended(sweep)

    assert Counter(cluster.queue()[job] for job in jobs) == {"COMPLETED": 4}
    assert [cluster.restarts(job) for job in (signalled, preempted)] == [1, 1]
    found = found_records(tmp_path)
    assert [record["status"] for record in found] == ["ok"] * 4
    wanted = Counter(stage["key"] for record in found for stage in record["stages"])
    assert Counter(computed(tmp_path)) == dict.fromkeys(wanted, 1), "a stage ran twice, or never"
    assert max(wanted.values()) == 4, "all four share the immunization of the baseline model"
    assert told().splitlines()[-1] == "4 ok"
    assert list(tmp_path.rglob("leaderboard.md"))


def test_a_failed_job_and_a_killed_one(submit, cluster, tmp_path):
    sweep, (good, bad), told = submit(2, *LONG, "immunize=kappa", "immunize.lambda_p=1,-1")
    folder = folder_of(good)
    until(lambda: list(tmp_path.rglob("*.ckpt")), "a checkpoint")
    for _ in range(KILLS):
        process = until(lambda: cluster.process(good), cluster.logs)
        time.sleep(random.SystemRandom().uniform(0, 1))
        os.kill(process, signal.SIGKILL)
        until(
            lambda: [cluster.queue()[job] for job in (good, bad)] == ["FAILED", "FAILED"],
            cluster.logs,
        )
        lines = {
            state: line for state, _, line in (one.partition(" ") for one in told().splitlines())
        }
        assert folder.name in lines.get("killed", ""), told()
        assert "immunize.lambda_p" in lines["failed"]
        assert "1 failed, 1 killed" in told()
        cluster.call("scontrol", "requeue", good)
        cluster.begin(good)

    out, err = ended(sweep, code=2)
    assert "Traceback" not in err
    assert telling(tmp_path, out, err) == [], "a file of the jobs holds a secret of the environment"
    assert records.read(folder / "record.json")["status"] == "ok"
    assert cluster.restarts(good) == KILLS
    (tmp_path / "whole").mkdir()
    alone = ["threads=1", "seeds=[0]", *FAST, *LONG, "immunize=kappa", "immunize.lambda_p=1"]
    ended(start(tmp_path / "whole", *alone))
    whole = found_records(tmp_path / "whole")[0]
    assert records.read(folder / "record.json")["content_hash"] == whole["content_hash"]


def test_the_script_of_the_docs_goes_on_after_a_signal(cluster, tmp_path, told):
    script = next(block.text for block in blocks(PAGE) if "#SBATCH" in block.text)
    ours = shlex.join(
        [sys.executable, str(ROOT / "run.py"), "threads=1", "seeds=[0]", *FAST, *LONG]
    )
    assert script.count("python run.py") == 1
    (tmp_path / "runs.sh").write_text(script.replace("python run.py", ours))
    number = cluster.call("sbatch", "--parsable", "runs.sh", cwd=tmp_path).strip()
    job = f"{number}_0"
    folder = tmp_path / f"outputs/runs/by_hand/{number}-0"
    until(lambda: list(tmp_path.rglob("*.ckpt")) and (folder / "run.log").is_file(), cluster.logs)
    cluster.call("scancel", "--ctld", "--signal=USR1", job)
    until(lambda: cluster.queue()[job] == "PENDING", cluster.logs)
    assert records.read(folder / "record.json")["status"] == "preempted"
    assert next(line for line in told().splitlines() if folder.name in line).startswith("queued")
    cluster.begin(job)
    both = {job, f"{number}_1"}
    until(lambda: [cluster.queue()[one] for one in both] == ["COMPLETED"] * 2, cluster.logs)
    assert cluster.restarts(job) == 1
    assert told().splitlines()[-1] == "2 ok"
    assert Counter(computed(tmp_path)).most_common(1)[0][1] == 1


@pytest.mark.skipif(
    "TIMEOUT" not in os.environ, reason="waits for a limit of two minutes: TIMEOUT=1 pytest -m slow"
)
def test_a_job_that_runs_out_of_time_goes_on(submit, cluster, tmp_path):
    long = [
        "immunize=kappa",
        "immunize.epochs=3000",
        "immunize.lr=1e-5",
        "immunize.checkpoint_every=200",
    ]
    limit = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=30"]
    sweep, (job,), told = submit(1, *long, *limit)
    folder, begun = folder_of(job), 0

    def over():
        nonlocal begun
        if cluster.queue()[job] == "PENDING" and cluster.restarts(job) > begun:
            begun = cluster.restarts(job)
            assert records.read(folder / "record.json")["status"] == "preempted"
            assert next(line for line in told().splitlines() if folder.name in line).startswith(
                "queued"
            )
            cluster.begin(job)
        time.sleep(1)
        return cluster.queue()[job] == "COMPLETED"

    until(over, cluster.logs, 900)
    ended(sweep)
    print(f"the limit stopped the job {cluster.restarts(job)} times")
    assert cluster.restarts(job) >= 1
    assert records.read(folder / "record.json")["status"] == "ok"
    (tmp_path / "whole").mkdir()
    ended(start(tmp_path / "whole", "threads=1", "seeds=[0]", *FAST, *long))
    assert (
        records.read(folder / "record.json")["content_hash"]
        == found_records(tmp_path / "whole")[0]["content_hash"]
    )
