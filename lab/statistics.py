"""Bootstrap intervals: resample seeds first, then what lies within a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lab.types import Score

MIN_SEEDS = 3  # with fewer, an interval says nothing about other seeds (METHODS §4)


def score(
    samples: Sequence[Sequence[float]],
    better: Literal["higher", "lower", "neutral"],
    *,
    aggregate: Literal["mean", "geomean", "median"] = "mean",
    draws: int = 2000,
    unit: str = "",
    note: str | None = None,
) -> Score:
    """A `Score` from ``samples[seed][unit]`` with a 95 % percentile bootstrap interval.

    Two-stage bootstrap: seeds with replacement, then units within each seed. One seed with one unit gives a
    ``point``; fewer than three seeds give ``within_seed`` (units resampled within the seeds that there are).

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
    centre = np.median if aggregate == "median" else np.mean
    back = np.exp if aggregate == "geomean" else (lambda v: v)
    value = float(back(centre([centre(g) for g in groups])))
    n = len(groups)
    if n < 2 and groups[0].size < 2:
        return Score(value, None, None, n, better, "point", note, unit)
    rng = np.random.default_rng(20241220)  # fixed: the interval of the same samples never changes
    across = n >= MIN_SEEDS
    chosen = rng.integers(0, n, (draws, n)) if across else np.tile(np.arange(n), (draws, 1))
    centres = np.empty((draws, n))
    for i, group in enumerate(groups):  # every time that seed i was drawn, its units are resampled anew
        drawn = chosen == i
        centres[drawn] = centre(group[rng.integers(0, group.size, (int(drawn.sum()), group.size))], axis=1)
    stats = centre(centres, axis=1)
    low, high = back(np.percentile(stats, [2.5, 97.5]))
    if not across and all(g.size < 2 for g in groups):
        return Score(value, None, None, n, better, "point", note or f"{n} seeds, no interval", unit)
    kind: Literal["across_seeds", "within_seed"] = "across_seeds" if across else "within_seed"
    return Score(value, float(low), float(high), n, better, kind, note, unit)
