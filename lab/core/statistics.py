"""Intervals over seeds: Student's t over seed means for few seeds, a two-stage bootstrap for
many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from lab.core.types import Score

MIN_SEEDS = 3  # with fewer, an interval says nothing about other seeds (docs/methods.md §4.4)
BOOTSTRAP_SEEDS = 10  # from here on the percentile bootstrap over seeds covers close to its 95 %

Floats = NDArray[np.float64]


@dataclass
class SeedScore(Score):
    """A score that still knows its value in every seed, in the run's order, so that two runs can be
    paired.
    """

    per_seed: tuple[float, ...] = ()


def score(
    samples: Sequence[Sequence[float]],
    better: Literal["higher", "lower", "neutral"],
    *,
    aggregate: Literal["mean", "geomean"] = "mean",
    draws: int = 2000,
    unit: str = "",
    note: str | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> SeedScore:
    """A `Score` from ``samples[seed][unit]`` with a 95 % interval.

    Three to nine seeds: Student's t over the seed means with n − 1 degrees of freedom (of the
    logarithms for ``geomean``), not the bootstrap, since resampling three seeds covers the true
    mean in three of four cases only, where 19 of 20 are promised (docs/methods.md §4.4). Ten seeds
    or more: two-stage percentile bootstrap, seeds with replacement, then units within each seed.
    One seed with one unit gives a ``point``; fewer than three seeds give ``within_seed`` (units
    resampled within the seeds that there are). Seed means that are all equal leave an interval
    without width.

    Args:
        bounds: the range that the quantity can take; an interval is clipped to it ((0, 1) for
            shares).

    Raises:
        ValueError: a metric over an empty set is an error, and so is a value that is not finite.
    """
    groups = [np.asarray(list(group), dtype=float) for group in samples]
    if not groups or any(g.size == 0 for g in groups):
        raise ValueError("a metric over an empty set")
    if not all(np.isfinite(g).all() for g in groups):
        raise ValueError("an interval needs finite values")
    if aggregate == "geomean":
        groups = [np.log(g) for g in groups]
    back = np.exp if aggregate == "geomean" else (lambda v: v)
    means = np.array([g.mean() for g in groups])
    value, per_seed = float(back(means.mean())), tuple(float(back(mean)) for mean in means)
    n = len(groups)
    if n < 2 and groups[0].size < 2:
        return SeedScore(value, None, None, n, better, "point", note, unit, per_seed=per_seed)
    across = n >= MIN_SEEDS
    if not across and all(g.size < 2 for g in groups):
        return SeedScore(
            value,
            None,
            None,
            n,
            better,
            "point",
            note or f"{n} seeds, no interval",
            unit,
            per_seed=per_seed,
        )
    limits = (
        _student(means) if across and n < BOOTSTRAP_SEEDS else _bootstrap(groups, draws, across)
    )
    low, high = (min(max(float(v), bounds[0]), bounds[1]) for v in back(limits))
    kind: Literal["across_seeds", "within_seed"] = "across_seeds" if across else "within_seed"
    return SeedScore(value, low, high, n, better, kind, note, unit, per_seed=per_seed)


def _student(means: Floats) -> Floats:
    """95 % interval [low, high] of the mean that ``means`` [n] scatter about."""
    n = len(means)
    half = 0.0
    if np.ptp(means) > 0:
        half = float(stdtrit(n - 1, 0.975) * means.std(ddof=1) / math.sqrt(n))
    return means.mean() + half * np.array([-1.0, 1.0])


def _bootstrap(groups: list[Floats], draws: int, across: bool) -> Floats:
    """Percentile interval [low, high] of the mean over seeds of the means within them."""
    rng = np.random.default_rng(20241220)  # fixed: the interval of the same samples never changes
    n = len(groups)
    chosen = rng.integers(0, n, (draws, n)) if across else np.tile(np.arange(n), (draws, 1))
    centres = np.empty((draws, n))
    for i, group in enumerate(
        groups
    ):  # every time that seed i was drawn, its units are resampled anew
        drawn = chosen == i
        centres[drawn] = group[rng.integers(0, group.size, (int(drawn.sum()), group.size))].mean(
            axis=1
        )
    return np.percentile(centres.mean(axis=1), [2.5, 97.5])
