"""kill -9 at random points and many processes on one cache: nothing is lost, nothing is computed
twice.

KILLS=N in the environment says how often each test strikes. A Slurm job that is killed:
tests/slurm.
"""

import os
import random
import subprocess
import sys
import time

import pytest
from processes import FAST, ROOT, ended, found_records, hashes, kill, start, until

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "1"))
WORK = [*FAST, "threads=1", "immunize.epochs=20", "immunize.checkpoint_every=20"]


def begun(folder):
    """Whether the first stage is being computed."""
    return next(folder.rglob("*.lock"), None) if (folder / "outputs/cache").is_dir() else None


def resumed(broken, whole):
    """Whether the last runs found stages of killed ones in the cache, or went on from a checkpoint
    of theirs.
    """
    runs = len(found_records(whole))
    hits = [
        sum(r["provenance"]["cache_hits"] for r in found_records(folder)[-runs:])
        for folder in (broken, whole)
    ]
    logs = "".join(
        path.read_text() for path in (*broken.rglob("run.log"), *broken.rglob("ranks/*.log"))
    )
    return hits[0] > hits[1] or "goes on from its checkpoint" in logs


def struck(folder, command, victim, window):
    """Starts the command KILLS times in ``folder`` and stops it some time within ``window``
    seconds; how often it was still running.
    """
    folder.mkdir()
    done = 0
    for number in range(KILLS):
        process = start(folder, *command)
        earlier = set(folder.rglob("run.log"))
        until(
            lambda p=process, e=earlier: p.poll() is not None or set(folder.rglob("run.log")) - e,
            "no run begins",
        )
        if number == KILLS - 1:  # the last one finds something to resume, whenever it comes
            until(
                lambda p=process: p.poll() is not None or next(folder.rglob("meta.json"), None),
                "no stage ends",
            )
        time.sleep(random.SystemRandom().uniform(0, window))
        done += process.poll() is None and victim(process, folder)
    return done


@pytest.fixture
def strikes(tmp_path):
    """Runs a command to its end, then again elsewhere with kills on the way; returns both
    folders.
    """

    def call(command, victim, *, undisturbed=None):
        whole = tmp_path / "whole"
        whole.mkdir()
        process = start(whole, *(undisturbed or command))
        until(lambda: begun(whole), "no stage begins")
        since = time.monotonic()
        ended(process)
        length = time.monotonic() - since
        for attempt in range(
            6
        ):  # where all came too late, anew and sooner; the last one strikes at once
            broken = tmp_path / f"broken_{attempt}"
            window = 2 * length / (KILLS + 1) / 2**attempt if attempt < 5 else 0
            done = struck(broken, command, victim, window)
            print(
                f"{done} of {KILLS} kills struck within {window:.1f} s; undisturbed, the "
                f"stages take {length:.1f} s"
            )
            if done:
                break
        assert done
        ended(start(broken, *command))
        return whole, broken

    return call


def test_a_sweep_killed_at_random_points_gives_the_same_content(strikes):
    command = ["-m", *WORK, "seeds=[0,1]", "immunize=kappa,kappa_opt"]

    def all_of_it(process, _):
        kill(process)
        return True

    whole, broken = strikes(command, all_of_it)
    assert len(hashes(whole)) == 2
    assert hashes(broken) == hashes(whole)
    assert resumed(broken, whole), "nothing was resumed"


TOGETHER = """
import os, sys
from pathlib import Path
from hydra import compose, initialize_config_dir
import run
from lab.runner.experiment import run_once
with initialize_config_dir(str(run.ROOT / "conf"), version_base="1.3"):
    cfg = compose("config", overrides=sys.argv[1:])
children = []
for number in range(8):
    child = os.fork()  # the imports above are shared, so all eight begin together
    if child == 0:
        os._exit(0 if run_once(cfg, Path(f"outputs/runs/{number}")) else 1)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_eight_processes_on_one_cache_compute_every_stage_once(tmp_path):
    command = [sys.executable, "-c", TOGETHER, *WORK, "seeds=[0]", "immunize=kappa"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    found = found_records(tmp_path)
    assert len(found) == 8
    keys = {cell["key"] for cell in found[0]["cells"]}
    assert all({cell["key"] for cell in record["cells"]} == keys for record in found)
    assert sum(record["provenance"]["cache_misses"] for record in found) == len(keys)
    assert sum(record["provenance"]["cache_hits"] for record in found) == 7 * len(keys)
    assert len({record["content_hash"] for record in found}) == 1
