"""Random draws for pictures: small, readable, one independent stream per label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray

from lab.core.seeding import generator

T = TypeVar("T")
Field = NDArray[Any]  # float32


class Dice:
    """Uniform draws from the stream ``labels`` of ``seed`` (`lab.core.seeding.generator`), nothing
    else.

    Only uniform numbers are drawn: their bits do not depend on the instruction set of the machine.
    """

    def __init__(self, seed: int, *labels: object) -> None:
        self._generator = generator(seed, *labels)

    def grid(self, *shape: int) -> Field:
        """Uniform float32 in [0, 1) of ``shape``."""
        return torch.rand(shape, generator=self._generator).numpy()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(self.grid(1)[0])

    def chance(self, share: float) -> bool:
        """True in ``share`` of the draws."""
        return self.uniform() < share

    def pick(self, options: Sequence[T]) -> T:
        return options[min(int(self.uniform() * len(options)), len(options) - 1)]
