"""How the two tasks lie to each other: principal angles, spectrum of the pencil (K_H, K_P)
(docs/methods.md §2.1).
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from eval.stats.aggregate import Cached, model_name_names, samples, score_or_reason, thin
from lab.core.condition import principal_angles, rir_bound
from lab.core.data import Case, Kind
from lab.core.options import count, number
from lab.core.types import BASELINE, RunMetric, RunView, Score, Scores
from lab.models.activations import features

Found = dict[str, dict[tuple[int, str], float | None]]  # quantity → (seed, case) → value
NAMES = (
    ("principal_angle_mean", "mean", "°"),
    ("principal_angle_largest", "largest", "°"),
    ("kappa_pencil", "kappa_m", ""),
)


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
    needs_models: ClassVar[int] = 1
    needs_attack: ClassVar[bool] = False

    def __init__(self, name: str = "geometry", energy: float = 0.9, dim: int | None = None) -> None:
        self.name, self.energy = name, number(f"eval.{name}.energy", energy, above=0, high=1)
        self.dim = None if dim is None else count(f"eval.{name}.dim", dim)

    def __call__(self, run: RunView) -> Scores:
        out = Scores(tables={"principal_angles": [], "pencil": []})
        found: dict[str, Found] = {
            model_name: {"mean": {}, "largest": {}, "kappa_m": {}}
            for model_name in model_name_names(run)
        }
        reasons: list[str] = []

        def visit(seed: int, case: Case) -> None:
            first = not out.tables["principal_angles"]
            for model_name, numbers in found.items():
                for key, value in self._measure(
                    run, model_name, case, seed, out if first else None, reasons
                ).items():
                    numbers[key][seed, case.name] = value

        view = Cached(run, visit, label="angles")
        for model_name, numbers in found.items():
            end = "_baseline" if model_name == BASELINE else ""
            for name, key, unit in NAMES:
                if numbers[key]:
                    reason = reasons[0] if reasons else "no case"
                    out.metrics[name + end] = _score(view, numbers[key], reason, unit)
        return out

    def _measure(
        self,
        run: RunView,
        model_name: str,
        case: Case,
        seed: int,
        out: Scores | None,
        reasons: list[str],
    ) -> dict[str, float | None]:
        model = run.model(model_name, case, seed)
        benign = features(model, case.benign.train.x)
        angles: list[Tensor] = []
        kappa_m: list[float | None] = []
        for task in case.harmful:
            harmful = features(model, task.train.x)
            angle = principal_angles(benign, harmful, self.dim, self.energy) * (180 / math.pi)
            angles.append(angle)
            base = {"model": model_name, "case": case.name, "seed": seed, "task": task.name}
            if out is not None and task is case.harmful[0]:
                degrees = thin(angle.tolist())
                out.tables["principal_angles"] += [
                    base | {"index": i + 1, "degrees": v} for i, v in degrees
                ]
            if model_name != BASELINE and model.kind == "linear":
                continue  # a congruence: the pencil is the baseline's
            bound = rir_bound(benign, harmful)
            kappa_m.append(bound.kappa_m)
            reasons += [bound.reason] if bound.reason else []
            if out is not None and task is case.harmful[0]:
                pencil = [(i, v) for i, v in thin(bound.pencil.tolist()) if v > 0]
                out.tables["pencil"] += [base | {"index": i + 1, "value": v} for i, v in pencil]
        numbers: dict[str, float | None] = {
            "mean": sum(float(a.mean()) for a in angles) / len(angles),
            "largest": max(float(a.max()) for a in angles),
        }
        if kappa_m:
            finite = [k for k in kappa_m if k is not None]
            numbers["kappa_m"] = sum(finite) / len(finite) if len(finite) == len(kappa_m) else None
        return numbers


def _score(
    run: RunView, found: dict[tuple[int, str], float | None], reason: str, unit: str
) -> Score:
    groups = samples(run, lambda seed, case: found[(seed, case.name)])
    dropped = sum(v is None for v in found.values())
    note = f"{dropped} of {len(found)} left out: {reason}" if dropped else None
    return score_or_reason(
        groups, "neutral", reason, unit=unit, note=note, bounds=(0.0, 90.0 if unit else math.inf)
    )
