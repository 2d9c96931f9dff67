"""The difference of one figure between two records, with an interval: paired over seeds where both
have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit
from scipy.stats import gmean

from eval.report.words import Record
from eval.stats.intervals import BOOTSTRAP_SEEDS, MIN_SEEDS, RESAMPLING_SEED, Floats

Mean = Callable[..., Any]
TABLE = "seed_values"  # of a record: one row per metric, one column per seed
_DRAWS = 5000


def difference(name: str, a: Record, b: Record) -> dict[str, Any]:
    """Return B − A of metric ``name``.

    Where both records know the value of every seed, have the same data in each, and share at least
    three, the seeds are paired: below ten, Student's t over the seeds' contributions to the
    difference (for geometric means by the delta method: u_i = G_B·ln b_i − G_A·ln a_i); from ten on
    the percentile bootstrap that draws the same seeds on both sides. Otherwise the two intervals
    are combined by MOVER (Zou & Donner 2008, method of variance estimates recovery) as if the
    records were independent, which is wider than a paired interval.

    Returns:
        ``difference`` (None where a record has no value); ``low`` and ``high``, its 95 % limits or
        None; ``p``, of the hypothesis that it is zero (None where the seeds are not paired);
        ``how`` they were computed; ``significant``: they are across seeds and exclude zero;
        ``ratio``: B ÷ A with its limits, of paired geometric means, which have a logarithmic
        scale: it is significant where the limits exclude one.
    """
    result: dict[str, Any] = dict.fromkeys(("difference", "low", "high", "p", "how", "ratio"))
    result["significant"] = False
    left, right = a["metrics"][name], b["metrics"][name]
    if left["value"] is None or right["value"] is None:
        return result
    result["difference"] = gap = right["value"] - left["value"]
    seeds = common_seeds(a, b)
    pair = np.array([_seed_values(record, name, seeds) for record in (a, b)], dtype=float)
    mean = _mean_of(pair, [left["value"], right["value"]])
    if mean is not None:
        low, high, result["p"] = _paired(pair, mean)
        method = "bootstrap" if len(seeds) >= BOOTSTRAP_SEEDS else "t"
        result["how"] = f"paired over {len(seeds)} seeds, {method}"
        result["significant"] = low > 0 or high < 0
        if mean is gmean:
            start, end, result["p"] = _paired(np.log(pair), np.mean)
            ends = math.exp(start), math.exp(end)
            result["ratio"] = dict(
                zip(("value", "low", "high"), (right["value"] / left["value"], *ends), strict=True)
            )
            result["significant"] = ends[0] > 1 or ends[1] < 1
    elif None in (left["low"], left["high"], right["low"], right["high"]):
        return result | {"how": "no interval: a record has none"}
    else:
        low = gap - math.hypot(right["value"] - right["low"], left["high"] - left["value"])
        high = gap + math.hypot(right["high"] - right["value"], left["value"] - left["low"])
        is_across = left["interval"] == right["interval"] == "across_seeds"
        result["how"] = "not paired, both intervals combined"
        if not is_across:
            result["how"] = "within seeds: no claim about other seeds"
        result["significant"] = is_across and (low > 0 or high < 0)
    return result | {"low": low, "high": high}


def common_seeds(a: Record, b: Record) -> list[int]:
    """Return seeds that both records ran on the same data."""
    left, right = (record["provenance"].get("data_hash") or {} for record in (a, b))
    shared = [str(seed) for seed in a["seeds"] if seed in b["seeds"]]
    return [int(s) for s in shared if left.get(s) is not None and left[s] == right.get(s)]


def _seed_values(record: Record, name: str, seeds: list[int]) -> list[float | None]:
    """Return a value per seed; None where it is not known, or where the record has more seeds."""
    rows = {row["metric"]: row for row in record["tables"].get(TABLE, [])}
    row = rows.get(name, {}) if len(seeds) == len(record["seeds"]) else {}
    return [row.get(str(seed)) for seed in seeds]


def _mean_of(pair: Floats, values: list[float]) -> Mean | None:
    """Return which mean over seeds gives the records' own values; None where none does (a quotient
    of means).
    """
    means: tuple[Mean, ...] = (np.mean, gmean) if (pair > 0).all() else (np.mean,)
    for mean in means if pair.shape[1] >= MIN_SEEDS else ():
        if np.allclose(mean(pair, axis=1), values, rtol=1e-9, atol=0):
            return mean
    return None


def _paired(pair: Floats, mean: Mean) -> tuple[float, float, float]:
    """Return 95 % limits of mean(b) − mean(a), and the two-sided p-value of zero."""
    (a, b), n = pair, pair.shape[1]
    if n >= BOOTSTRAP_SEEDS:  # the seed is fixed: the same records, the same limits
        chosen = np.random.default_rng(RESAMPLING_SEED).integers(0, n, (_DRAWS, n))
        gaps = mean(b[chosen], axis=1) - mean(a[chosen], axis=1)
        low, high = np.percentile(gaps, [2.5, 97.5])
        k = min((gaps <= 0).sum(), (gaps >= 0).sum())
        return float(low), float(high), min(1.0, 2 * (float(k) + 1) / (_DRAWS + 1))
    u = b - a if mean is np.mean else mean(b) * np.log(b) - mean(a) * np.log(a)
    gap = float(mean(b) - mean(a))
    error = float(u.std(ddof=1) / math.sqrt(n))
    half = float(stdtrit(n - 1, 0.975)) * error
    p = 2 * float(stdtr(n - 1, -abs(gap) / error)) if error else float(gap == 0)
    return gap - half, gap + half, p


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6(2),
    1979, 65-70): below 0.05, a difference is significant with an error of 5 % over all of them.
    """
    order, n = np.argsort(values), len(values)
    corrected = np.empty(n)
    corrected[order] = np.maximum.accumulate(np.sort(values) * np.arange(n, 0, -1)).clip(max=1)
    return corrected.tolist()
