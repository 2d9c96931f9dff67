"""Time of a table of 6 immunizers × 4 attackers on 1 and on 2 processes: ``python
tests/benchmarks/launch_scaling.py``.

The sweep runs by `run.py` on the house prices, each time into an empty cache, with one thread per
process:

- 1 process: ``launch=none threads=1``;
- 2 processes: ``launch=cpu launch.num_processes=2 threads=1``, which `accelerate launch` starts
anew for every run.

Three times and their ratios: of the whole command, of the runs without the start of their processes
(the records' ``wall_time_s``), and of the processor. The first of them is what a user waits for,
and grows towards the second with the length of the runs. Wall time means something on idle cores
only; the load before each part is printed.

Exits with code 1 if the records of the two parts differ, or if the runs' ratio is below
``--at_least`` where given.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMMUNIZERS = (
    "kappa",
    "kappa_closed_form",
    "kappa_pencil",
    "kappa_ill_only",
    "kappa_well_only",
    "kappa_imma",
)
ATTACKS = ("linear_probe", "probe_adam", "probe_momentum", "probe_sgd")
PARTS = {1: ["launch=none"], 2: ["launch=cpu", "launch.num_processes=2"]}


def table(folder: Path, launch: list[str], seeds: int) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of one part (``command``, ``runs``, ``processor``), and content hashes."""
    choices = [
        f"immunize={','.join(IMMUNIZERS)}",
        f"attacks=[{','.join(ATTACKS)}]",
        f"seeds={list(range(seeds))}",
    ]
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "-m",
        "experiment=house_price",
        *choices,
        "tracker=none",
        "threads=1",
        *launch,
    ]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, check=True, env=env, stdout=subprocess.DEVNULL)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    records = [json.loads(path.read_text()) for path in folder.rglob("record.json")]
    runs = sum(record["provenance"]["wall_time_s"] for record in records)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    hashes = {record["immunizer"]: record["content_hash"] for record in records}
    return {"command": wall, "runs": runs, "processor": processor}, hashes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--at_least",
        type=float,
        default=0.0,
        help="smallest ratio of the runs' time, for idle cores",
    )
    options = parser.parse_args()
    hashes, times = {}, {}
    for size, launch in PARTS.items():
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            times[size], hashes[size] = table(Path(folder), launch, options.seeds)
        told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times[size].items())
        print(
            f"{size} process{'es' if size > 1 else ''}: {told} (load before: {load:.1f})",
            flush=True,
        )
    ratios = {name: times[1][name] / times[2][name] for name in times[1]}
    print(
        "1 process / 2 processes: "
        + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    )
    same = hashes[1] == hashes[2] and set(hashes[1]) == set(IMMUNIZERS)
    print(f"content hashes of {len(hashes[1])} records: {'equal' if same else 'DIFFERENT'}")
    return 0 if same and ratios["runs"] >= options.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
