"""Intervals of figures over generated pictures: resample seeds, then concepts, then pictures (METHODS §4).

A figure of one concept in one seed is a function of column means over its pictures: similarity to the references in
both arms, detections along a trajectory. The rows of a `Unit` are pictures made from the same latents in every column,
so that one resample of the rows keeps the arms paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from eval.aggregate import joined
from lab.statistics import BOOTSTRAP_SEEDS, MIN_SEEDS
from lab.types import Score

Floats = NDArray[np.float64]
DRAWS = 2000
UNDEFINED = 0.05  # share of resamples without a value above which an interval says nothing


@dataclass(frozen=True)
class Unit:
    """One concept in one seed.

    Attributes:
        seed: of the run.
        rows: [pictures, columns].
        figure: column means [..., columns] → [..., figures]; nan where a figure is undefined.
    """

    seed: int
    rows: Floats
    figure: Callable[[Floats], Floats]

    @property
    def value(self) -> Floats:
        return self.figure(self.rows.mean(0))


@dataclass(frozen=True)
class Estimate:
    """Values with 95 % limits, [figures] each; nan limits where too many resamples had no value."""

    value: Floats
    low: Floats
    high: Floats
    seeds: int


def columns(means: Floats) -> Floats:
    """The figure of a unit whose columns are what is reported; also: nothing is done to a mean."""
    return means


def relative_gap(means: Floats) -> Floats:
    """Columns [A_1 …, I_1 …] → (A − I) / A; nan where A ≤ 0."""
    a, i = np.split(means, 2, axis=-1)
    return np.where(a > 0, (a - i) / np.where(a > 0, a, 1.0), np.nan)


def estimate(units: Sequence[Unit], draws: int = DRAWS, after: Callable[[Floats], Floats] = columns) -> Estimate:
    """Mean over seeds of the mean over concepts, with percentile limits of the three-stage bootstrap.

    ``after`` turns these means [..., figures] into what is reported (a quotient of means).

    From three to nine seeds the limits are never narrower than Student's t over the seed values: resampling three
    seeds alone covers too rarely (`lab.statistics.score`). With fewer than three seeds these stay as they are, and
    concepts and pictures are resampled within them.

    Raises:
        ValueError: no unit, or a unit without pictures.
    """
    if not units or any(len(u.rows) == 0 for u in units):
        raise ValueError("a metric over an empty set")
    by_seed = [[u for u in units if u.seed == seed] for seed in dict.fromkeys(u.seed for u in units)]
    means = np.stack([np.mean([u.value for u in group], axis=0) for group in by_seed])  # [seeds, figures]
    n = len(by_seed)
    value, per_seed = after(means.mean(0)), after(means)
    stats = after(_resample(by_seed, draws, means.shape[1]))
    missing = np.isnan(stats).mean(0) > UNDEFINED
    with np.errstate(invalid="ignore"):
        low, high = np.nanpercentile(np.where(missing, 0.0, stats), [2.5, 97.5], axis=0)
    low[missing] = high[missing] = math.nan
    if MIN_SEEDS <= n < BOOTSTRAP_SEEDS:
        half = scipy.stats.t.ppf(0.975, n - 1) * per_seed.std(0, ddof=1) / math.sqrt(n)
        low, high = np.fmin(low, value - half), np.fmax(high, value + half)  # a nan never wins
    return Estimate(value, low, high, n)


def _resample(by_seed: list[list[Unit]], draws: int, figures: int) -> Floats:
    """[draws, figures]; every slot of a drawn seed draws a concept, every drawn concept its pictures, all anew."""
    rng = np.random.default_rng(20241220)  # fixed: the interval of the same pictures never changes
    n = len(by_seed)
    across = n >= MIN_SEEDS
    chosen = rng.integers(0, n, (draws, n)) if across else np.tile(np.arange(n), (draws, 1))
    totals = np.empty((draws, n, figures))
    for s, group in enumerate(by_seed):
        where = np.argwhere(chosen == s)
        found = np.zeros((len(where), figures))
        for _ in group:  # as many concepts as the seed has, with replacement
            concept = rng.integers(0, len(group), len(where))
            for c, unit in enumerate(group):
                mine = concept == c
                size = len(unit.rows)
                weights = rng.multinomial(size, np.full(size, 1 / size), int(mine.sum())) / size
                found[mine] += unit.figure(weights @ unit.rows)
        totals[where[:, 0], where[:, 1]] = found / len(group)
    return totals.mean(1)


def score(
    units: Sequence[Unit],
    better: Literal["higher", "lower", "neutral"],
    *,
    geometric: bool = False,
    unit: str = "",
    note: str | None = None,
    undefined: str = "undefined",
    bounds: tuple[float, float] = (-math.inf, math.inf),
    draws: int = DRAWS,
    after: Callable[[Floats], Floats] = columns,
) -> Score:
    """A `Score` of units with one figure each (after ``after``, see `estimate`).

    Args:
        geometric: the figures are logarithms; value and limits are their exponentials.
        undefined: the note of a score without value, where a unit's own figure is nan.
        bounds: the range that the quantity can take; an interval is clipped to it.
    """
    found = estimate(units, draws, after)
    value, low, high = (float(v[0]) for v in (found.value, found.low, found.high))
    if not math.isfinite(value):
        return Score(None, n=found.seeds, better=better, note=joined(undefined, note), unit=unit)
    if geometric:
        value, low, high = math.exp(value), math.exp(low), math.exp(high)
    if found.seeds < MIN_SEEDS and all(len(u.rows) == 1 for u in units) and len(units) == found.seeds:
        return Score(value, None, None, found.seeds, better, "point", note, unit)
    kind: Literal["across_seeds", "within_seed"] = "across_seeds" if found.seeds >= MIN_SEEDS else "within_seed"
    if not (math.isfinite(low) and math.isfinite(high)):
        told = f"no interval: undefined in more than {UNDEFINED:.0%} of resamples"
        return Score(value, None, None, found.seeds, better, kind, joined(note, told), unit)
    low, high = (min(max(v, bounds[0]), bounds[1]) for v in (low, high))
    return Score(value, low, high, found.seeds, better, kind, note, unit)


def band(lines: dict[str, Sequence[Unit]], steps: Sequence[int], x: str, y: str, log: str = "") -> dict[str, Any]:
    """A record curve with a 95 % band: series ``arm``, ``arm:low`` and ``arm:high`` for every arm of ``lines``.

    A unit's figures are values at its first steps; the mean ends where the shortest unit ends (an attack that
    diverged), so that no mean over survivors is shown.
    """
    out: dict[str, Any] = {"step": [float(s) for s in steps], "x": x, "y": y, "log": log}
    for arm, units in lines.items():
        end = min(u.value.shape[-1] for u in units)
        short = [Unit(u.seed, u.rows, _first(u.figure, end)) for u in units]
        found = estimate(short, DRAWS // 4)
        for suffix, values in (("", found.value), (":low", found.low), (":high", found.high)):
            some = [float(v) if math.isfinite(v) else None for v in values]
            out[arm + suffix] = some + [None] * (len(steps) - end)
    return out


def _first(figure: Callable[[Floats], Floats], count: int) -> Callable[[Floats], Floats]:
    return lambda means: figure(means)[..., :count]
