"""How the two tasks lie to each other: principal angles, spectrum of the pencil (K_H, K_P)
(docs/reference/methods.md §2.1).
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor

from eval.stats.aggregate import baseline_suffix, column_samples, load_run, thin
from eval.stats.intervals import score_samples
from lab.core.condition import principal_angles, rir_bound
from lab.core.config import Count, PositiveShare, Text, config
from lab.core.data import Case, Kind
from lab.core.types import BASELINE, RunMetric, RunView, Scores
from lab.models.activations import features


@config
class Geometry(RunMetric):
    """Principal angles between the leading subspaces of both tasks' features, and the pencil's
    eigenvalues.

    κ(M) = λ_max/λ_min of the pencil says beforehand whether a pair can be immunized by a linear
    map; an invertible linear extractor cannot change it (only the baseline's is reported),
    a deep one can. With several harmful tasks the mean is reported.

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
        figures: dict[tuple[int, str], dict[str, float | None]] = {}  # (seed, case) → name → value
        reasons: list[str] = []

        def visit(seed: int, case: Case) -> None:
            row: dict[str, float | None] = {}
            figures[seed, case.name] = row
            for name in run.model_names:
                model, end = run.model(name, case, seed), baseline_suffix(name)
                benign = features(model, case.benign.train.x)
                harmful = [features(model, task.train.x) for task in case.harmful]
                angles = [self._angles(benign, x) for x in harmful]
                row[f"principal_angle_mean{end}"] = fmean(float(a.mean()) for a in angles)
                row[f"principal_angle_largest{end}"] = max(float(a.max()) for a in angles)
                bounds = []
                if name == BASELINE or model.kind != "linear":  # a linear map keeps the pencil
                    bounds = [rir_bound(benign, x) for x in harmful]
                    known = [b.kappa_m for b in bounds if b.kappa_m is not None]
                    complete = len(known) == len(bounds)
                    row[f"kappa_pencil{end}"] = fmean(known) if complete else None
                reasons.extend(b.reason for b in bounds if b.reason)
                if len(figures) == 1:
                    labels = {"model": name, "case": case.name, "seed": seed}
                    labels["task"] = case.harmful[0].name
                    out.tables["principal_angles"] += _numbered(labels, angles[0], "degrees")
                    for bound in bounds[:1]:
                        rows = _numbered(labels, bound.pencil, "value")
                        out.tables["pencil"] += [row for row in rows if row["value"] > 0]

        loaded = load_run(run, visit, label="angles")
        names = next(iter(figures.values()))
        for name in sorted(names, key=lambda name: name.endswith("_baseline")):
            reason = reasons[0] if reasons else "no case"
            dropped = sum(row[name] is None for row in figures.values())
            out.metrics[name] = score_samples(
                column_samples(loaded, figures, name),
                "neutral",
                reason,
                unit="°" if "angle" in name else "",
                note=f"{dropped} of {len(figures)} left out: {reason}" if dropped else None,
                bounds=(0.0, 90.0 if "angle" in name else math.inf),
            )
        return out

    def _angles(self, benign: Tensor, harmful: Tensor) -> Tensor:
        return principal_angles(benign, harmful, self.dim, self.energy) * (180 / math.pi)


def _numbered(labels: dict[str, Any], values: Tensor, column: str) -> list[dict[str, Any]]:
    return [labels | {"index": i + 1, column: v} for i, v in thin(values.tolist())]
