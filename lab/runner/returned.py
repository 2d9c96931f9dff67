"""Checks of what immunizers, attackers and metrics return, before anything is claimed from it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lab.core.errors import UserError
from lab.core.types import Budget, Score, Scores, Trajectory

BETTER = ("higher", "lower", "neutral")
INTERVALS = ("across_seeds", "within_seed", "point")


def check_immunized(after: Any, before: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the state of the model that the immunizer ``name`` returned.

    Raises:
        UserError: no model, or one whose parameters are not those of ``before``.
    """
    if not isinstance(after, torch.nn.Module):
        raise UserError("immunize", name, f"must return a model, not {type(after).__name__}.")
    state = after.state_dict()
    shapes = [{key: tuple(x.shape) for key, x in tensors.items()} for tensors in (state, before)]
    if shapes[0] != shapes[1]:
        differ = sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()})
        fix = f"returned a model whose {', '.join(differ[:3])} is not as in its input."
        raise UserError("immunize", name, fix)
    return state


def check_trajectory(trajectory: Any, attack: str, budget: Budget, side: int | None = None) -> None:
    """Check that a trajectory was measured at the snapshots of ``budget`` and is finite.

    An attack that was followed for too short a time would otherwise count as one that the model
    resisted.

    Args:
        side: of generated images in pixels, for a text-to-image model.

    Raises:
        UserError: names the attack and what to return instead.
    """

    def require(holds: bool, fix: str) -> None:
        if not holds:
            raise UserError(f"attacks.{attack}", attack, f"{fix} (lab.core.types.Trajectory).")

    require(isinstance(trajectory, Trajectory), "must return a Trajectory")
    steps, snapshots = trajectory.steps, list(budget.snapshots())
    short = steps == snapshots[: len(steps)] and trajectory.status == "diverged" and bool(steps)
    require(
        steps == snapshots or short,
        f"returned the steps {steps}, not the snapshots of the budget {snapshots}; only a "
        "diverged trajectory may end earlier",
    )
    for name in ("train_loss", "test_loss", *trajectory.values):
        values = trajectory.values.get(name, [])
        require(len(values) == len(steps), f"needs a value of {name} at each of its steps")
        require(
            all(math.isfinite(value) for value in values),
            f"returned a {name} that is not finite; end before it with the status diverged",
        )
    for family, images in trajectory.samples.items():
        size = [len(steps), "count", 3, side or "side", side or "side"]
        fits = images.dtype == torch.uint8 and images.ndim == 5 and len(images) == len(steps)
        fits = fits and (side is None or tuple(images.shape[2:]) == (3, side, side))
        require(fits, f"must return samples of {family} as torch.uint8 {size}")


def check_scores(scores: Any, metric: str) -> None:
    """Check that a record can hold what a metric returned.

    Raises:
        ValueError: names the metric; the run goes on without it.
    """

    def require(holds: bool, reason: str) -> None:
        if not holds:
            raise ValueError(f"eval.{metric} {reason} (lab.core.types.Scores)")

    require(isinstance(scores, Scores), f"must return Scores, not {type(scores).__name__}")
    for name, score in scores.metrics.items():
        require(bool(re.fullmatch("[a-z0-9_]+", name)), f"names a metric {name!r}: use snake case")
        require(isinstance(score, Score), f"must give {name} as a Score")
        words = score.better in BETTER and score.interval in INTERVALS
        require(words, f"must give {name} better {BETTER} and interval {INTERVALS}")
        require(score.value is not None or bool(score.note), f"gives {name} no value and no note")
        numbers = [x for x in (score.value, score.low, score.high) if x is not None]
        require(all(map(math.isfinite, numbers)), f"gives {name} a number that is not finite")
    for name, curve in scores.curves.items():
        lengths = {len(line) for key, line in curve.items() if key not in ("x", "y", "log")}
        require("step" in curve and len(lengths) == 1, f"must give every line of {name} a step")
