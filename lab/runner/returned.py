"""What immunizers, attackers and metrics return, checked before figures are made of it: own ones
may do anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lab.core.errors import UserError
from lab.core.types import Budget, Score, Scores, Trajectory

_SAID = {
    "better": ("higher", "lower", "neutral"),
    "interval": ("across_seeds", "within_seed", "point"),
}


def check_immunized(after: Any, before: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """The state of the model that an immunizer returned.

    Raises:
        UserError: no model, or one of other parameters than the model ``before``.
    """
    if not callable(getattr(after, "state_dict", None)):
        raise UserError(
            "immunize",
            model_name,
            f"returned {type(after).__name__}, not a model (lab.core.types.Immunizer).",
        )
    state = after.state_dict()
    other = {*state} ^ {*before} or {
        name for name, tensor in state.items() if tensor.shape != before[name].shape
    }
    if other:
        told = (
            f"returned a model whose {', '.join(sorted(other)[:3])} is not as in the "
            "model that it was given."
        )
        raise UserError("immunize", model_name, told)
    return state


def check_trajectory(found: Any, attack: str, budget: Budget, side: int | None = None) -> None:
    """Whether ``found`` is what `lab.core.types.Trajectory` says. An attack that was followed for
    too short a time, for one, would be taken for one that the model held off.

    Args:
        side: of the pictures in pixels, where the model paints some.

    Raises:
        UserError: another type, an unknown status, other steps than the snapshots of ``budget`` (of
            a diverged one: than its first), quantities or pictures that are missing, too few, not
            finite or of another size.
    """
    key = f"attacks.{attack}"
    if not isinstance(found, Trajectory):
        raise UserError(
            key, type(found).__name__, "is what it returned, not a lab.core.types.Trajectory."
        )
    if found.status not in ("ok", "diverged"):
        raise UserError(
            key, found.status, "is the status of its trajectory: must be ok or diverged."
        )
    asked, points = list(budget.snapshots()), len(found.steps)
    if (
        not points
        or found.steps != asked[:points]
        or (found.status == "ok" and points < len(asked))
    ):
        told = f"these steps of its trajectory must be the snapshots of the budget, {asked}"
        raise UserError(
            key,
            found.steps,
            f"{told}; only one that diverged may end before (lab.core.types.Trajectory).",
        )
    for name in ("train_loss", "test_loss"):
        if name not in found.values:
            raise UserError(
                key,
                sorted(found.values),
                f"values of its trajectory lack {name} (lab.core.types.Trajectory).",
            )
    for name, values in found.values.items():
        if len(values) != points:
            raise UserError(
                key, name, f"has {len(values)} values at {points} steps of its trajectory."
            )
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            told = (
                "has a value that is no finite number; a trajectory ends before it, with "
                "the status diverged."
            )
            raise UserError(key, name, told)
    for family, pictures in found.samples.items():
        size = [points, "pictures", 3, *([side] * 2 if side else ["side", "side"])]
        fits = pictures.dtype == torch.uint8 and pictures.ndim == 5 and len(pictures) == points
        if not fits or (side and list(pictures.shape[2:]) != [3, side, side]):
            told = (
                f"has samples of {pictures.dtype} {list(pictures.shape)} by {family}, not "
                "of torch.uint8"
            )
            raise UserError(key, attack, f"{told} [{', '.join(map(str, size))}].")
    try:
        json.dumps(found.info)
    except TypeError as error:
        raise UserError(key, "info", f"of its trajectory goes into a record: {error}.") from error


def check_scores(found: Any, metric: str) -> None:
    """Whether ``found`` is what `lab.core.types.Scores` says and can stand in a record.

    Raises:
        ValueError: names the metric family and what cannot; the run goes on without the family.
    """

    def need(holds: bool, told: str) -> None:
        if not holds:
            raise ValueError(f"eval.{metric} {told} (lab.core.types.Scores)")

    need(isinstance(found, Scores), f"returned {type(found).__name__}, not Scores")
    for name, score in found.metrics.items():
        need(
            isinstance(name, str) and bool(re.fullmatch("[a-z0-9_]+", name)),
            f"names a metric {name!r}: snake case",
        )
        need(isinstance(score, Score), f"gives {name} as {type(score).__name__}, not as a Score")
        for option, words in _SAID.items():
            need(
                getattr(score, option) in words,
                f"gives {name} {option}={getattr(score, option)!r}, none of {words}",
            )
        need(
            score.value is not None or bool(score.note),
            f"gives {name} no value and no note with the reason",
        )
        for end in ("value", "low", "high"):
            number = getattr(score, end)
            real = (
                isinstance(number, int | float)
                and not isinstance(number, bool)
                and math.isfinite(number)
            )
            need(number is None or real, f"gives {name} the {end} {number!r}, no finite number")
    for name, curve in found.curves.items():
        lines = {key: line for key, line in curve.items() if key not in ("x", "y", "log")}
        need("step" in lines, f"gives the curve {name} no step")
        for key, line in lines.items():
            told = (
                f"gives the curve {name} {len(line)} values of {key} at {len(lines['step'])} steps"
            )
            need(len(line) == len(lines["step"]), told)
    for name, rows in found.tables.items():
        need(
            all(isinstance(row, Mapping) for row in rows),
            f"gives the table {name} a row that is no mapping",
        )
