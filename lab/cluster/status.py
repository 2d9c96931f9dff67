"""`action=status`: which runs are queued, running, done or failed.

Read from three sources: Slurm's queue where there is one, the locks that living processes hold on
their run folders, and the records. Nothing is written.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig

from lab.core import record as records
from lab.core.errors import UserError
from lab.runner.batch import PROCESS, is_claimed, relative

ORDER = (
    *("queued", "running", "ok", "diverged", "failed"),
    *("preempted", "killed", "unknown", "unreadable"),
)


class QueueEntry(NamedTuple):
    """One line of ``squeue``: id, state (PENDING …), why it waits, its folder, its name."""

    job: str
    state: str
    reason: str
    place: str
    name: str

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "SPECIAL_EXIT", "SUSPENDED") or "REQUEUE" in self.state

    def __str__(self) -> str:
        what = f"waits: {self.reason}" if self.waits else "begins"
        return f"Slurm job {self.job} {self.name} {what}"


State = tuple[str, float | None, str]  # name, seconds so far, message


def status(cfg: DictConfig) -> None:
    """Print one line per run or job below ``records`` (default: ``paths.runs``) and their counts.

    Raises:
        UserError: a place that does not exist.
    """
    named = [Path(place) for place in cfg.records or [cfg.paths.runs]]
    places = [place.parent if place.is_file() else place for place in named]
    for place in places:
        if not place.is_dir():
            raise UserError("records", place, "does not exist: nothing was run there yet.")
    queue = read_queue()
    processes = {folder: read_process(folder) for folder in run_folders(places)}
    rows = [(folder, *state_of(folder, process, queue)) for folder, process in processes.items()]
    begun = {process.get("job") for process in processes.values()}
    rows += [  # jobs of this working directory before their first turn
        (Path.cwd(), "queued" if entry.waits else "running", None, str(entry))
        for job, entry in (queue or {}).items()
        if job not in begun and entry.place == str(Path.cwd())
    ]
    for folder, state, seconds, message in sorted(rows, key=lambda row: (str(row[0]), row[3])):
        took = "" if seconds is None else f"{seconds:.0f} s"
        text = " ".join(message.split())[:100]
        print(f"{state:<10} {took:>7}  {relative(folder)}  {text}".rstrip())
    counts = Counter(row[1] for row in rows)
    print(", ".join(f"{counts[s]} {s}" for s in ORDER if counts[s]) or "no runs")
    if unfinished := len(list(Path(cfg.paths.cache).rglob("*.ckpt"))):
        print(f"{unfinished} stages with a checkpoint to continue from")


def read_queue() -> dict[str, QueueEntry] | None:
    """Return this user's jobs that wait or run, by id; None where no Slurm answers."""
    columns = "--format=%i|%T|%r|%Z|%j"
    command = ["squeue", "--noheader", "--array", columns, f"--user={os.getuid()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[part.strip() for part in line.split("|", 4)] for line in done.stdout.splitlines()]
    return {row[0]: QueueEntry(*row) for row in rows}


def run_folders(places: Sequence[Path]) -> list[Path]:
    """Return the folders of runs below ``places``, begun or done."""
    names = ("record.json", PROCESS, ".hydra/config.yaml")  # Hydra writes its config first
    paths = {path for place in places for name in names for path in place.rglob(name)}
    folders = {path.parents[1] if path.parent.name == ".hydra" else path.parent for path in paths}
    return sorted(folders)


def read_process(folder: Path) -> dict[str, Any]:
    """Return who worked in ``folder`` last (`lab.runner.batch.claim`), empty where unknown."""
    path = folder / PROCESS
    return yaml.safe_load(path.read_text()) or {} if path.is_file() else {}


def state_of(folder: Path, process: dict[str, Any], queue: dict[str, QueueEntry] | None) -> State:
    """Return the state of a run that has begun at least once."""
    entry = (queue or {}).get(str(process.get("job")))
    if is_claimed(folder):
        seconds = time.time() - float(process.get("started", time.time()))
        worker = f"Slurm job {entry.job}" if entry else f"process {process.get('pid')}"
        return "running", seconds, f"{worker} on {process.get('host')}; {last_stage(folder)}"
    if entry is not None and entry.waits:
        return "queued", None, f"{entry}; it will continue"
    path = folder / "record.json"
    try:
        record = records.read(path) if path.is_file() else None
    except UserError as error:
        return "unreadable", None, f"record.json: {error.fix}"
    if entry is not None and (record is None or record["status"] == "preempted"):
        return "running", None, str(entry)
    if record is not None:
        message = (record["error"] or {}).get("message", "")
        return record["status"], record["provenance"]["wall_time_s"], message
    if process.get("ended"):  # a search, a training; or a failure before there was a record
        return str(process["ended"]), None, str(process.get("message") or "")
    if process.get("job") and queue is None:
        return "unknown", None, f"Slurm job {process['job']} left no record, and no Slurm answers"
    return "killed", None, "no record and no living process: the same command continues it"


def last_stage(folder: Path) -> str:
    """Return the last message of the run log: the stage, or its progress once a minute."""
    path = folder / "run.log"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return lines[-1].partition(": ")[2] if lines else "begins"
