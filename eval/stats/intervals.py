"""95 % intervals over seeds: Student's t, and the bootstrap of seeds, concepts and images
(docs/reference/methods.md §4.4).

`score_samples` takes values per seed and case. `score_units` takes images: a figure of one concept
in one seed is a function of column means over its images (similarity to the references in both
models, detections along a trajectory). The rows of a `Unit` are images made from the same latents
in every column, so one resample of the rows keeps the models paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import sem
from scipy.stats import t as student_t

from lab.core.data import Role
from lab.core.types import Score

Floats = NDArray[np.float64]
Better = Literal["higher", "lower", "neutral"]
Bound = Literal["lower", "upper"]
Samples = Sequence[Sequence[float]]  # [seed][case]

MIN_SEEDS = 3  # fewer say nothing about other seeds (docs/reference/methods.md §4.4)
BOOTSTRAP_SEEDS = 10  # from here on the percentile bootstrap over seeds covers close to its 95 %
DRAWS = 2000
TAIL = 0.025  # probability beyond each limit of a 95 % interval
UNBOUNDED = (-math.inf, math.inf)  # ranges that a quantity can take
POSITIVE = (0.0, math.inf)
SHARE = (0.0, 1.0)
UNDEFINED = 0.05  # share of resamples without a value above which an interval says nothing
RESAMPLING_SEED = 20241220  # fixed: the interval of the same samples never changes


def joined(*notes: str | None) -> str | None:
    """Join notes in one line; None when there is nothing to say."""
    return "; ".join(note for note in notes if note) or None


def interval_kind(seeds: int) -> Literal["across_seeds", "within_seed"]:
    """Return what an interval over so many seeds supports, see `Score.interval`."""
    return "across_seeds" if seeds >= MIN_SEEDS else "within_seed"


def _drawn_seeds(rng: np.random.Generator, seeds: int, draws: int) -> NDArray[np.int64]:
    """Draw seeds with replacement [draws, seeds]; fewer than `MIN_SEEDS` stay as they are."""
    if seeds >= MIN_SEEDS:
        return rng.integers(0, seeds, (draws, seeds))
    return np.tile(np.arange(seeds), (draws, 1))


# ---- values per seed and case


def score_samples(
    samples: Samples,
    better: Better,
    reason: str | None = None,
    *,
    aggregate: Literal["mean", "geomean"] = "mean",
    draws: int = DRAWS,
    unit: str = "",
    note: str | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
    bound: Bound | None = None,
) -> Score:
    """Return the mean over seeds of ``samples[seed][case]`` with a 95 % interval.

    Three to nine seeds: Student's t over the seed means with n − 1 degrees of freedom (of the
    logarithms for ``geomean``), not the bootstrap, since resampling three seeds covers the true
    mean in three of four cases only, where 19 of 20 are promised (docs/reference/methods.md §4.4).
    Ten seeds or more: two-stage percentile bootstrap, seeds with replacement, then cases within
    each seed.
    One seed with one case gives a ``point``; fewer than three seeds give ``within_seed`` (cases
    resampled within the seeds that there are). Seed means that are all equal leave an interval
    without width.

    Args:
        reason: the note of a score without value, where there is no sample; None: an error.
        bounds: the range that the quantity can take; an interval is clipped to it.
        bound: set where ``samples`` hold limits, see `Score.bound`.

    Raises:
        ValueError: a metric over an empty set, and a value that is not finite.
    """
    if not samples and reason is not None:
        return Score(None, better=better, note=reason, unit=unit)
    groups = [np.asarray(list(group), dtype=float) for group in samples]
    if not groups or any(g.size == 0 for g in groups):
        raise ValueError("a metric over an empty set")
    if not all(np.isfinite(g).all() for g in groups):
        raise ValueError("an interval needs finite values")
    back = np.exp if aggregate == "geomean" else columns
    if aggregate == "geomean":
        groups = [np.log(g) for g in groups]
    means, n = np.array([g.mean() for g in groups]), len(groups)
    score = Score(
        float(back(means.mean())),
        n=n,
        better=better,
        note=note,
        unit=unit,
        bound=bound,
        per_seed=tuple(float(back(mean)) for mean in means),
    )
    if n < MIN_SEEDS and all(g.size < 2 for g in groups):
        return score if n < 2 else replace(score, note=note or f"{n} seeds, no interval")
    limits = np.full(2, means.mean())
    if not MIN_SEEDS <= n < BOOTSTRAP_SEEDS:
        limits = _bootstrap_limits(groups, draws)
    elif np.ptp(means) > 0:
        limits = np.array(student_t.interval(1 - 2 * TAIL, n - 1, means.mean(), sem(means)))
    low, high = map(float, np.clip(back(limits), *bounds))
    return replace(score, low=low, high=high, interval=interval_kind(n))


def _bootstrap_limits(groups: list[Floats], draws: int) -> Floats:
    """Return percentiles [low, high] of the mean over seeds of the means within them."""
    rng = np.random.default_rng(RESAMPLING_SEED)
    chosen = _drawn_seeds(rng, len(groups), draws)
    centres = np.empty(chosen.shape)
    for i, group in enumerate(groups):  # each time a seed was drawn, its cases are drawn anew
        drawn = chosen == i
        rows = rng.integers(0, group.size, (int(drawn.sum()), group.size))
        centres[drawn] = group[rows].mean(axis=1)
    return np.percentile(centres.mean(axis=1), [2.5, 97.5])


# ---- images of concepts


@dataclass(frozen=True)
class Unit:
    """One concept in one seed.

    Attributes:
        seed: of the run.
        rows: [images, columns].
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


def columns(means: Floats) -> Floats:
    """Return column means as they are: the figure of a unit whose columns are reported."""
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
    figures: int | None = None,
) -> Estimate:
    """Return the mean over seeds of the mean over concepts, with limits of the three-stage
    percentile bootstrap.

    ``after`` turns these means [..., figures] into what is reported (a quotient of means).
    ``tails``: probabilities below the lower and above the upper limit. ``figures``: the first so
    many of every unit; all by default.

    From three to nine seeds the limits are never narrower than Student's t over the seeds (over the
    jackknife's pseudo-values, which for a mean are the seeds' own): resampling three seeds alone
    covers too rarely (`score_samples`). Where the figure is undefined in more than 5 % of resamples
    they are Student's alone. Where it is undefined without one of the seeds there are none. With
    fewer than three seeds only concepts and images are resampled.

    Raises:
        ValueError: no unit, or a unit without images.
    """
    if not units or any(len(u.rows) == 0 for u in units):
        raise ValueError("a metric over an empty set")
    seeds = sorted({u.seed for u in units})
    by_seed = [[u for u in units if u.seed == seed] for seed in seeds]
    means = np.stack([np.mean([u.value[:figures] for u in group], 0) for group in by_seed])
    n, value = len(by_seed), after(means.mean(0))
    stats = after(_resample(by_seed, draws, means.shape[1]))
    missing = np.isnan(stats).mean(0) > UNDEFINED
    percentiles = [100 * tails[0], 100 - 100 * tails[1]]
    low, high = np.nanpercentile(np.where(missing, 0.0, stats), percentiles, axis=0)
    low[missing] = high[missing] = math.nan
    if MIN_SEEDS <= n < BOOTSTRAP_SEEDS:
        without = np.stack([after(np.delete(means, s, 0).mean(0)) for s in range(n)])
        error = (n * value - (n - 1) * without).std(0, ddof=1) / math.sqrt(n)
        below, above = (student_t.ppf(1 - tail, n - 1) * error for tail in tails)
        low, high = np.fmin(low, value - below), np.fmax(high, value + above)  # a nan never wins
        low[np.isnan(error)] = high[np.isnan(error)] = math.nan
    return Estimate(value, low, high, after(means))


def _resample(by_seed: list[list[Unit]], draws: int, figures: int) -> Floats:
    """Resample seeds, as many concepts of each drawn seed as it has, and their images, all anew:
    [draws, figures].
    """
    rng = np.random.default_rng(RESAMPLING_SEED)
    chosen = _drawn_seeds(rng, len(by_seed), draws)
    totals = np.empty((*chosen.shape, figures))
    for s, group in enumerate(by_seed):
        where = np.argwhere(chosen == s)
        sums = np.zeros((len(where), figures))
        for _ in group:
            concept = rng.integers(0, len(group), len(where))
            for c, unit in enumerate(group):
                drawn, size = concept == c, len(unit.rows)
                weights = rng.multinomial(size, np.full(size, 1 / size), int(drawn.sum())) / size
                sums[drawn] += unit.figure(weights @ unit.rows)[:, :figures]
        totals[where[:, 0], where[:, 1]] = sums / len(group)
    return totals.mean(1)


def score_units(
    units: Sequence[Unit],
    better: Better,
    *,
    geometric: bool = False,
    unit: str = "",
    note: str | None = None,
    undefined: str = "undefined",
    bounds: tuple[float, float] = UNBOUNDED,
    bound: Bound | None = None,
    draws: int = DRAWS,
    after: Callable[[Floats], Floats] = columns,
) -> Score:
    """Return the `Score` of units with one figure each (after ``after``, see `estimate`).

    Args:
        geometric: the figures are logarithms; value and limits are their exponentials.
        undefined: the note of a score without value, where a unit's own figure is nan.
        bounds: the range that the quantity can take; an interval is clipped to it.
        bound: set where units hold limits, see `Score.bound`.
    """
    result = estimate(units, draws, after)
    n, back = len(result.per_seed), math.exp if geometric else float
    if not np.isfinite(result.value[0]):
        return Score(None, n=n, better=better, note=joined(undefined, note), unit=unit)
    value, low, high = (back(float(v[0])) for v in (result.value, result.low, result.high))
    per_seed = (np.exp if geometric else columns)(result.per_seed[:, 0])
    known = tuple(map(float, per_seed)) if np.isfinite(per_seed).all() else ()
    score = Score(value, n=n, better=better, note=note, unit=unit, bound=bound, per_seed=known)
    if n < MIN_SEEDS and len(units) == n and all(len(u.rows) == 1 for u in units):
        return score
    score = replace(score, interval=interval_kind(n))
    if not (math.isfinite(low) and math.isfinite(high)):
        reason = f"without one of the seeds or in more than {UNDEFINED:.0%} of resamples"
        return replace(score, note=joined(note, f"no interval: undefined {reason}"))
    low, high = map(float, np.clip((low, high), *bounds))
    return replace(score, low=low, high=high)


def score_worst(
    picked: Score,
    concepts: Sequence[Sequence[Unit]],
    role: Role,
    *,
    geometric: bool = False,
) -> Score:
    """Return the score of the lowest of k targets (the highest of benign concepts), with an
    interval that accounts for selection after measurement.

    For the lowest of k true values: the least of the lower limits needs no correction, as the limit
    of the concept that is truly lowest is one of them; the least of the upper limits lies below it
    in 2.5 % of cases where each is taken at 2.5 % ÷ k (Bonferroni). For the highest the sides
    change places.

    Args:
        picked: the score of the concept that was picked.
        concepts: units of every concept, one figure each.
        geometric: as in `score_units`.
    """
    if picked.value is None or picked.low is None or picked.high is None or len(concepts) < 2:
        return picked
    shared = TAIL / len(concepts)
    pick, tails = (min, (TAIL, shared)) if role == "harmful" else (max, (shared, TAIL))
    limits = np.stack([(e.low[0], e.high[0]) for e in (estimate(u, tails=tails) for u in concepts)])
    if not np.isfinite(limits).all():
        reason = "no interval: one of the concepts has none"
        return replace(picked, low=None, high=None, note=joined(picked.note, reason))
    low, high = pick(map(float, limits[:, 0])), pick(map(float, limits[:, 1]))
    if geometric:
        low, high = math.exp(low), math.exp(high)
    return replace(picked, low=min(low, picked.value), high=max(high, picked.value))


def largest_unseen_share(units: Sequence[Unit]) -> float:
    """Return the largest share that is seen in no image of a seed with probability `TAIL`
    (Clopper and Pearson).
    """
    rows = [(unit.seed, len(unit.rows)) for unit in units]
    fewest = min(sum(n for seed, n in rows if seed == s) for s, _ in rows)
    return float(1 - TAIL ** (1 / fewest))


def score_share(
    units: Sequence[Unit],
    better: Better,
    *,
    limits: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Score:
    """`score_units` of a share of images. Where none of them (or each) shows what is counted, no
    resample differs: the interval is then as wide at least as Clopper and Pearson's of the images
    of one seed, as those of other seeds are of models that share much.

    Args:
        limits: the lowest share that may be there though each image shows it, and the highest
            though none does; None: by `largest_unseen_share`.
    """
    score = score_units(units, better, bounds=SHARE, **kwargs)
    if score.value is None or score.low is None or score.high is None:
        return score
    unseen = largest_unseen_share(units)
    least, most = limits or (1 - unseen, unseen)
    low = min(score.low, least) if score.value == 1 else score.low
    high = max(score.high, most) if score.value == 0 else score.high
    return replace(score, low=low, high=high)


def band(
    lines: Mapping[str, Sequence[Unit]],
    steps: Sequence[int],
    x: str,
    y: str,
    log: str = "",
    bounds: tuple[float, float] = UNBOUNDED,
) -> dict[str, Any]:
    """Return a record curve with a 95 % band: series ``model``, ``model:low`` and ``model:high``
    for every model of ``lines``.

    A unit's figures are values at its first steps; the mean ends where the shortest unit ends (an
    attack that diverged), so that no mean over survivors is shown. ``bounds``: as of `score_units`;
    those of a share, 0 and 1, also widen the band where no image (or each) shows what is counted,
    as `score_share` does.
    """
    out: dict[str, Any] = {"step": [float(s) for s in steps], "x": x, "y": y, "log": log}
    for model, units in lines.items():
        end = min(u.value.shape[-1] for u in units)
        result = estimate(units, DRAWS // 4, figures=end)
        low, high = np.clip(result.low, *bounds), np.clip(result.high, *bounds)
        if bounds == SHARE:
            unseen = largest_unseen_share(units)
            low = np.where(result.value == 1, np.minimum(low, 1 - unseen), low)
            high = np.where(result.value == 0, np.maximum(high, unseen), high)
        for suffix, values in {"": result.value, ":low": low, ":high": high}.items():
            shown = [float(v) if math.isfinite(v) else None for v in values]
            out[model + suffix] = shown + [None] * (len(steps) - end)
    return out
