"""Independent random streams from one seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")


def derive(seed: int, *labels: object) -> int:
    """Return a 63-bit integer from ``seed`` and labels; different labels give unrelated streams.

    Labels are joined by "/": ("a", 1) and ("a/1",) are the same.
    """
    text = "/".join([str(int(seed)), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *labels: object) -> torch.Generator:
    """Return a CPU generator for the stream ``labels`` of ``seed``; 0 is a seed like any other."""
    return torch.Generator().manual_seed(derive(seed, *labels))


def shuffled(items: Sequence[T], seed: int, *labels: object) -> list[T]:
    """Return ``items`` in the random order of the stream ``labels``."""
    order = torch.randperm(len(items), generator=generator(seed, *labels))
    return [items[i] for i in order.tolist()]


def hold_out(items: Sequence[T], share: float) -> tuple[Sequence[T], Sequence[T]]:
    """Split ``items`` into those to train on and the first ``share``, for tests; one each at
    least.
    """
    count = min(max(round(len(items) * share), 1), len(items) - 1)
    return items[count:], items[:count]


@lru_cache(maxsize=64)
def _order(rows: int, seed: int, labels: tuple[object, ...]) -> torch.Tensor:
    return torch.randperm(rows, generator=generator(seed, *labels))


def batch_rows(step: int, rows: int, batch_size: int, seed: int, *labels: object) -> torch.Tensor:
    """Return the row numbers of mini-batch ``step``, a function of the seed and the labels alone.

    Epochs are permutations cut into full batches; rows left over wait for the next epoch.
    """
    epoch, index = divmod(step, rows // batch_size)
    order = _order(rows, seed, (*labels, epoch))
    return order[index * batch_size : (index + 1) * batch_size]
