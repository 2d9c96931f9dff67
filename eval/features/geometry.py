"""How the two tasks lie to each other: principal angles, spectrum of the pencil (K_H, K_P)
(docs/reference/methods.md §2.1).
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

from eval.stats.aggregate import baseline_suffix, load_run, samples, thin
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
    map; an invertible linear extractor cannot change it (there it is given for the baseline alone),
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
        values: dict[str, dict[tuple[int, str], float | None]] = {}  # metric → (seed, case) → value
        reasons: list[str] = []

        def visit(seed: int, case: Case) -> None:
            first = not out.tables["principal_angles"]
            tables = out if first else Scores(tables={"principal_angles": [], "pencil": []})
            for model in run.model_names:
                measured = self._measure(run, model, case, seed, tables, reasons)
                for name, value in measured.items():
                    values.setdefault(name + baseline_suffix(model), {})[seed, case.name] = value

        loaded = load_run(run, visit, label="angles")
        for name, by_case in sorted(values.items(), key=lambda item: item[0].endswith("_baseline")):
            groups = samples(loaded, partial(_value, by_case))
            reason = reasons[0] if reasons else "no case"
            dropped = sum(value is None for value in by_case.values())
            out.metrics[name] = score_samples(
                groups,
                "neutral",
                reason,
                unit="°" if "angle" in name else "",
                note=f"{dropped} of {len(by_case)} left out: {reason}" if dropped else None,
                bounds=(0.0, 90.0 if "angle" in name else math.inf),
            )
        return out

    def _measure(
        self, run: RunView, model_name: str, case: Case, seed: int, out: Scores, reasons: list[str]
    ) -> dict[str, float | None]:
        model = run.model(model_name, case, seed)
        benign = features(model, case.benign.train.x)
        angles, pencils = [], []
        for task in case.harmful:
            harmful = features(model, task.train.x)
            angles.append(
                principal_angles(benign, harmful, self.dim, self.energy) * (180 / math.pi)
            )
            base = {"model": model_name, "case": case.name, "seed": seed, "task": task.name}
            tabulated = task is case.harmful[0]
            out.tables["principal_angles"] += [
                base | {"index": i + 1, "degrees": v}
                for i, v in (thin(angles[-1].tolist()) if tabulated else ())
            ]
            if model_name != BASELINE and model.kind == "linear":
                continue  # a congruence: the pencil is the baseline's
            bound = rir_bound(benign, harmful)
            pencils.append(bound.kappa_m)
            reasons += [bound.reason] if bound.reason else []
            out.tables["pencil"] += [
                base | {"index": i + 1, "value": v}
                for i, v in (thin(bound.pencil.tolist()) if tabulated else ())
                if v > 0
            ]
        numbers: dict[str, float | None] = {
            "principal_angle_mean": sum(float(a.mean()) for a in angles) / len(angles),
            "principal_angle_largest": max(float(a.max()) for a in angles),
        }
        if pencils:
            finite = [k for k in pencils if k is not None]
            complete = len(finite) == len(pencils)
            numbers["kappa_pencil"] = sum(finite) / len(finite) if complete else None
        return numbers


def _value(values: dict[tuple[int, str], float | None], seed: int, case: Case) -> float | None:
    return values[seed, case.name]
