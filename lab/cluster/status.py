"""`action=status`: which runs are queued, running, done or failed.

Read from three sources: Slurm's queue where there is one, the locks that living processes hold on
their run folders, and the records. Nothing is written.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lab.core import record as records
from lab.core.errors import UserError
from lab.core.record import Record
from lab.runner.batch import LASTING, PROCESS, is_claimed
from lab.runner.experiment import relative

log = logging.getLogger(__name__)
DONE = ("ok", "diverged")  # a diverged immunization is a result
ORDER = ("queued", "running", *DONE, "failed", "preempted", "killed", "unknown", "unreadable")
CONTINUE = "the same command continues it"
CONFIG = ".hydra/config.yaml"  # Hydra writes it first


@dataclass(frozen=True)
class QueueEntry:
    """One line of ``squeue``: id, state (PENDING …), why it waits, its folder, its name."""

    job: str
    state: str
    reason: str
    place: Path
    name: str

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "SPECIAL_EXIT", "SUSPENDED") or "REQUEUE" in self.state

    def __str__(self) -> str:
        if not self.waits:
            return f"Slurm job {self.job} {self.name} begins"
        reason = "" if self.reason == "None" else f": {self.reason}"
        return f"Slurm job {self.job} {self.name} waits{reason}"


@dataclass(frozen=True)
class Line:
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
    folders = run_folders(places)
    lines = [state_of(folder, queue) for folder in folders]
    if not cfg.records:  # jobs that wait for their first turn; Slurm alone knows of them
        begun = {_process(folder).get("job") for folder in folders}
        waiting = [entry for job, entry in (queue or {}).items() if job not in begun]
        lines += [
            Line("queued" if entry.waits else "running", entry.place, None, str(entry))
            for entry in waiting
            if entry.place == Path.cwd()
        ]
    for line in sorted(lines, key=lambda line: (str(line.where), line.message)):
        print(line)
    print(summary(lines))
    unfinished = list(Path(cfg.paths.cache).rglob("*.ckpt"))
    if unfinished:
        print(f"{len(unfinished)} stages with a checkpoint to continue from")


def summary(lines: list[Line]) -> str:
    """``1 queued, 2 running, 3 done (2 ok, 1 diverged), 1 failed``."""
    counts = Counter(line.state for line in lines)
    done = ", ".join(f"{counts[state]} {state}" for state in DONE if counts[state])
    parts = [f"{counts[state]} {state}" for state in ORDER if counts[state] and state not in DONE]
    if done:
        before = sum(bool(counts[state]) for state in ("queued", "running"))
        parts.insert(before, f"{sum(counts[state] for state in DONE)} done ({done})")
    return ", ".join(parts) or "no runs"


def read_queue() -> dict[str, QueueEntry] | None:
    """Return this user's jobs that wait or run, by id; None without Slurm."""
    if shutil.which("squeue") is None:
        return None
    columns = "--format=%i|%T|%r|%Z|%j"
    command = ["squeue", "--noheader", "--array", columns, f"--user={os.getuid()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("squeue: %s", error)
        return None
    rows = [[part.strip() for part in line.split("|", 4)] for line in done.stdout.splitlines()]
    return {
        job: QueueEntry(job, state, reason, Path(place), name)
        for job, state, reason, place, name in rows
    }


def run_folders(places: Sequence[Path]) -> list[Path]:
    """Return the folders of runs below ``places``, begun or done."""
    paths = {path for place in places for path in place.rglob(CONFIG)}
    folders = {path.parents[1] for path in paths if _is_lasting(path)}
    names = ("record.json", PROCESS)
    return sorted(folders | {p.parent for place in places for n in names for p in place.rglob(n)})


def _is_lasting(path: Path) -> bool:
    """Return True for the config of a run; an action that only looks may leave a config, too."""
    cfg = OmegaConf.load(path)
    plan = cfg.get("dry_run", False)
    return not plan and cfg.get("action", "run") in LASTING


def _process(folder: Path) -> dict[str, Any]:
    """Return who worked in ``folder`` last (`lab.runner.batch.claim`), empty where unknown."""
    path = folder / PROCESS
    plain = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def state_of(folder: Path, queue: dict[str, QueueEntry] | None) -> Line:
    """Return the state of a run that has begun at least once."""
    process = _process(folder)
    entry = (queue or {}).get(str(process.get("job")))
    worker = f"Slurm job {entry.job}" if entry else f"process {process.get('pid')}"
    if is_claimed(folder):
        seconds = time.time() - float(process.get("started", time.time()))
        at = f"{worker} on {process.get('host')}; {last_stage(folder)}"
        return Line("running", folder, seconds, at)
    if entry is not None and entry.waits:
        return Line("queued", folder, None, f"{entry}; it will continue")
    try:
        path = folder / "record.json"
        record = records.read(path) if path.is_file() else None
    except UserError as error:
        return Line("unreadable", folder, None, f"record.json: {error.fix}")
    if entry is not None and (record is None or record["status"] == "preempted"):
        return Line("running", folder, None, str(entry))
    if record is not None:
        message = (record["error"] or {}).get("message", "")
        return Line(record["status"], folder, record["provenance"]["wall_time_s"], message)
    if process.get("ended"):  # a search, a training; or a failure before there was a record
        return Line(str(process["ended"]), folder, None, str(process.get("message") or ""))
    if process.get("job") and queue is None:
        message = f"Slurm job {process['job']} has left no record, and no Slurm answers here"
        return Line("unknown", folder, None, message)
    return Line("killed", folder, None, f"no record and no living process: {CONTINUE}")


def last_stage(folder: Path) -> str:
    """Return the stage that the run log names last, and its progress where the log has it."""
    path = folder / "run.log"
    if not path.is_file():
        return "begins"
    with open(path, "rb") as handle:
        handle.seek(max(0, path.stat().st_size - 20_000))
        text = handle.read().decode(errors="replace")
    _, marker, after = text.rpartition("lab.runner.experiment: stage ")
    if not marker:
        return "begins"
    lines = after.splitlines()
    progress = [line.partition("lab.core.progress: ")[2] for line in lines[1:]]
    return "; ".join([f"stage {lines[0]}", *[line for line in progress if line][-1:]])


def lost_runs(places: Sequence[Path]) -> list[Record]:
    """Return a stand-in for the record of every killed run: status ``failed``, no figures.

    Tables show them. The run's settings are those that Hydra noted; a run that was killed before
    is left out.
    """
    folders = run_folders([place for place in places if place.is_dir()])
    folders = [folder for folder in folders if not (folder / "record.json").is_file()]
    queue = read_queue() if folders else None
    killed = [folder for folder in folders if state_of(folder, queue).state == "killed"]
    return [record for record in map(_stand_in, killed) if record is not None]


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
        "notes": [],
        "content_hash": folder.name,
        "error": {"type": "Killed", "message": message, "key": None, "last_good_step": None},
    }
