"""The difference of one figure between two records, with an interval: paired over seeds where both
have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from eval.report.words import Record
from eval.stats.intervals import BOOTSTRAP_SEEDS, MIN_SEEDS

Floats = NDArray[np.float64]
TABLE = "seed_values"  # of a record: one row per metric, one column per seed
_DRAWS = 5000


def _geometric(values: Floats, axis: int = -1) -> Any:
    return np.exp(np.log(values).mean(axis))


MEANS: dict[str, Callable[..., Any]] = {"mean": np.mean, "geometric mean": _geometric}


@dataclass(frozen=True)
class Difference:
    """B − A with 95 % limits (None: there are none), and how they were found.

    Attributes:
        ratio: B ÷ A with its limits, of paired geometric means, which live on a logarithmic scale.
        significant: an interval across seeds excludes zero; that of a ratio excludes one.
    """

    value: float
    low: float | None
    high: float | None
    how: str
    significant: bool
    ratio: tuple[float, float, float] | None = None


def difference(name: str, a: Record, b: Record) -> Difference | None:
    """Return B − A of metric ``name``; None where a record has no value.

    Where both records know the value of every seed, have the same data in each, and share at least
    three, the seeds are paired: below ten, Student's t over the seeds' contributions to the
    difference (for geometric means by the delta method: u_i = G_B·ln b_i − G_A·ln a_i); from ten on
    the percentile bootstrap that draws the same seeds on both sides. Otherwise the two intervals
    are combined by MOVER (Zou & Donner 2008, method of variance estimates recovery) as if the
    records were independent, which is wider than a paired interval.
    """
    left, right = a["metrics"][name], b["metrics"][name]
    if left["value"] is None or right["value"] is None:
        return None
    gap = right["value"] - left["value"]
    shared = common_seeds(a, b)
    values = [_seeds(record, name) for record in (a, b)]
    if all(v is not None and v.keys() == set(shared) for v in values) and len(shared) >= MIN_SEEDS:
        pair = [np.array([v[s] for s in shared]) for v in values if v is not None]
        mean = _mean_of(pair, [left["value"], right["value"]])
        if mean is not None:
            low, high = _paired(pair[0], pair[1], mean)
            method = "bootstrap" if len(shared) >= BOOTSTRAP_SEEDS else "t"
            how = f"paired over {len(shared)} seeds, {method}"
            if mean != "geometric mean":
                return Difference(gap, low, high, how, low > 0 or high < 0)
            limits = np.exp(_paired(np.log(pair[0]), np.log(pair[1]), "mean"))
            ratio = (right["value"] / left["value"], float(limits[0]), float(limits[1]))
            return Difference(gap, low, high, how, ratio[1] > 1 or ratio[2] < 1, ratio)
    if None in (left["low"], left["high"], right["low"], right["high"]):
        return Difference(gap, None, None, "no interval: a record has none", False)
    low = gap - math.hypot(right["value"] - right["low"], left["high"] - left["value"])
    high = gap + math.hypot(right["high"] - right["value"], left["value"] - left["low"])
    if not left["interval"] == right["interval"] == "across_seeds":
        return Difference(gap, low, high, "within seeds: no claim about other seeds", False)
    is_apart = low > 0 or high < 0
    return Difference(gap, low, high, "not paired, both intervals combined", is_apart)


def common_seeds(a: Record, b: Record) -> list[int]:
    """Return seeds that both records ran on the same data."""
    data = [record["provenance"].get("data_hash") or {} for record in (a, b)]
    hashes = {s: [d.get(str(s)) for d in data] for s in a["seeds"] if s in b["seeds"]}
    return [seed for seed, (left, right) in hashes.items() if left is not None and left == right]


def _seeds(record: Record, name: str) -> dict[int, float] | None:
    row = next((r for r in record["tables"].get(TABLE, []) if r["metric"] == name), None)
    if row is None or any(row.get(str(s)) is None for s in record["seeds"]):
        return None
    return {s: float(row[str(s)]) for s in record["seeds"]}


def _mean_of(pair: list[Floats], values: list[float]) -> str | None:
    """Return which mean over seeds gives the records' own values; None where none does (a quotient
    of means).
    """
    for name, mean in MEANS.items():
        if name == "mean" or all((v > 0).all() for v in pair):
            means = [float(mean(v)) for v in pair]
            if all(math.isclose(*both, rel_tol=1e-9) for both in zip(means, values, strict=True)):
                return name
    return None


def _paired(a: Floats, b: Floats, mean: str) -> tuple[float, float]:
    of, n = MEANS[mean], len(a)
    gap = float(of(b) - of(a))
    if n >= BOOTSTRAP_SEEDS:  # the seed is fixed: the same records, the same limits
        chosen = np.random.default_rng(20241220).integers(0, n, (_DRAWS, n))
        low, high = np.percentile(of(b[chosen], axis=1) - of(a[chosen], axis=1), [2.5, 97.5])
        return float(low), float(high)
    u = b - a if mean == "mean" else of(b) * np.log(b) - of(a) * np.log(a)
    half = float(stdtrit(n - 1, 0.975) * u.std(ddof=1) / math.sqrt(n)) if np.ptp(u) > 0 else 0.0
    return gap - half, gap + half
