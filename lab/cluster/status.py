"""What `action=status` tells: which runs are queued, running, done or failed.

Told from three sources: Slurm's queue where there is one, the locks that living processes hold on
their run folders, and the records. Nothing is written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lab.core import record as records
from lab.core.errors import UserError
from lab.runner.batch import LASTING, PROCESS, QueueEntry, is_claimed, squeue
from lab.runner.experiment import relative

DONE = ("ok", "diverged")  # a diverged immunization is a result
ORDER = ("queued", "running", *DONE, "failed", "preempted", "killed", "unknown", "unreadable")
CONTINUE, NO_SLURM = "the same command continues it", "no Slurm answers here"
HYDRA = ".hydra"
MARKS = (
    "record.json",
    "run.log",
    PROCESS,
    f"{HYDRA}/config.yaml",
)  # the last one is there from the first second on

Queue = dict[str, QueueEntry]


@dataclass(frozen=True)
class Line:
    """One line of the answer. ``where``: a run folder, or the folder of a sweep for a job that has
    not begun.
    """

    state: str
    where: Path
    seconds: float | None = None
    told: str = ""

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f"{self.seconds:.0f} s"
        return (
            f"{self.state:<10} {seconds:>7}  {relative(self.where)}  "
            f"{' '.join(self.told.split())[:100]}"
        ).rstrip()


def status(cfg: DictConfig) -> None:
    """Print one line per run or job below ``records`` (default: ``paths.runs``) and their numbers.

    Raises:
        UserError: a place that does not exist.
    """
    given = [cfg.records] if isinstance(cfg.records, str) else [str(place) for place in cfg.records]
    named = [Path(place) for place in given]  # a record stands for its run folder
    places = [place.parent if place.is_file() else place for place in named] or [
        Path(cfg.paths.runs)
    ]
    for place in places:
        if not place.is_dir():
            raise UserError(
                "records" if given else "paths.runs",
                place,
                "does not exist: nothing was run there yet.",
            )
    runs = run_folders(places)
    processes = {folder: _process(folder) for folder in runs}
    jobs = _jobs(places)
    queue = _queue(processes.values(), jobs)
    lines = [_run(folder, processes[folder], queue) for folder in runs]
    begun = {str(process.get("job")) for process in processes.values()}
    lines += [_job(name, jobs[name], queue) for name in sorted(jobs) if name not in begun]
    if not given:  # jobs of hand-written scripts that wait: Slurm alone knows of them
        here = Path.cwd()
        rest = {
            k: e
            for k, e in (queue or {}).items()
            if e.waits and e.place == here and k not in begun | set(jobs)
        }
        lines += [Line("queued", here, None, _waiting(k, e)) for k, e in sorted(rest.items())]
    for line in sorted(lines, key=lambda one: (str(one.where), one.told)):
        print(line)
    print(summary(lines))
    unfinished = list(Path(cfg.paths.cache).rglob("*.ckpt"))
    if unfinished:
        print(f"{len(unfinished)} stages with a checkpoint to continue from")


def summary(lines: list[Line]) -> str:
    """``1 queued, 2 running, 3 done (2 ok, 1 diverged), 1 failed``."""
    counts = Counter(line.state for line in lines)
    done = ", ".join(f"{counts[state]} {state}" for state in DONE if counts[state])
    parts = []
    for state in ORDER:
        if state == DONE[0] and done:
            parts.append(f"{sum(counts[s] for s in DONE)} done ({done})")
        elif state not in DONE and counts[state]:
            parts.append(f"{counts[state]} {state}")
    return ", ".join(parts) or "no runs"


def lines_of(folders: Sequence[Path]) -> list[Line]:
    """The state of each run folder."""
    processes = [_process(folder) for folder in folders]
    queue = _queue(processes)
    return [
        _run(folder, process, queue) for folder, process in zip(folders, processes, strict=True)
    ]


def _queue(processes: Iterable[dict[str, Any]], jobs: Iterable[str] = ()) -> Queue | None:
    return squeue([*jobs, *(str(p["job"]) for p in processes if p.get("job"))])


def run_folders(places: Sequence[Path]) -> list[Path]:
    """Folders of runs below ``places``, begun or done."""
    found = {path for place in places for name in MARKS for path in place.rglob(name)}
    return sorted(
        filter(_is_run, {p.parent.parent if p.parent.name == HYDRA else p.parent for p in found})
    )


def _is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a lasting action; every other call leaves a folder with its
    config, too.
    """
    config = folder / HYDRA / "config.yaml"
    if (folder / "record.json").is_file() or is_claimed(folder) or not config.is_file():
        return True
    cfg = OmegaConf.load(config)
    if not isinstance(cfg, DictConfig) or cfg.get("dry_run", False):
        return False
    return cfg.get("action", "run") in LASTING


def _process(folder: Path) -> dict[str, Any]:
    """Who worked in ``folder`` last: ``host pid started job``; empty when that was never
    written.
    """
    path = folder / PROCESS
    if not path.is_file():
        return {}
    plain = OmegaConf.to_container(OmegaConf.load(path))
    return {str(k): v for k, v in plain.items()} if isinstance(plain, dict) else {}


def _jobs(places: list[Path]) -> dict[str, Path]:
    """Ids of the jobs that submitit handed in to Slurm, and the folders where it keeps their
    files.
    """
    found = {}
    for script in (path for place in places for path in place.rglob(".submitit/*/*_submission.sh")):
        base = script.name.removesuffix("_submission.sh")
        for path in script.parent.parent.glob(f"{base}*/*_submitted.pkl"):
            found[path.name.removesuffix("_submitted.pkl")] = path.parent
    return found


def _waiting(name: str, entry: QueueEntry) -> str:
    return f"Slurm job {name} {entry.name} waits{f': {entry.reason}' if entry.reason else ''}"


def _run(folder: Path, process: dict[str, Any], queue: Queue | None) -> Line:
    """The state of a run that has begun at least once."""
    name = process.get("job")
    entry = (queue or {}).get(str(name))
    at = f"Slurm job {name}" if entry else f"process {process.get('pid')}"
    running = f"{at} on {process.get('host')}; {_last_stage(folder)}"
    since = time.time() - float(process.get("started", time.time()))
    if is_claimed(folder):
        return Line("running", folder, since, running)
    if entry is not None and entry.waits:
        return Line("queued", folder, None, f"{_waiting(str(name), entry)}; it will continue")
    try:
        record = (
            records.read(folder / "record.json") if (folder / "record.json").is_file() else None
        )
    except UserError as error:
        return Line("unreadable", folder, None, f"record.json: {error.fix}")
    if entry is not None and entry.runs and (record is None or record["status"] == "preempted"):
        return Line("running", folder, None, f"{at} begins")
    if record is not None:
        seconds, message = (
            record["provenance"]["wall_time_s"],
            (record["error"] or {}).get("message", ""),
        )
        return Line(record["status"], folder, seconds, message)
    if process.get("ended"):  # a search, a training; or what failed before it could have a record
        return Line(str(process["ended"]), folder, None, str(process.get("told") or ""))
    if name and queue is None:
        return Line("unknown", folder, None, f"Slurm job {name} has left no record, and {NO_SLURM}")
    return Line("killed", folder, None, f"no record and no living process: {CONTINUE}")


def _job(name: str, folder: Path, queue: Queue | None) -> Line:
    """The state of a submitted job that has no run folder yet."""
    sweep = folder.parent.parent
    if queue is None:
        return Line("unknown", sweep, None, f"Slurm job {name} has not worked yet, and {NO_SLURM}")
    entry = queue.get(name)
    if entry is None:
        return Line(
            "killed", sweep, None, f"Slurm job {name} ended before it began: see {relative(folder)}"
        )
    if entry.waits:
        return Line("queued", sweep, None, _waiting(name, entry))
    return Line("running", sweep, None, f"Slurm job {name} begins")


def _last_stage(folder: Path) -> str:
    """The stage that the run log names last, and how far it is where that was told."""
    path = folder / "run.log"
    if not path.is_file():
        return "begins"
    with open(path, "rb") as handle:
        handle.seek(max(0, path.stat().st_size - 20_000))
        lines = handle.read().decode(errors="replace").splitlines()
    stage = told = ""
    for line in lines:
        if "lab.runner.experiment: stage " in line:
            told = line.partition("lab.runner.experiment: ")[2]
            stage = told
        elif told and "lab.core.progress: " in line:
            told = f"{stage}; {line.partition('lab.core.progress: ')[2]}"
    return told or "begins"
