"""A run as a job of a batch system: the signals that end it, and the claim on its folder."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from lab.core.errors import UserError

log = logging.getLogger(__name__)

# SIGTERM: a job is cancelled or preempted. SIGUSR1, SIGUSR2: what submitit and hand-written scripts
# ask Slurm to send some time before the limit.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_INTERRUPTED = 130
LOCK, PROCESS = "run.lock", "process.yaml"
TRACES = {".hydra", "multirun.yaml", "run.log", LOCK, PROCESS, "ranks", "launch.yaml"}
PATIENCE = 60.0  # seconds; a restarted Slurm job may meet its predecessor writing its record
LASTING = ("run", "train", "audit", "search")  # actions that take minutes to days


@contextmanager
def interruptible(job: bool = False) -> Iterator[None]:
    """Turn the first of `SIGNALS` into a KeyboardInterrupt, so that a record is written.

    Later signals are ignored.

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

    def repeat(event: Any) -> None:
        """Send the signal again: Python drops what is raised while it collects garbage."""
        if not isinstance(event.exc_value, KeyboardInterrupt):
            return hook(event)
        number = received.pop() if received else signal.SIGINT
        again = threading.Timer(0.1, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    hook, sys.unraisablehook = sys.unraisablehook, repeat
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        if not job or "SUBMITIT_EXECUTOR" not in os.environ:
            raise
        if received and received[0] != signal.SIGTERM:
            for number in (signal.SIGUSR2, signal.SIGUSR1):  # submitit listens to one of them
                requeue = before[number]
                if callable(requeue):
                    requeue(received[0], None)  # ends in SystemExit, or in an error that says why
        sys.exit(EXIT_INTERRUPTED)
    finally:
        sys.unraisablehook = hook
        if not received:  # else the process ends, and a repeated signal must not disturb it
            for number, handler in before.items():
                signal.signal(number, handler)


def fail_slurm_job(code: int) -> None:
    """Let a Slurm job of submitit end with ``code`` though its function returns.

    Slurm then shows it as failed. An exception would do that too, but it would stop the command
    that waits for the other jobs of the sweep.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        atexit.register(os._exit, code)  # the last one registered is called first
        atexit.register(sys.stderr.flush)
        atexit.register(sys.stdout.flush)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder`` and write who works there and how it ended.

    `lab.cluster.status` reads both. The kernel frees the lock when the process dies.

    Raises:
        UserError: another process holds the folder and does not end within `PATIENCE`; two would
            write one record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_claimed(folder):
        log.warning("another process is at work in %s; waiting for its end", folder)
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=PATIENCE)
    except Timeout as error:
        fix = "another process is at work in it: wait for its end, or choose another folder."
        raise UserError("hydra.run.dir", folder, fix) from error
    process = {"host": platform.node(), "pid": os.getpid(), "started": time.time(), "job": job_id()}
    with lock:
        _write(folder, process)
        try:
            yield
        except BaseException as error:
            ended = "failed" if isinstance(error, Exception) else "preempted"
            message = " ".join(str(error).split())[:200]
            _write(folder, process | {"ended": ended, "message": message})
            raise
        _write(folder, process | {"ended": "ok"})


def _write(folder: Path, process: dict[str, Any]) -> None:
    with suppress(OSError):  # a full disk: the run's own message matters more
        (folder / PROCESS).write_text(OmegaConf.to_yaml(OmegaConf.create(process)))


def job_id() -> str | None:
    """Return the Slurm id of this process as ``squeue`` has it: ``12``, or ``12_3`` in an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def relative(path: Path) -> Path:
    """Return ``path`` as seen from the working directory where that is possible."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def discard(folder: Path) -> None:
    """Remove a folder that holds nothing but `TRACES`, and the empty ones above it."""
    if folder == Path.cwd() or not folder.is_dir() or is_claimed(folder):
        return
    if {path.name for path in folder.iterdir()} <= TRACES:
        for handler in list(logging.root.handlers):  # it would open its file at the next message
            if getattr(handler, "baseFilename", None) == os.path.abspath(folder / "run.log"):
                logging.root.removeHandler(handler)
        shutil.rmtree(folder)
        if not relative(folder).is_absolute():  # those of another place may be the user's
            with suppress(OSError):  # one of them holds other runs
                os.removedirs(relative(folder).parent)


def is_claimed(folder: Path) -> bool:
    """Return True if a living process holds the lock of ``folder``; False if that is unknown."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except OSError as error:  # or someone else's folder, whose lock cannot be opened
        return isinstance(error, Timeout)
