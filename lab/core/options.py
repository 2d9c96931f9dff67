"""Checks of options that every package shares. A failure names the config key, the value and the
fix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path

from lab.core.errors import UserError, nearest


def number(
    key: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """``value`` as a finite float; a boolean or a text is no number.

    Args:
        key: config key, for the message.
        low, high: bounds that belong to the range.
        above, below: bounds that do not.

    Raises:
        UserError: no number, not finite, or outside the range.
    """
    fine = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    bounds = {"≥": low, ">": above, "≤": high, "<": below}
    if fine:
        given = float(value)  # type: ignore[arg-type]
        fine = (low is None or given >= low) and (above is None or given > above)
        fine = fine and (high is None or given <= high) and (below is None or given < below)
    if not fine:
        limits = " and ".join(
            f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None
        )
        raise UserError(key, value, f"must be a number {limits}".rstrip() + ".")
    return given


def count(key: str, value: object, low: int = 1, high: int | None = None) -> int:
    """``value`` as a whole number from ``low`` to ``high``.

    Raises:
        UserError: a fraction, a boolean, a text, or a number outside the range.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < low or (high is not None and int(value) > high):  # type: ignore[call-overload]
        limits = f"≥ {low}" if high is None else f"from {low} to {high}"
        raise UserError(key, value, f"must be a whole number {limits}.")
    return int(value)  # type: ignore[call-overload]


def choice(key: str, value: object, choices: Iterable[str]) -> str:
    """``value`` when it is one of ``choices``.

    Raises:
        UserError: any other value; names the nearest choice.
    """
    options = tuple(choices)
    if not isinstance(value, str) or value not in options:
        raise UserError(key, value, nearest(str(value), options))
    return value


def flag(key: str, value: object) -> bool:
    """``value`` when it is true or false.

    Raises:
        UserError: anything else, 0 and 1 included.
    """
    if not isinstance(value, bool):
        raise UserError(key, value, "must be true or false.")
    return value


def unread(key: str, value: object, default: object, read: bool, needs: str) -> None:
    """An option that nothing reads would be a claim in the record.

    Raises:
        UserError: ``value`` is not the ``default`` and is not ``read``; ``needs`` says what would
            read it.
    """
    if value != default and not read:
        raise UserError(
            key, value, f"is read with {needs} only; set that, or leave it at {default}."
        )


def local(key: str, value: object) -> Path:
    """``value`` as a path, ``~`` and ``~user`` replaced by the home folder.

    Raises:
        UserError: a user that this machine does not have.
    """
    try:
        return Path(str(value)).expanduser()
    except RuntimeError as error:
        raise UserError(
            key, value, "starts with ~ and a name, and this machine has no such user."
        ) from error


def names(key: str, value: object) -> tuple[str, ...]:
    """One name or a list of names, as texts (a YAML list may hold numbers such as 2010).

    Raises:
        UserError: neither a text nor a list of texts and numbers.
    """
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in items):
        raise UserError(key, value, "must be a name or a list of names, e.g. [a,b].")
    return tuple(map(str, items))
