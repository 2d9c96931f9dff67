"""Intervals of figures over generated pictures: resample seeds, then concepts, then pictures
(docs/methods.md §4.4).

A figure of one concept in one seed is a function of column means over its pictures: similarity to
the references in both models, detections along a trajectory. The rows of a `Unit` are pictures made
from the same latents in every column, so that one resample of the rows keeps the models paired.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from eval.stats.aggregate import joined
from lab.core.statistics import BOOTSTRAP_SEEDS, MIN_SEEDS, SeedScore
from lab.core.types import Score

Floats = NDArray[np.float64]
DRAWS = 2000
TAIL = 0.025  # probability beyond each limit of a 95 % interval
SHARE = (0.0, 1.0)  # bounds of a share of pictures
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
    per_seed: Floats  # [seeds, figures]

    @property
    def seeds(self) -> int:
        return len(self.per_seed)


def columns(means: Floats) -> Floats:
    """The figure of a unit whose columns are what is reported; also: nothing is done to a mean."""
    return means


def relative_gap(means: Floats) -> Floats:
    """Columns [A_1 …, I_1 …] → (A − I) / A; nan where A ≤ 0."""
    a, i = np.split(means, 2, axis=-1)
    return np.where(a > 0, (a - i) / np.where(a > 0, a, 1.0), np.nan)


def estimate(
    units: Sequence[Unit],
    draws: int = DRAWS,
    after: Callable[[Floats], Floats] = columns,
    tails: tuple[float, float] = (TAIL, TAIL),
) -> Estimate:
    """Mean over seeds of the mean over concepts, with percentile limits of the three-stage
    bootstrap.

    ``after`` turns these means [..., figures] into what is reported (a quotient of means).
    ``tails``: probabilities below the lower and above the upper limit.

    From three to nine seeds the limits are never narrower than Student's t over the seeds (over the
    jackknife's pseudo-values, which for a mean are the seeds' own): resampling three seeds alone
    covers too rarely (`lab.core.statistics.score`); where the figure is undefined in more than 5 %
    of resamples they are Student's alone, and where it is undefined without one of the seeds there
    are none. With fewer than three seeds the limits stay as they are, and concepts and pictures are
    resampled within them.

    Raises:
        ValueError: no unit, or a unit without pictures.
    """
    if not units or any(len(u.rows) == 0 for u in units):
        raise ValueError("a metric over an empty set")
    by_seed = [
        [u for u in units if u.seed == seed] for seed in dict.fromkeys(u.seed for u in units)
    ]
    means = np.stack(
        [np.mean([u.value for u in group], axis=0) for group in by_seed]
    )  # [seeds, figures]
    n = len(by_seed)
    value, per_seed = after(means.mean(0)), after(means)
    stats = after(_resample(by_seed, draws, means.shape[1]))
    missing = np.isnan(stats).mean(0) > UNDEFINED
    low, high = np.nanpercentile(
        np.where(missing, 0.0, stats), [100 * tails[0], 100 - 100 * tails[1]], axis=0
    )
    low[missing] = high[missing] = math.nan
    if MIN_SEEDS <= n < BOOTSTRAP_SEEDS:
        error = _standard_error(
            value, np.stack([after(np.delete(means, s, 0).mean(0)) for s in range(n)])
        )
        below, above = (stdtrit(n - 1, 1 - tail) * error for tail in tails)
        low, high = np.fmin(low, value - below), np.fmax(high, value + above)  # a nan never wins
        low[np.isnan(error)] = high[np.isnan(error)] = math.nan
    return Estimate(value, low, high, per_seed)


def _standard_error(value: Floats, without: Floats) -> Floats:
    """Of a figure of means over seeds, by the jackknife, from the figures without one seed each
    [seeds, figures].
    """
    n = len(without)
    pseudo = n * value - (n - 1) * without
    return np.asarray(pseudo.std(0, ddof=1) / math.sqrt(n))


def _resample(by_seed: list[list[Unit]], draws: int, figures: int) -> Floats:
    """[draws, figures]; every slot of a drawn seed draws a concept, every drawn concept its
    pictures, all anew.
    """
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


def worst_score(
    found: Score,
    concepts: Sequence[Sequence[Unit]],
    which: Literal["lowest", "highest"],
    *,
    geometric: bool = False,
) -> Score:
    """The score of the lowest or highest of k concepts, with an interval that knows that it was
    picked after looking.

    For the lowest of k true values: the least of the lower limits needs no correction, as the limit
    of the concept that is truly lowest is one of them; the least of the upper limits lies below it
    in 2.5 % of cases where each is taken at 2.5 % ÷ k (Bonferroni). For the highest the sides
    change places.

    Args:
        found: the score of the concept that was picked.
        concepts: units of every concept, one figure each.
        geometric: as in `score`.
    """
    if found.low is None or found.high is None or len(concepts) < 2:
        return found
    shared = TAIL / len(concepts)
    pick = min if which == "lowest" else max
    tails = (TAIL, shared) if which == "lowest" else (shared, TAIL)
    each = [estimate(units, tails=tails) for units in concepts]
    low, high = pick(float(e.low[0]) for e in each), pick(float(e.high[0]) for e in each)
    if not all(math.isfinite(e.low[0]) and math.isfinite(e.high[0]) for e in each):
        told = "no interval: one of the concepts has none"
        return replace(found, low=None, high=None, note=joined(found.note, told))
    if geometric:
        low, high = math.exp(low), math.exp(high)
    assert found.value is not None
    return replace(found, low=min(low, found.value), high=max(high, found.value))


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
    per_seed = found.per_seed[:, 0]
    if geometric:
        value, low, high = math.exp(value), math.exp(low), math.exp(high)
        per_seed = np.exp(per_seed)
    seeds = tuple(map(float, per_seed)) if np.isfinite(per_seed).all() else ()
    if (
        found.seeds < MIN_SEEDS
        and all(len(u.rows) == 1 for u in units)
        and len(units) == found.seeds
    ):
        return SeedScore(
            value, None, None, found.seeds, better, "point", note, unit, per_seed=seeds
        )
    kind: Literal["across_seeds", "within_seed"] = (
        "across_seeds" if found.seeds >= MIN_SEEDS else "within_seed"
    )
    if not (math.isfinite(low) and math.isfinite(high)):
        told = f"no interval: undefined in more than {UNDEFINED:.0%} of resamples"
        return SeedScore(
            value, None, None, found.seeds, better, kind, joined(note, told), unit, per_seed=seeds
        )
    low, high = (min(max(v, bounds[0]), bounds[1]) for v in (low, high))
    return SeedScore(value, low, high, found.seeds, better, kind, note, unit, per_seed=seeds)


def most_unseen(units: Sequence[Unit]) -> float:
    """The largest share that is seen in no picture of a seed with probability `TAIL` (Clopper and
    Pearson).
    """
    pictures = Counter[int]()
    for unit in units:
        pictures[unit.seed] += len(unit.rows)
    return float(1 - TAIL ** (1 / min(pictures.values())))


def share_score(
    units: Sequence[Unit],
    better: Literal["higher", "lower", "neutral"],
    *,
    limits: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Score:
    """`score` of a share of pictures. Where none of them (or each) shows what is counted, no
    resample differs: the interval is then as wide at least as Clopper and Pearson's of the pictures
    of one seed, as those of other seeds are of models that share much.

    Args:
        limits: the lowest share that may be there though each picture shows it, and the highest
            though none does; None: by `most_unseen`.
    """
    found = score(units, better, bounds=SHARE, **kwargs)
    if found.value is None or found.low is None or found.high is None:
        return found
    unseen = most_unseen(units)
    low, high = _widened(found.value, found.low, found.high, *(limits or (1 - unseen, unseen)))
    return replace(found, low=low, high=high)


def _widened(
    value: float, low: float, high: float, least: float, most: float
) -> tuple[float, float]:
    return (low if value != 1 else min(low, least)), (high if value != 0 else max(high, most))


def band(
    lines: dict[str, Sequence[Unit]],
    steps: Sequence[int],
    x: str,
    y: str,
    log: str = "",
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Any]:
    """A record curve with a 95 % band: series ``model_name``, ``model:low`` and ``model:high`` for
    every model of ``lines``.

    A unit's figures are values at its first steps; the mean ends where the shortest unit ends (an
    attack that diverged), so that no mean over survivors is shown. ``bounds``: as of `score`; those
    of a share, 0 and 1, also widen the band where no picture (or each) shows what is counted, as
    `share_score` does.
    """
    out: dict[str, Any] = {"step": [float(s) for s in steps], "x": x, "y": y, "log": log}
    for model_name, units in lines.items():
        end = min(u.value.shape[-1] for u in units)
        short = [Unit(u.seed, u.rows, _first(u.figure, end)) for u in units]
        found = estimate(short, DRAWS // 4)
        low, high = np.clip(found.low, *bounds), np.clip(found.high, *bounds)
        if bounds == SHARE:
            unseen = most_unseen(short)
            low, high = np.vectorize(_widened)(found.value, low, high, 1 - unseen, unseen)
        limits = {":low": low, ":high": high}
        for suffix, values in {"": found.value, **limits}.items():
            some = [float(v) if math.isfinite(v) else None for v in values]
            out[model_name + suffix] = some + [None] * (len(steps) - end)
    return out


def _first(figure: Callable[[Floats], Floats], count: int) -> Callable[[Floats], Floats]:
    return lambda means: figure(means)[..., :count]
