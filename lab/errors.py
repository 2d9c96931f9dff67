"""Errors that a user can act on. `run.py` prints them without a traceback and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence that names the closest valid choices to ``name``."""
    options = sorted(choices)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"choose one of {', '.join(options)}."
