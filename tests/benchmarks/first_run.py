"""Time of the default study and what it must give: ``python tests/benchmarks/first_run.py``.

`python run.py tracker=none` with outputs of its own, as the first command of somebody who has just
installed the project, start-up included; arguments are further overrides. Printed are the load before, the wall time and its ratio
to 300 s, then each check: the run ends with the verdict and the path of its record, beside which lie
the report and grids of images. Protection (`msgr_clip`) lies above 0 with its whole interval within
the seed. Wall time means something on idle cores only.

Exits with code 1 if a check fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.report.outcomes import outcome

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300.0  # seconds on two idle cores


def check(path: Path, out: str) -> dict[str, bool]:
    """Check a record, the files that it names, and what its run has printed."""
    record: dict[str, Any] = json.loads(path.read_text())
    protection = record["metrics"]["msgr_clip"]
    grids = [(path.parent / grid["path"], grid["sha256"]) for grid in record["images"].values()]
    headline = " ".join(outcome(record).headline.split())
    return {
        "status ok": record["status"] == "ok",
        "verdict has a value": record["metrics"]["verdict"]["value"] in (0, 1),
        "verdict in words": headline in " ".join(out.split()),
        "last line names the record": str(path).endswith(out.split()[-1]),
        "report.html beside the record": (path.parent / "report.html").is_file(),
        f"msgr_clip.low > 0 ({protection['low']})": (protection["low"] or 0) > 0,
        "its interval is within_seed": protection["interval"] == "within_seed",
        f"image grids as recorded ({len(grids)})": bool(grids)
        and all(hashlib.sha256(f.read_bytes()).hexdigest() == digest for f, digest in grids),
    }


def main() -> int:
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        words = ["tracker=none", f"paths.outputs={folder}/outputs", *sys.argv[1:]]
        command = [sys.executable, str(ROOT / "run.py"), *words]
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        wall = time.monotonic() - began
        (path,) = Path(folder).rglob("record.json")
        checks = {f"under {LIMIT:.0f} s": wall < LIMIT, **check(path, done.stdout)}
    print(done.stdout, f"{wall:.1f} s, {wall / LIMIT:.2f} of {LIMIT:.0f} s", sep="\n")
    for name, passed in checks.items():
        print("ok    " if passed else "FAILED", name)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
