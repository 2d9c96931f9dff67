"""Config classes: one declaration of a method's options, their types, ranges and defaults.

`config` is pydantic's dataclass. A YAML node binds to it by ``_target_``; a wrong value, an unknown
key or a nested mistake raises `pydantic.ValidationError`, which `user_error` turns into the config
key, the value and the fix. Scalars are strict: ``2.5`` is no count, ``true`` no number, nan and
infinity no value. Containers are lax: a list binds to a tuple, a mapping to a nested config class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from lab.core.errors import UserError, nearest

_SETTINGS = ConfigDict(
    extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, validate_default=True
)

config = partial(dataclass, config=_SETTINGS, kw_only=True, eq=False)
"""Decorator of a method: keyword options, checked; two methods stay different objects."""
options = partial(dataclass, config=_SETTINGS, kw_only=True, frozen=True)
"""Decorator of a group of options inside a method; compared by value."""

Count = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]


def user_error(error: ValidationError, key: str, target: Any = None) -> UserError:
    """Return the first mistake of ``error`` as a `UserError` about the config key ``key``.

    Args:
        target: the config class, for the nearest option to a misspelt one.
    """
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    where, value = ".".join([key, *path]), first["input"]
    if isinstance(value, ArgsKwargs):  # a check over several options of the class
        value = (value.kwargs or {}).get("name")
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f"{'.'.join([key, *path[:-1]])}.{name}" for name in _names(target, path[:-1])]
        return UserError(where, value, f"there is no such key; {nearest(where, known)}")
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return UserError(where, None, "needs a value.")
    return UserError(
        where, value, f"{first['msg'].removeprefix('Value error, ')}.".replace("..", ".")
    )


def _names(target: Any, path: Sequence[str]) -> list[str]:
    """Return the options of ``target``, or of the nested group at ``path``."""
    for part in path:
        hint = get_type_hints(target).get(part) if is_dataclass(target) else None
        groups = [t for t in (hint, *get_args(hint)) if isinstance(t, type) and is_dataclass(t)]
        target = groups[0] if groups else None
    return [f.name for f in fields(target) if f.init] if is_dataclass(target) else []
