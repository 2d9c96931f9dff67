"""Config classes: one declaration of a method's options, their types, ranges and defaults.

`config` is pydantic's dataclass. A YAML node binds to it by ``_target_``; a wrong value, an unknown
key or a nested mistake raises `pydantic.ValidationError`, which `user_error` turns into the config
key, the value and the fix. Scalars are strict: ``2.5`` is no count, ``true`` no number, nan and
infinity no value. Containers are lax: a list binds to a tuple, a mapping to a nested config class.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs
from typing_extensions import dataclass_transform

from lab.core.errors import UserError, nearest

SETTINGS = ConfigDict(
    extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, validate_default=True
)

Class = TypeVar("Class", bound=type)
Bound = TypeVar("Bound")


@dataclass_transform(kw_only_default=True)
def config(cls: Class) -> Class:
    """Make a method of ``cls``: keyword options, checked; two methods stay different objects."""
    return dataclass(cls, config=SETTINGS, kw_only=True, eq=False)  # type: ignore[return-value]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options(cls: Class) -> Class:
    """Make a group of options of ``cls``: frozen, compared by value."""
    return dataclass(cls, config=SETTINGS, kw_only=True, frozen=True)  # type: ignore[return-value]


Count = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # reorder what is read


def plain_line(value: str) -> str:
    """Return ``value`` without white space at its ends; it has to be one line of plain text.

    Raises:
        ValueError: no word, or a control character.
    """
    line = value.strip()
    if not line:
        raise ValueError("must be a text with at least one word")
    odd = next((c for c in line if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI), None)
    if odd is not None:
        raise ValueError(f"holds the control character U+{ord(odd):04X}; use one line of text")
    return line


AsList = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Names = Annotated[tuple[Text, ...], AsList]
"""Names; a single one is a list of one."""
Prompt = Annotated[str, Field(strict=True), AfterValidator(plain_line)]
"""A prompt or a part of one."""
OptionalPrompt = Annotated[
    str, Field(strict=True), AfterValidator(lambda value: value and plain_line(value))
]
"""A `Prompt`, or "" for none."""
Prompts = Annotated[
    tuple[Prompt, ...], AsList, AfterValidator(lambda value: tuple(dict.fromkeys(value)))
]
"""Prompts, each once; a single one is a list of one."""

_UNION = re.compile(
    r"[a-z-]+\[.*\]|constrained-\w+|str|int|float|bool"
)  # pydantic's names of types
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def bind(cls: Callable[..., Bound], values: Mapping[Any, Any], key: str) -> Bound:
    """Return the options ``values`` of the config key ``key`` as an object of ``cls``.

    Raises:
        UserError: a wrong value or an unknown key.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        raise user_error(error, key, cls) from None


def user_error(error: ValidationError, key: str, target: Any = None) -> UserError:
    """Return the first mistake of ``error`` as a `UserError` about the config key ``key``.

    Args:
        target: the config class, for the nearest option to a misspelt one.
    """
    # a misspelt option says more than the one that is missing for it
    first = min(error.errors(include_url=False), key=lambda e: e["type"] not in _UNKNOWN)
    path = [str(part) for part in first["loc"] if not _UNION.fullmatch(str(part))]
    where, value = ".".join([key, *path]), first["input"]
    if isinstance(value, ArgsKwargs):  # a check over several options of the class
        value = (value.kwargs or {}).get("name")
    if first["type"] in _UNKNOWN:
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
        if hint is not None:  # otherwise the index or the key of an entry
            target = groups[0] if groups else None
    return [f.name for f in fields(target) if f.init] if is_dataclass(target) else []
