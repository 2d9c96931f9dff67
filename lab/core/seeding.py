"""Independent random streams from one seed."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *labels: object) -> int:
    """A 63-bit integer from ``seed`` and labels; different labels give unrelated streams."""
    text = "/".join([str(int(seed)), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *labels: object) -> torch.Generator:
    """A CPU generator for the stream ``labels`` of ``seed`` (seed 0 is a seed like any other)."""
    return torch.Generator().manual_seed(derive(seed, *labels))
