"""Checks that the attackers share. Every failure names the config key, the value and the fix."""

from __future__ import annotations

from typing import Literal

import torch

from lab.core.data import Case, Task
from lab.core.errors import UserError
from lab.core.options import count
from lab.core.types import Budget

Loss = Literal["squared", "cross_entropy"]
LOSSES = ("auto", "squared", "cross_entropy")


def check_budget(budget: Budget) -> None:
    """Horizon, multiple and points of at least 1, 1 and 2."""
    count("budget.horizon", budget.horizon)
    count("budget.multiple", budget.multiple)
    count("budget.points", budget.points, 2)


def resolve_loss(key: str, loss: str, task: Task) -> Loss:
    """``auto`` is squared loss for regression and cross entropy for classification.

    Raises:
        UserError: cross entropy on a regression task, training targets of one class only, or a
            class index outside ``task.classes``.
    """
    if task.kind == "classification":
        seen = torch.unique(task.train.y)
        if len(seen) < 2:
            fix = (
                f"task {task.name} has one class only in its training targets; use more "
                "rows or another task."
            )
            raise UserError("scenario", task.name, fix)
        if int(seen.min()) < 0 or int(seen.max()) >= task.classes:
            fix = (
                f"class indices of task {task.name} must lie in 0 … {task.classes - 1}; "
                "mend the scenario."
            )
            raise UserError("scenario", task.name, fix)
    elif loss == "cross_entropy":
        raise UserError(key, loss, f"task {task.name} is a regression; use squared or auto.")
    if loss == "auto":
        return "squared" if task.kind == "regression" else "cross_entropy"
    return "squared" if loss == "squared" else "cross_entropy"


def check_losses(key: str, loss: str, cases: tuple[Case, ...]) -> None:
    """`resolve_loss` for every task, before anything runs."""
    for case in cases:
        for task in case.tasks:
            resolve_loss(key, loss, task)
