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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lab.core import record as records
from lab.core.errors import UserError
from lab.core.record import Record
from lab.runner.batch import PROCESS, is_claimed
from lab.runner.experiment import relative

ORDER = (
    *("queued", "running", "ok", "diverged", "failed"),
    *("preempted", "killed", "unknown", "unreadable"),
)
CONTINUE = "the same command continues it"
CONFIG = ".hydra/config.yaml"


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


@dataclass(frozen=True)
class QueueLine:
    """The state of one run folder, or of a job that has none yet."""

    state: str
    where: Path
    seconds: float | None = None
    message: str = ""

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f"{self.seconds:.0f} s"
        message = " ".join(self.message.split())[:100]
        return f"{self.state:<10} {seconds:>7}  {relative(self.where)}  {message}".rstrip()


def status(cfg: DictConfig) -> None:
    """Print one line per run or job below ``records`` (default: ``paths.runs``) and their counts.

    Raises:
        UserError: a place that does not exist.
    """
    key = "records" if cfg.records else "paths.runs"
    named = [Path(place) for place in cfg.records or [cfg.paths.runs]]
    places = [place.parent if place.is_file() else place for place in named]
    for place in places:
        if not place.is_dir():
            raise UserError(key, place, "does not exist: nothing was run there yet.")
    queue = read_queue()
    processes = {folder: read_process(folder) for folder in run_folders(places)}
    lines = [state_of(folder, process, queue) for folder, process in processes.items()]
    begun = {process.get("job") for process in processes.values()}
    lines += [  # jobs of this working directory before their first turn
        QueueLine("queued" if entry.waits else "running", Path.cwd(), None, str(entry))
        for job, entry in (queue or {}).items()
        if job not in begun and entry.place == str(Path.cwd())
    ]
    for line in sorted(lines, key=lambda line: (str(line.where), line.message)):
        print(line)
    counts = Counter(line.state for line in lines)
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
    names = ("record.json", PROCESS, CONFIG)  # Hydra writes its config first
    paths = {path for place in places for name in names for path in place.rglob(name)}
    folders = {path.parents[1] if path.parent.name == ".hydra" else path.parent for path in paths}
    return sorted(folders)


def read_process(folder: Path) -> dict[str, Any]:
    """Return who worked in ``folder`` last (`lab.runner.batch.claim`), empty where unknown."""
    path = folder / PROCESS
    return yaml.safe_load(path.read_text()) or {} if path.is_file() else {}


def state_of(
    folder: Path, process: dict[str, Any], queue: dict[str, QueueEntry] | None
) -> QueueLine:
    """Return the state of a run that has begun at least once."""
    entry = (queue or {}).get(str(process.get("job")))
    worker = f"Slurm job {entry.job}" if entry else f"process {process.get('pid')}"
    if is_claimed(folder):
        seconds = time.time() - float(process.get("started", time.time()))
        at = f"{worker} on {process.get('host')}; {last_stage(folder)}"
        return QueueLine("running", folder, seconds, at)
    if entry is not None and entry.waits:
        return QueueLine("queued", folder, None, f"{entry}; it will continue")
    try:
        path = folder / "record.json"
        record = records.read(path) if path.is_file() else None
    except UserError as error:
        return QueueLine("unreadable", folder, None, f"record.json: {error.fix}")
    if entry is not None and (record is None or record["status"] == "preempted"):
        return QueueLine("running", folder, None, str(entry))
    if record is not None:
        message = (record["error"] or {}).get("message", "")
        return QueueLine(record["status"], folder, record["provenance"]["wall_time_s"], message)
    if process.get("ended"):  # a search, a training; or a failure before there was a record
        return QueueLine(str(process["ended"]), folder, None, str(process.get("message") or ""))
    if process.get("job") and queue is None:
        message = f"Slurm job {process['job']} has left no record, and no Slurm answers here"
        return QueueLine("unknown", folder, None, message)
    return QueueLine("killed", folder, None, f"no record and no living process: {CONTINUE}")


def last_stage(folder: Path) -> str:
    """Return the last message of the run log: the stage, or its progress once a minute."""
    path = folder / "run.log"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return lines[-1].partition(": ")[2] if lines else "begins"


def lost_runs(places: Sequence[Path]) -> list[Record]:
    """Return a stand-in for the record of every killed run: status ``failed``, no figures.

    Tables show them. The run's settings are those that Hydra noted; a run that was killed before
    is left out.
    """
    folders = run_folders([place for place in places if place.is_dir()])
    folders = [folder for folder in folders if not (folder / "record.json").is_file()]
    queue = read_queue() if folders else None
    lines = [state_of(folder, read_process(folder), queue) for folder in folders]
    stand_ins = [_stand_in(line.where) for line in lines if line.state == "killed"]
    return [record for record in stand_ins if record is not None]


def _stand_in(folder: Path) -> Record | None:
    try:
        cfg = OmegaConf.load(folder / CONFIG)
        config = OmegaConf.to_container(cfg, resolve=True)
    except (OSError, OmegaConfBaseException):
        return None
    if not isinstance(config, dict) or config.get("action", "run") != "run":
        return None
    seeds = cfg.seeds if OmegaConf.is_list(cfg.seeds) else [cfg.seeds]
    message = f"left no record; {CONTINUE}"
    return {
        "name": f"{cfg.name}/{cfg.immunize.name}",
        "status": "failed",
        "scenario": str(cfg.scenario.name),
        "backbone": str(cfg.backbone.name),
        "immunizer": str(cfg.immunize.name),
        "attacks": list(cfg.attacks),
        "seeds": list(seeds),
        "config": records.clean(config),
        "metrics": {},
        "tables": {},
        "notes": [],
        "content_hash": folder.name,
        "error": {"type": "Killed", "message": message, "key": None, "last_good_step": None},
    }
