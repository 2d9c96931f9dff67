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
LIMIT = 0.6  # the promise of the project's issue on scale-out


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


def stages(folder: Path) -> tuple[set[str], set[str], int]:
    """Keys of immunizations and attacks below ``folder``, those of evaluations, and how many stages
    were computed.
    """
    records = [json.loads(path.read_text()) for path in folder.rglob("record.json")]
    assert all(record["status"] == "ok" for record in records), [
        record["error"] for record in records
    ]
    cells = [cell for record in records for cell in record["cells"]]
    trained, scored = (
        {c["key"] for c in cells if (c["stage"] == "eval") is last} for last in (False, True)
    )
    return trained, scored, sum(record["provenance"]["cache_misses"] for record in records)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="[0,1,2]", help="the experiment's own by default")
    seeds = f"seeds={parser.parse_args().seeds}"
    pairs = [(immunizer, attacker) for attacker in ATTACKERS for immunizer in IMMUNIZERS]
    spent: dict[str, list[tuple[float, float]]] = {"separate": [], "sweep": []}
    with tempfile.TemporaryDirectory() as root:
        together = Path(root, "sweep")
        together.mkdir()
        for i, (immunizer, attacker) in enumerate(pairs):
            if i == len(pairs) // 2:
                chosen = [
                    f"immunize={','.join(IMMUNIZERS)}",
                    f"attacks=[{','.join(ATTACKERS)}]",
                    seeds,
                ]
                spent["sweep"].append(timed(["-m", *chosen], together))
            alone = Path(root, "separate", f"{immunizer}-{attacker}")
            alone.mkdir(parents=True)
            spent["separate"].append(
                timed([f"immunize={immunizer}", f"attacks=[{attacker}]", seeds], alone)
            )
            print(
                f"{i + 1} of {len(pairs)}: {spent['separate'][-1][0]:.1f} s CPU",
                file=sys.stderr,
                flush=True,
            )
        trained, scored, computed = stages(together)
        separately, _, separate_computed = stages(Path(root, "separate"))
    cpu, wall = ({name: sum(t[k] for t in times) for name, times in spent.items()} for k in (0, 1))
    ratio = cpu["sweep"] / cpu["separate"]
    sound = computed == len(trained) + len(scored) and trained == separately
    print(
        f"sweep: {cpu['sweep']:.0f} s CPU, {wall['sweep']:.0f} s wall, {computed} stages computed"
    )
    print(
        f"separate: {cpu['separate']:.0f} s CPU, {wall['separate']:.0f} s wall, "
        f"{separate_computed} stages computed"
    )
    print(f"ratio: {ratio:.2f} CPU, {wall['sweep'] / wall['separate']:.2f} wall; at most {LIMIT}")
    if not sound:
        print("the sweep computed a stage twice, or others than the separate runs", file=sys.stderr)
    return 0 if ratio <= LIMIT and sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
