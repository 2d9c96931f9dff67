"""How the two tasks lie to each other: principal angles, spectrum of the pencil (K_H, K_P)
(docs/reference/methods.md §2.1).
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor

from eval.stats.aggregate import baseline_suffix, grouped, thin, walk
from eval.stats.intervals import score_samples
from lab.core.condition import principal_angles, rir_bound
from lab.core.config import Count, PositiveShare, Text, config
from lab.core.data import Kind
from lab.core.types import BASELINE, RunMetric, RunView, Scores
from lab.models.activations import features


@config
class Geometry(RunMetric):
    """Principal angles between the leading subspaces of both tasks' features, and the pencil's
    eigenvalues.

    κ(M) = λ_max/λ_min of the pencil says beforehand whether a pair can be immunized by a linear
    map; an invertible linear extractor cannot change it (only the baseline's is reported),
    a deep one can. Of several harmful tasks the means are reported, and the largest of all angles.

    Args:
        energy: share of ‖X‖²_F that the leading subspaces hold, in (0, 1].
        dim: number of leading directions instead of ``energy``.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep"})

    name: Text = "geometry"
    energy: PositiveShare = 0.9
    dim: Count | None = None

    def __call__(self, run: RunView) -> Scores:
        out = Scores(tables={"principal_angles": [], "pencil": []})
        figures: dict[str, dict[tuple[int, str], float | None]] = {}  # name → (seed, case) → value
        reasons: list[str] = []
        for seed, case in walk(run, "angles"):
            labels = {"case": case.name, "seed": seed, "task": case.harmful[0].name}
            is_first = not figures
            for name in run.model_names:
                model, end = run.model(name, case, seed), baseline_suffix(name)
                benign = features(model, case.benign.train.x)
                harmful = [features(model, task.train.x) for task in case.harmful]
                angles = [
                    principal_angles(benign, x, self.dim, self.energy) * (180 / math.pi)
                    for x in harmful
                ]
                row: dict[str, float | None] = {
                    "principal_angle_mean": fmean(float(a.mean()) for a in angles),
                    "principal_angle_largest": max(float(a.max()) for a in angles),
                }
                bounds = []
                if name == BASELINE or model.kind != "linear":  # a linear map keeps the pencil
                    bounds = [rir_bound(benign, x) for x in harmful]
                    known = [b.kappa_m for b in bounds if b.kappa_m is not None]
                    row["kappa_pencil"] = fmean(known) if len(known) == len(bounds) else None
                reasons += [b.reason for b in bounds if b.reason]
                for quantity, value in row.items():
                    figures.setdefault(f"{quantity}{end}", {})[seed, case.name] = value
                if is_first:
                    own = {"model": name, **labels}
                    out.tables["principal_angles"] += _numbered(own, angles[0], "degrees")
                    for bound in bounds[:1]:
                        numbers = _numbered(own, bound.pencil, "value")
                        out.tables["pencil"] += [line for line in numbers if line["value"] > 0]
        for name in sorted(figures, key=lambda name: name.endswith("_baseline")):
            values, reason = figures[name], reasons[0] if reasons else "no case"
            dropped = [*values.values()].count(None)
            out.metrics[name] = score_samples(
                grouped(run, values),
                "neutral",
                reason,
                unit="°" if "angle" in name else "",
                note=f"{dropped} of {len(values)} left out: {reason}" if dropped else None,
                bounds=(0.0, 90.0 if "angle" in name else math.inf),
            )
        return out


def _numbered(labels: dict[str, Any], values: Tensor, column: str) -> list[dict[str, Any]]:
    return [labels | {"index": i + 1, column: v} for i, v in thin(values.tolist())]
