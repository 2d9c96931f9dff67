"""The linear probe: fits a head on frozen features, with the optimizer of choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from attacks.feature_attack import FeatureAttack, FeatureLearner, accuracies
from attacks.probes.optimizers import OPTIMIZERS, newton_optimum
from attacks.probes.problem import CrossEntropy, Squared
from lab.core.condition import leading_directions
from lab.core.config import Count, Flag, NonNegative, Positive, Text, config
from lab.core.data import Split, Task
from lab.core.errors import Diverged, UserError
from lab.core.types import FeatureModel
from lab.models.activations import features

_READ_BY = {"damping": ["kfac"], "tolerance": ["whitening", "newton"], "rank": ["low_rank"]}


@config
class LinearProbe(FeatureAttack):
    """Fits w [d, c] on features Z = model(x), which stay as they are; everything in float64, w_0 =
    0, no bias.

    Squared loss 1/(2n) ‖Zw − Y‖²_F (one-hot Y for classification), so that the Hessian is ZᵀZ/n, or
    softmax cross entropy. Snapshots hold ``train_loss`` (the objective, ridge term included),
    ``test_loss`` (data term only), ``excess_loss`` (above the optimum), accuracies for
    classification, and for squared loss ``norm_ratio`` = ‖w_t − w*‖² / ‖w_0 − w*‖² with w* the
    ridge or minimum-norm solution on the same model's features. For cross entropy the optimum is
    what 40 Newton steps reach, and an excess below it counts as zero.

    Args:
        optimizer: one of `attacks.probes.optimizers.OPTIMIZERS`. ``sgd``, ``momentum``, ``adam``
            and ``adagrad`` have a learning rate and mini-batches, the others a line search.
        ridge: λ ≥ 0 as a multiple of the mean eigenvalue of ZᵀZ/n.
        standardize: centre and scale the features by the training rows' mean and deviation: an
            attacker that preconditions by hand. It changes the Hessian that was immunized.
        damping: of ``kfac``; None = 1e-3.
        tolerance: of ``whitening`` and ``newton``: drop directions whose singular value is below
            this share of the largest; None = the numerical rank.
        rank: of ``low_rank``; None = 10.
        rows: what the attacker trains on. ``all``; ``away``: the half of its rows with the largest
            angles to the dominant subspace of the features, so that its Hessian is better
            conditioned; ``drift``: mini-batches in the order of these angles, the largest first, so
            that the data drift towards the subspace in every epoch.
    """

    name: Text = "linear_probe"
    optimizer: Literal[
        "gd_exact_line_search",
        "sgd",
        "momentum",
        "adam",
        "adagrad",
        "lbfgs",
        "newton",
        "whitening",
        "kfac",
        "low_rank",
    ] = "gd_exact_line_search"
    lr_trials: Count = 7
    batch_size: Count | None = None
    ridge: NonNegative = 0.0
    standardize: Flag = False
    damping: Positive | None = None
    tolerance: Annotated[float, Field(strict=True, ge=0, lt=1)] | None = None
    rank: Count | None = None
    rows: Literal["all", "away", "drift"] = "all"

    def __post_init__(self) -> None:
        # the record would claim a rate or a batch size that nothing reads
        options = (self.lr, self.batch_size, self.schedule)
        if not OPTIMIZERS[self.optimizer].uses_rate and options != ("auto", None, "constant"):
            fix = "takes a line search over all rows: leave lr, batch_size and schedule out."
            raise UserError(f"attacks.{self.name}.optimizer", self.optimizer, fix)
        for option, optimizers in _READ_BY.items():
            if getattr(self, option) is not None and self.optimizer not in optimizers:
                fix = f"is read by optimizer={' and '.join(optimizers)} only."
                raise UserError(f"attacks.{self.name}.{option}", getattr(self, option), fix)
        if self.rows == "drift" and self.batch_size is None:
            fix = (
                "draws mini-batches: set batch_size, with optimizer sgd, momentum, adam or adagrad."
            )
            raise UserError(f"attacks.{self.name}.rows", self.rows, fix)

    def learner(self, model: FeatureModel, task: Task, seed: int) -> FeatureLearner:
        if self.rows != "all":
            order = _sort_by_angle(features(model, task.train.x))
            if self.rows == "away":
                order = order[: (len(order) + 1) // 2]
            task = replace(task, train=Split(task.train.x[order], task.train.y[order]))
        return _Head(self, model, task, seed)

    def batch(self, step: int, task: Task, seed: int) -> Tensor | None:
        """Return the row numbers of mini-batch ``step``, or None for all rows; ``drift`` takes rows
        in their order.
        """
        size = self.batch_size
        if self.rows != "drift" or size is None or size >= len(task.train):
            return super().batch(step, task, seed)
        start = step % (len(task.train) // size) * size
        return torch.arange(start, start + size)


def _sort_by_angle(z: Tensor, energy: float = 0.9) -> Tensor:
    """Return row numbers [n] of features [n, d] by their angle to the leading right-singular
    subspace that holds ``energy`` of ‖Z‖²_F, largest first.
    """
    z = z.to(torch.float64)
    inside = (z @ leading_directions(z, energy)).square().sum(1)
    return torch.argsort(inside / z.square().sum(1).clamp_min(1e-300), stable=True)


def _targets(split: Split, task: Task) -> Tensor:
    """Return targets [n, c] in float64, one-hot for classification."""
    if task.kind == "classification":
        return F.one_hot(split.y.long(), task.classes).to(torch.float64)
    return split.y.to(torch.float64).reshape(len(split), -1)


class _Head:
    """The probe's weights on fixed features (an `attacks.feature_attack.FeatureLearner`)."""

    def __init__(self, probe: LinearProbe, model: FeatureModel, task: Task, seed: int) -> None:
        self.probe, self.task, self.seed = probe, task, seed
        self.loss_name = probe.resolve_loss(task)
        train, test = (features(model, split.x) for split in (task.train, task.test))
        if not all(bool(torch.isfinite(z).all()) for z in (train, test)):
            raise Diverged(f"the features of task {task.name} are not finite", 0)
        z, self.z_test = train.to(torch.float64), test.to(torch.float64)
        self.scaling: dict[str, Tensor] = {}
        if probe.standardize:
            mean, deviation = z.mean(0), z.std(0, unbiased=False)
            # a constant column: only rounding is left
            deviation[deviation <= torch.finfo(train.dtype).eps * mean.abs()] = 1.0
            z, self.z_test = (z - mean) / deviation, (self.z_test - mean) / deviation
            self.scaling = {"mean": mean, "deviation": deviation}
        kind = OPTIMIZERS[probe.optimizer]
        self.problem = (Squared if self.loss_name == "squared" else CrossEntropy)(
            z, _targets(task.train, task), ridge=probe.ridge, gram=kind.gram, dtype=train.dtype
        )
        self.optimizer = kind(
            self.problem,
            damping=probe.damping or 1e-3,
            tolerance=probe.tolerance,
            rank=probe.rank or 10,
        )
        self.uses_rate, self.centre = kind.uses_rate, self.optimizer.centre()
        self.reset, self.tensors = self.optimizer.reset, self.optimizer.tensors
        self.restore = self.optimizer.restore
        self.optimum = (
            self.problem.optimum()
            if isinstance(self.problem, Squared)
            else newton_optimum(self.problem)
        )

    def info(self) -> dict[str, Any]:
        s = self.problem.spectrum.s
        return {
            "attack": self.probe.name,
            "optimizer": self.probe.optimizer,
            "loss": self.loss_name,
            "batch_size": self.probe.batch_size,
            "ridge": self.probe.ridge,
            "ridge_absolute": self.problem.ridge,
            "standardize": self.probe.standardize,
            "parameters": self.problem.d * self.problem.c,
            "rank": len(s),
            "condition_number": float((s[0] / s[-1]).square()) if len(s) else None,
            "optimum": self.problem.loss(self.optimum),
        }

    def advance(self, step: int, rate: float) -> None:
        self.optimizer.step(rate, self.probe.batch(step, self.task, self.seed))

    def loss(self) -> float:
        return self.problem.loss(self.optimizer.w)

    def measure(self) -> dict[str, float]:
        problem, w, task = self.problem, self.optimizer.w, self.task
        values = {
            "train_loss": self.loss(),
            "test_loss": problem.data_loss(self.z_test, _targets(task.test, task), w),
            "excess_loss": problem.excess(w, self.optimum),
        }
        distance = float(self.optimum.square().sum())
        if isinstance(problem, Squared) and distance > 0:
            values["norm_ratio"] = float((w - self.optimum).square().sum()) / distance
        return values | accuracies(task, problem.z @ w, self.z_test @ w)

    def weights(self) -> dict[str, Tensor]:
        return {"head": self.optimizer.w, **self.scaling}
