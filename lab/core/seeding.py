"""Independent random streams from one seed."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


def derive(seed: int, *labels: object) -> int:
    """Return a 63-bit integer from ``seed`` and labels; different labels give unrelated streams."""
    text = "/".join([str(int(seed)), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *labels: object) -> torch.Generator:
    """Return a CPU generator for the stream ``labels`` of ``seed``; 0 is a seed like any other."""
    return torch.Generator().manual_seed(derive(seed, *labels))


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
