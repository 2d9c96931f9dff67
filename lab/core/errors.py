"""Errors that a user can act on. `run.py` prints them without a traceback and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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
        self.rank, self.type, self.told, self.key, self.step, self.cell = (
            rank,
            type,
            told,
            key,
            step,
            cell,
        )
        self.message, self.traceback = message, traceback
        super().__init__(
            message if rank is None or type == "Killed" else f"process {rank}: {type}: {message}"
        )


_BLAMED = "_immunization_bench_part"


@contextmanager
def with_config_key(key: str) -> Iterator[None]:
    """Whatever is raised within remembers the config key of the part that runs here, which may be
    anybody's own.

    The innermost one counts: an attacker that asks for a case meets a broken scenario, not a broken
    attacker.
    """
    try:
        yield
    except Exception as error:
        error.__dict__.setdefault(_BLAMED, key)
        raise


def config_key_of(error: BaseException) -> str | None:
    """What `with_config_key` remembered."""
    return error.__dict__.get(_BLAMED)


def defect(error: BaseException) -> str:
    """One line about an exception that no user can act on; the traceback stands above it."""
    known = (
        [error.key]
        if isinstance(error, RankFailed)
        else [config_key_of(error), type(error).__name__]
    )
    return ": ".join(filter(None, (*known, " ".join(str(error).split()))))


_SHOWN = 60


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence that names the closest valid choices to ``name``."""
    options = sorted(choices)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = f" … ({len(options)} in all)" if len(options) > _SHOWN else ""
    return f"choose one of {', '.join(options[:_SHOWN])}{more}."
