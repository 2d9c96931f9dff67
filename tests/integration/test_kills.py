"""kill -9 at random points and many processes on one cache: nothing is lost, nothing is computed
twice.

KILLS=N in the environment says how often each test strikes. A Slurm job that is killed:
test_slurm.py.
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


def test_a_sweep_killed_at_random_points_gives_the_same_content(tmp_path):
    command = ["-m", *WORK, "seeds=[0,1]", "immunize=kappa,kappa_opt"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    ended(start(whole, *command))
    killed = 0
    for _ in range(KILLS):
        process, before = start(broken, *command), stages(broken)
        until(
            lambda p=process, b=before: p.poll() is not None or stages(broken) - b, "no stage ends"
        )
        time.sleep(random.SystemRandom().uniform(0, 1))
        killed += process.poll() is None
        kill(process)
    assert killed, "every sweep came to its end"
    ended(start(broken, *command))
    assert (len(hashes(whole)), hashes(broken)) == (2, hashes(whole))
    hits = [
        sum(r["provenance"]["cache_hits"] for r in found_records(folder)[-2:])
        for folder in (broken, whole)
    ]
    assert hits[0] > hits[1], "nothing was resumed"


def stages(folder):
    """Artifacts of finished stages."""
    return set(folder.rglob("meta.json"))


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
    keys = {stage["key"] for stage in found[0]["stages"]}
    assert all({stage["key"] for stage in record["stages"]} == keys for record in found)
    assert sum(record["provenance"]["cache_misses"] for record in found) == len(keys)
    assert sum(record["provenance"]["cache_hits"] for record in found) == 7 * len(keys)
    assert len({record["content_hash"] for record in found}) == 1
