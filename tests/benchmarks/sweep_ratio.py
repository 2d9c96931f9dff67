"""Cost of one sweep against separate runs: ``python tests/benchmarks/sweep_ratio.py``.

Six immunizers × four attackers on house prices: once as a multirun of six runs with four attackers
each, and as 24 commands of one immunizer and one attacker, each with a cache of its own, as
somebody would have without a shared one. CPU seconds of the commands and all that they start
(imports included) are compared, since they hardly depend on what else the machine does; wall
seconds are printed too. The multirun stands in the middle of the separate commands, so that a load
that grows or falls meets both.

Exits with code 1 if the ratio of CPU seconds is above 0.6, or the multirun computed a stage twice
or another one than the separate runs did.
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
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMMUNIZERS = (
    "kappa",
    "kappa_well_only",
    "kappa_opt",
    "kappa_imma",
    "kappa_closed_form",
    "kappa_pencil",
)
ATTACKERS = ("linear_probe", "probe_momentum", "probe_adam", "probe_ridge")
LIMIT = 0.6


def timed(arguments: Sequence[str], folder: Path) -> tuple[float, float]:
    """CPU and wall seconds of one command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        *arguments,  # a flag has to come before all overrides
        "experiment=house_price",
        "tracker=none",
        f"paths.outputs={folder}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def stages(folder: Path) -> tuple[set[str], int]:
    """Keys of immunizations and attacks below ``folder``, and how many stages were computed twice."""
    records = [json.loads(path.read_text()) for path in folder.rglob("record.json")]
    cells = [cell for record in records for cell in record["cells"]]
    computed = sum(record["provenance"]["cache_misses"] for record in records)
    trained = {cell["key"] for cell in cells if cell["stage"] != "eval"}
    return trained, computed - len({cell["key"] for cell in cells})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="[0,1,2]", help="the experiment's own by default")
    parser.add_argument("--immunizers", type=int, default=len(IMMUNIZERS), help="the first so many")
    options = parser.parse_args()
    seeds, immunizers = f"seeds={options.seeds}", IMMUNIZERS[: options.immunizers]
    sweep = [f"immunize={','.join(immunizers)}", f"attacks=[{','.join(ATTACKERS)}]", seeds]
    pairs = [(immunizer, attacker) for attacker in ATTACKERS for immunizer in immunizers]
    separate: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as root:
        together = Path(root, "sweep")
        together.mkdir()
        for i, (immunizer, attacker) in enumerate(pairs):
            if i == len(pairs) // 2:
                sweep_cpu, sweep_wall = timed(["-m", *sweep], together)
            alone = Path(root, "separate", f"{immunizer}-{attacker}")
            alone.mkdir(parents=True)
            separate.append(timed([f"immunize={immunizer}", f"attacks=[{attacker}]", seeds], alone))
        trained, twice = stages(together)
        separately, _ = stages(Path(root, "separate"))
    cpu, wall = (sum(column) for column in zip(*separate, strict=True))
    ratio = sweep_cpu / cpu
    print(f"sweep: {sweep_cpu:.0f} s CPU, {sweep_wall:.0f} s wall, {twice} stages computed twice")
    print(f"separate: {cpu:.0f} s CPU, {wall:.0f} s wall")
    print(f"ratio: {ratio:.2f} CPU, {sweep_wall / wall:.2f} wall; at most {LIMIT}")
    print(f"immunizations and attacks: {'equal' if trained == separately else 'DIFFERENT'}")
    return 0 if ratio <= LIMIT and not twice and trained == separately else 1


if __name__ == "__main__":
    raise SystemExit(main())
