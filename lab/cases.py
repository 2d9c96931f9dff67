"""Facts about cases of both kinds that the stage cache and the checks need."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from lab.activations import digest
from lab.store import stage_key
from lab.types import AnyCase


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` as JSON; every tensor in it is moved to ``tensors`` and leaves its number."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"tensor {len(tensors)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item, tensors) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, tensors) for key, item in value.items()}
    return value


def fingerprint(case: AnyCase) -> str:
    """SHA-256 over everything that a case holds: pictures or rows, labels, prompts and roles."""
    tensors: list[Tensor] = []
    plain = _plain(case, tensors)
    return stage_key(case=plain, tensors=digest(*tensors))
