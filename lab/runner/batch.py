"""A run as a job of a batch system: signals that end it, who works in a run folder, what Slurm says
of its queue.
"""

from __future__ import annotations

import atexit
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from lab.core.errors import UserError
from lab.core.options import flag

log = logging.getLogger(__name__)

# SIGTERM: a job is cancelled or preempted. SIGUSR1, SIGUSR2: what submitit and hand-written scripts
# ask Slurm to send some time before the limit.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_INTERRUPTED = 130
LOCK, PROCESS = "run.lock", "process.yaml"
PATIENCE = (
    60.0  # seconds; a job that Slurm starts again may meet its predecessor writing its record
)
LASTING = ("run", "train", "audit", "search")  # actions that take minutes to days


def executor() -> str | None:
    """``slurm`` or ``local`` inside a job of submitit, else None."""
    return os.environ.get("SUBMITIT_EXECUTOR")


@contextmanager
def interruptible(job: bool = False) -> Iterator[None]:
    """Within, the first of `SIGNALS` raises KeyboardInterrupt, so that a record gets written; later
    ones are ignored.

    Args:
        job: this is the outermost function of a job. Where submitit runs it, SIGUSR1 and SIGUSR2
            then do what submitit has them for: the job goes back to the queue (unless it ran out of
            time more than ``max_num_timeout`` times) and the process ends. After SIGTERM Slurm does
            that itself where it preempts the job.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        if not received:
            received.append(number)
            raise KeyboardInterrupt(signal.Signals(number).name)

    def swallowed(event: Any) -> None:
        """Python drops what is raised in a callback of the garbage collector; the signal comes
        again, then.
        """
        if not isinstance(event.exc_value, KeyboardInterrupt):
            return hook(event)
        number = received.pop() if received else signal.SIGINT
        again = threading.Timer(0.1, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    hook, sys.unraisablehook = sys.unraisablehook, swallowed
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        if not job or executor() is None:
            raise
        if received and received[0] != signal.SIGTERM:
            for number in (
                signal.SIGUSR2,
                signal.SIGUSR1,
            ):  # submitit listens to one of them, USR2 by default
                requeue = before[number]
                if callable(requeue):
                    requeue(
                        received[0], None
                    )  # does not return: SystemExit, or an error that says why not
        sys.exit(EXIT_INTERRUPTED)
    finally:
        sys.unraisablehook = hook
        if (
            not received
        ):  # else the process is about to end, and a repeated signal must not end it otherwise
            for number, handler in before.items():
                signal.signal(number, handler)


def fail_job(code: int) -> None:
    """Let a Slurm job of submitit end with ``code`` though its function returned: Slurm then shows
    it as failed.

    An exception would do that too, but the command that waits for the sweep would stop at it and
    leave the others.
    """
    if executor() == "slurm":

        def leave() -> None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        atexit.register(leave)


@contextmanager
def claimed(folder: Path, action: str, dry_run: bool) -> Iterator[None]:
    """Hold ``folder``'s lock and write who we are and how it ended, for `lab.cluster.status`.

    The kernel frees the lock when the process dies.

    Does nothing for what is over at once, and on ranks other than the first, which answers for all
    of a run, as does the first of several machines (`run.py`).

    Raises:
        UserError: another process holds the folder and does not end within `PATIENCE`; two would
            write one record. ``dry_run`` is neither true nor false.
    """
    flag("dry_run", dry_run)
    if action not in LASTING or dry_run or os.environ.get("RANK", "0") != "0":
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=2)  # `action=status` may look at it just now
    except Timeout:
        log.warning(
            "another process is at work in %s; waiting for its end, %g s at most", folder, PATIENCE
        )
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            told = "another process is at work in it: wait for its end, or choose another folder."
            raise UserError("hydra.run.dir", folder, told) from error
    try:
        identity = {
            "host": platform.node(),
            "pid": os.getpid(),
            "started": time.time(),
            "job": job_id(),
        }
        _write(folder, identity)
        try:
            yield
        except BaseException as error:
            ended = "failed" if isinstance(error, Exception) else "preempted"
            _write(folder, identity | {"ended": ended, "told": " ".join(str(error).split())[:200]})
            raise
        _write(folder, identity | {"ended": "ok"})
    finally:
        lock.release()


def _write(folder: Path, process: dict[str, Any]) -> None:
    try:
        (folder / PROCESS).write_text(OmegaConf.to_yaml(OmegaConf.create(process)))
    except OSError as error:  # a full disk: the run's own message matters more
        log.warning("%s: %s", folder / PROCESS, error)


def job_id() -> str | None:
    """Id of the Slurm job that this process belongs to, as ``squeue`` has it: ``12``, or ``12_3``
    in an array.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def is_claimed(folder: Path) -> bool:
    """Whether a living process holds ``folder``'s lock; False where that cannot be seen."""
    path = folder / LOCK
    if not path.is_file():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except (
        OSError
    ):  # someone else's folder: the lock cannot be opened, so neither can we have an answer
        return False
    lock.release()
    return False


@dataclass(frozen=True)
class QueueEntry:
    """One line of ``squeue``. ``state``: PENDING, RUNNING …; ``reason``: why it waits; ``place``:
    working directory.
    """

    state: str
    reason: str
    place: Path
    name: str

    @property
    def waits(self) -> bool:
        return self.state in (
            "PENDING",
            "REQUEUED",
            "REQUEUE_FED",
            "REQUEUE_HOLD",
            "SPECIAL_EXIT",
            "SUSPENDED",
        )

    @property
    def runs(self) -> bool:
        return self.state in ("RUNNING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "COMPLETING")


def squeue(ids: Iterable[str] = ()) -> dict[str, QueueEntry] | None:
    """Jobs of this user, and those with ``ids``, that wait or run, by id. None without Slurm or
    where it is silent.
    """
    if shutil.which("squeue") is None:
        return None
    base = sorted({one.partition("_")[0] for one in ids})
    found: dict[str, QueueEntry] = {}
    answered = False
    for choice in (
        ([f"--user={os.getuid()}"], [f"--jobs={','.join(base)}"])
        if base
        else ([f"--user={os.getuid()}"],)
    ):
        command = ["squeue", "--noheader", "--array", "--format=%i|%T|%r|%Z|%j", *choice]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            log.info(
                "squeue: %s", error
            )  # `--jobs` of jobs that Slurm has forgotten is an error, too
            continue
        answered = True
        for line in done.stdout.splitlines():
            parts = [part.strip() for part in line.split("|", 4)]
            if len(parts) == 5:
                number, state, reason, place, name = parts
                found[number] = QueueEntry(
                    state, "" if reason == "None" else reason, Path(place), name
                )
    return found if answered else None
