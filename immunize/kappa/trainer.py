"""What all gradient immunizers share: options of the loop, the loop, and the head of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from immunize.kappa.engines import DeepEngine, LinearEngine
from lab.core.condition import (
    condition_number,
    numerical_rank,
    relative_immunization_ratio,
    rir_bound,
    row_groups,
    singular_values,
)
from lab.core.config import AsList, Count, Positive, Text, config
from lab.core.data import Case, Kind, Task
from lab.core.errors import Diverged
from lab.core.seeding import batch_rows, derive
from lab.core.training import Row, restore_state, schedule_factor, state_tensors, train
from lab.core.types import Budget, Checkpoint, FeatureModel, Immunizer, Log

TINY = 1e-300
HEAD_STEP = 0.5  # heads move by this share of their stable step 1/L, so that they cannot diverge
FIT_STEPS = 50  # L-BFGS iterations of the first fit; the head goes on moving afterwards
# relative to σ_1 of the Gram matrix: keeps the first head small along noise directions
FIT_RIDGE = 1e-3

Layers = Annotated[tuple[Text, ...], AsList, Field(min_length=1)]
"""Names of blocks; a single one is a list of one."""


@config
class GradientImmunizer(Immunizer[FeatureModel, Case]):
    """Moves the weights step by step.

    Args:
        lr: step size η.
        epochs: passes over the benign task's rows.
        steps: number of updates instead, if set.
        batch_size: rows of each task per step.
        lr_schedule: ``constant`` or ``cosine`` to 0.
        optimizer: ``plain`` θ ← θ − η·gradient (Alg. 1) or ``adam`` (the release).
        layers: blocks that move, by name or as a count from the end; all if None.
        log_points: about how many times κ of the whole training data is measured.
        checkpoint_every: steps between saved states.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep"})

    name: Text
    lr: Positive = 5e-3
    epochs: Count = 30
    steps: Count | None = None
    batch_size: Annotated[int, Field(strict=True, ge=2)] = 64
    lr_schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["plain", "adam"] = "plain"
    layers: Count | Layers | None = None
    log_points: Annotated[int, Field(strict=True, ge=2)] = 25
    checkpoint_every: Count = 200

    @abstractmethod
    def trainer(self, model: FeatureModel, case: Case, seed: int) -> KappaTrainer:
        """Return what trains a copy of ``model``."""

    def __call__(
        self, model: FeatureModel, case: Case, *, seed: int, checkpoint: Checkpoint | None, log: Log
    ) -> FeatureModel:
        """Return immunized weights; see `lab.core.types.Immunizer`.

        Raises:
            Diverged: features, gradients or weights left the finite numbers.
        """
        trainer = self.trainer(model, case, seed)
        train(
            trainer,
            trainer.steps + 1,
            label=self.name,
            checkpoint=checkpoint,
            log=log,
            save_every=self.checkpoint_every,
        )
        return trainer.engine.export()


class Head:
    """w [d, c] with its loss on features y [n, d]: squared for regression, cross-entropy else. No
    intercept: the Hessian of the probe is YᵀY.
    """

    def __init__(self, task: Task, dim: int) -> None:
        self.regression = task.kind == "regression"
        self.targets = task.train.y
        self.classes = 1 if self.regression else max(task.classes, 2)
        self.w = torch.zeros(dim, self.classes, dtype=torch.float64)

    def loss(self, y: Tensor, rows: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the mean loss, its gradient with respect to features [n, d] and to w [d, c]."""
        n = len(rows)
        target = self.targets[rows]
        out = y @ self.w
        if self.regression:
            residual = out - target.to(torch.float64)[:, None]
            value = residual.square().mean() / 2
            slope = residual / n
        else:
            value = F.cross_entropy(out, target)
            slope = (out.softmax(1) - F.one_hot(target, self.classes)) / n
        return float(value), slope @ self.w.T, y.T @ slope

    @staticmethod
    def lipschitz(y: Tensor) -> float:
        """Return the largest curvature of the squared loss in w: σ_1(YᵀY)/n (at least that of
        cross-entropy).
        """
        gram = y @ y.T if y.shape[0] < y.shape[1] else y.T @ y
        return float(torch.linalg.matrix_norm(gram, 2)) / y.shape[0]

    def descend(self, y: Tensor, gradient: Tensor, share: float) -> None:
        """Move w by ``share`` of the stable step 1/L on features ``y``."""
        self.w = self.w - share / max(self.lipschitz(y), TINY) * gradient

    def fit(self, y: Tensor) -> None:
        """Take the head that the original features have: ridge solution, or logistic regression by
        L-BFGS.
        """
        y = y.to(torch.float64)
        n, d = y.shape
        ridge = FIT_RIDGE * self.lipschitz(y) * n
        if self.regression:
            target = self.targets.to(torch.float64)[:, None]
            eye = torch.eye(min(n, d), dtype=torch.float64)
            if n < d:
                self.w = y.T @ torch.linalg.solve(y @ y.T + ridge * eye, target)
            else:
                self.w = torch.linalg.solve(y.T @ y + ridge * eye, y.T @ target)
            return
        w = self.w.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([w], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(y @ w, self.targets) + ridge / n / 2 * w.square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        self.w = w.detach()


class KappaTrainer(ABC):
    """Descends an objective on a copy of ``model`` (a `Trainee`).

    Logs condition numbers of the whole training data. Task 0 is the benign one.
    """

    heads: dict[int, Head]  # by number of the task
    values: dict[str, Any]  # what else a step reads of the step before, JSON-able

    def __init__(
        self, options: GradientImmunizer, model: FeatureModel, case: Case, seed: int
    ) -> None:
        self.options, self.case, self.seed = options, case, seed
        kind = LinearEngine if model.kind == "linear" else DeepEngine
        self.engine: LinearEngine | DeepEngine = kind(model, case, options.layers)
        rows = len(case.benign.train)
        self.steps = options.steps or options.epochs * (rows // min(options.batch_size, rows))
        optimizer = torch.optim.Adam if options.optimizer == "adam" else torch.optim.SGD
        self.optimizer = optimizer(self.engine.parameters, lr=options.lr)
        self.points = Budget(self.steps, 1, options.log_points).snapshots()
        self.ranks: dict[int, int] = {}
        self.before = [self._kappa(task) for task in range(len(case.tasks))]
        self.bounds: list[float | None] = [None] * len(case.harmful)
        if isinstance(self.engine, LinearEngine):
            x, theta = self.engine.inputs, self.engine.theta.detach()
            if numerical_rank(singular_values(x[0]), x[0].shape) == x[0].shape[1] == theta.shape[1]:
                self.bounds = [rir_bound(x[0], x_h, theta).value for x_h in x[1:]]

    @abstractmethod
    def descend(self, step: int) -> Row:
        """Add the gradients of ``step`` to the engine and return what is logged.

        Raises:
            FloatingPointError: numbers that are not finite.
        """

    def batch(self, task: int, step: int) -> Tensor:
        """Return the row numbers of mini-batch ``step`` of a task."""
        rows = self.case.tasks[task].train
        label = f"{task}/{self.case.tasks[task].name}"
        size = min(self.options.batch_size, len(rows))
        return batch_rows(step, len(rows), size, self.seed, "rows", label)

    def supervise(self, y: Tensor, rows: Tensor, weight: float) -> float:
        """Step jointly on the benign loss: a gradient for the features, and the head moves."""
        value, by_feature, by_head = self.heads[0].loss(y, rows)
        self.engine.add(0, weight * by_feature)
        self.heads[0].descend(y, by_head, HEAD_STEP)
        return value

    def _kappa(self, task: int) -> float:
        """Return κ of all training rows, ``rank`` definition; for deep models the mean over groups
        (docs/reference/methods.md §2).

        Raises:
            FloatingPointError: a numerical rank below that of θ_0. An invertible θ keeps the rank,
                so κ has left what float64 can resolve, and a κ over the directions that remain
                would look small.
        """
        y = self.engine.features(task)
        if not bool(torch.isfinite(y).all()):
            raise FloatingPointError("features are not finite")
        if isinstance(self.engine, DeepEngine):
            if not bool(y.any(dim=1).all()):
                raise FloatingPointError("all features of some row are zero")
            groups = row_groups(len(y), seed=derive(self.seed, "groups", task))
            values = [condition_number(y[rows]) for rows in groups]
            return sum(values) / len(values)
        s = singular_values(y)
        rank = numerical_rank(s, y.shape)
        first = self.ranks.setdefault(task, rank)
        if rank < first:
            raise FloatingPointError(
                f"κ of task {task} is beyond float64: numerical rank {rank}, {first} at the start"
            )
        return float((s[0] / s[rank - 1]) ** 2)

    def step(self, step: int) -> Row | None:
        """Measure and update, or measure alone after the last update.

        Raises:
            Diverged: numbers left the finite range; carries the last good step.
        """
        try:
            row = self.descend(step)
            if step in self.points:
                after = [self._kappa(task) for task in range(len(self.before))]
                row = immunization_row(after, self.before, self.bounds) | dict(row)
            if step < self.steps:
                self.engine.finish()
                factor = schedule_factor(self.options.lr_schedule, step, self.steps)
                self.optimizer.param_groups[0]["lr"] = self.options.lr * factor
                self.optimizer.step()
                self.optimizer.zero_grad()
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            reason = f"{self.options.name} left the finite numbers at step {step}: {error}"
            raise Diverged(reason, max(step - 1, 0)) from error
        return row if step in self.points else None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        heads = {f"head.{task}": head.w for task, head in self.heads.items()}
        return heads | state_tensors(self.engine.parameters, self.optimizer), self.values

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        restore_state(self.engine.parameters, self.optimizer, tensors)
        self.values = values
        for task, head in self.heads.items():
            head.w = tensors[f"head.{task}"].clone()


def immunization_row(
    after: Sequence[float], before: Sequence[float], bounds: Sequence[float | None]
) -> dict[str, float]:
    """Return κ, RIR and its share of the bound, for the least immunized harmful task.

    Args:
        after: κ of every task, the benign one first.
        before: the same of θ_0.
        bounds: RIR* of every harmful task, where it is known.
    """
    rirs = [
        relative_immunization_ratio(kappa, first, after[0], before[0])
        for kappa, first in zip(after[1:], before[1:], strict=True)
    ]
    worst = rirs.index(min(rirs))
    row = {"rir": rirs[worst], "kappa_harmful": after[1 + worst], "kappa_benign": after[0]}
    bound = bounds[worst]
    return row if bound is None else row | {"rir_bound_ratio": rirs[worst] / bound}
