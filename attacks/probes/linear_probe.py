"""The linear probe: fits a head on frozen features, with the optimizer of choice."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from attacks.options import LOSSES, check_budget, check_losses, resolve_loss
from attacks.probes.optimizers import OPTIMIZERS, Newton, Optimizer, Settings
from attacks.probes.problem import CrossEntropy, Problem, Squared
from attacks.trajectory import batch_rows, run
from attacks.tuning import Rate
from lab.core.data import Case, Kind, Split, Task
from lab.core.errors import Diverged, UserError
from lab.core.options import choice, count, flag, number
from lab.core.types import Attacker, Budget, Checkpoint, FeatureModel, Trajectory
from lab.models.activations import features

TRIALS = 7  # as conf/attacks/base/linear_probe.yaml
_REFERENCE_STEPS = 40  # Newton steps towards the optimum of cross entropy


class LinearProbe(Attacker):
    """Fits w [d, c] on features Z = model(x), which stay as they are; everything in float64, w_0 =
    0, no bias.

    Squared loss 1/(2n) ‖Zw − Y‖²_F (one-hot Y for classification), so that the Hessian is ZᵀZ/n, or
    softmax cross entropy. Snapshots hold ``train_loss`` (the objective, ridge term included),
    ``test_loss`` (data term only), ``excess_loss`` (above the optimum), accuracies for
    classification, and for squared loss ``norm_ratio`` = ‖w_t − w*‖² / ‖w_0 − w*‖² with w* the
    ridge or minimum-norm solution on the same model's features. For cross entropy the optimum is
    what 40 Newton steps reach, and an excess below it counts as zero.

    Args:
        name: key under ``attacks``.
        optimizer: one of `attacks.probes.optimizers.OPTIMIZERS`.
        loss: ``auto`` (squared for regression, cross entropy for classification) | ``squared`` |
            ``cross_entropy``.
        lr: ``auto`` or a number > 0, for the optimizers that have a learning rate.
        lr_trials: trials of the search for it.
        schedule: ``constant`` | ``cosine`` | ``linear``.
        batch_size: rows of a mini-batch; None = all. For the optimizers that have a learning rate.
        ridge: λ ≥ 0 as a multiple of the mean eigenvalue of ZᵀZ/n.
        standardize: centre and scale the features by the training rows' mean and deviation: an
            attacker that preconditions by hand. It changes the Hessian that was immunized.
        damping: of ``kfac`` only; > 0.
        tolerance: of ``whitening`` and ``newton`` only: drop directions whose singular value is
            below this share of the largest; None = the numerical rank.

    Raises:
        UserError: an option that is unknown, out of range, or not read by ``optimizer``.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep"})

    def __init__(
        self,
        *,
        name: str = "linear_probe",
        optimizer: str = "gd_exact_line_search",
        loss: str = "auto",
        lr: float | str = "auto",
        lr_trials: int = TRIALS,
        schedule: str = "constant",
        batch_size: int | None = None,
        ridge: float = 0.0,
        standardize: bool = False,
        damping: float | None = None,
        tolerance: float | None = None,
    ) -> None:
        key = f"attacks.{name}"
        self.name, self.key = name, key
        self.optimizer = choice(f"{key}.optimizer", optimizer, OPTIMIZERS)
        self.loss = choice(f"{key}.loss", loss, LOSSES)
        self.rate = Rate.parse(name, lr, lr_trials, schedule, TRIALS)
        self.batch_size = None if batch_size is None else count(f"{key}.batch_size", batch_size)
        self.ridge = number(f"{key}.ridge", ridge, 0)
        self.standardize = flag(f"{key}.standardize", standardize)
        self._check_unread(schedule, damping, tolerance)
        damping = (
            Settings.damping if damping is None else number(f"{key}.damping", damping, above=0)
        )
        tolerance = None if tolerance is None else number(f"{key}.tolerance", tolerance, 0, below=1)
        self.settings = Settings(damping, tolerance)

    def _check_unread(self, schedule: str, damping: float | None, tolerance: float | None) -> None:
        """A `UserError` for an option that the optimizer would ignore."""
        kind = OPTIMIZERS[self.optimizer]
        rates = {"lr": self.rate.lr, "batch_size": self.batch_size, "schedule": schedule}
        if self.rate.trials != TRIALS:
            rates["lr_trials"] = self.rate.trials
        for option, value in rates.items():
            if not kind.uses_rate and value not in (None, "constant"):
                fix = (
                    f"{self.optimizer} takes a line search over all rows and reads no "
                    f"{option}; leave it out."
                )
                raise UserError(f"{self.key}.{option}", value, fix)
        for option, value in {"damping": damping, "tolerance": tolerance}.items():
            if value is not None and option not in kind.uses:
                readers = " or ".join(
                    name for name, other in OPTIMIZERS.items() if option in other.uses
                )
                fix = f"only {readers} reads it; leave it out for {self.optimizer}."
                raise UserError(f"{self.key}.{option}", value, fix)

    def check(self, cases: tuple[Case, ...]) -> None:
        """Before anything runs: every task can be trained on with ``loss``.

        Raises:
            UserError: cross entropy on a regression, or targets that cannot be learnt.
        """
        check_losses(f"{self.key}.loss", self.loss, cases)

    def __call__(
        self,
        model: FeatureModel,
        task: Task,
        *,
        seed: int,
        budget: Budget,
        checkpoint: Checkpoint | None,
    ) -> Trajectory:
        """Train on ``task.train``; see `lab.core.types.Attacker`.

        Raises:
            UserError: a budget, loss or task that cannot be trained on.
            Diverged: the model's features are not finite.
        """
        check_budget(budget)
        loss = resolve_loss(f"{self.key}.loss", self.loss, task)
        train, test = (features(model, split.x) for split in (task.train, task.test))
        if not all(bool(torch.isfinite(z).all()) for z in (train, test)):
            raise Diverged(f"the features of task {task.name} are not finite", 0)
        dtype, z_train, z_test = train.dtype, train.to(torch.float64), test.to(torch.float64)
        scaling: dict[str, Tensor] = {}
        if self.standardize:
            mean, deviation = z_train.mean(0), z_train.std(0, unbiased=False)
            deviation[deviation <= torch.finfo(dtype).eps * mean.abs()] = (
                1.0  # constant column: only rounding is left
            )
            z_train, z_test = (z_train - mean) / deviation, (z_test - mean) / deviation
            scaling = {"mean": mean, "deviation": deviation}
        kind = OPTIMIZERS[self.optimizer]
        build = Squared if loss == "squared" else CrossEntropy
        problem = build(
            z_train, _targets(task.train, task), ridge=self.ridge, gram=kind.gram, dtype=dtype
        )
        learner = _Head(self, problem, kind(problem, self.settings), task, z_test, seed, scaling)
        return run(learner, self.rate, budget, checkpoint, self._info(loss, problem, learner))

    def _info(self, loss: str, problem: Problem, learner: _Head) -> dict:
        s = problem.spectrum.s
        return {
            "attack": self.name,
            "optimizer": self.optimizer,
            "loss": loss,
            "batch_size": self.batch_size,
            "ridge": self.ridge,
            "ridge_absolute": problem.ridge,
            "standardize": self.standardize,
            "parameters": problem.d * problem.c,
            "rank": len(s),
            "condition_number": float((s[0] / s[-1]).square()) if len(s) else None,
            "optimum": learner.optimum_loss,
        }


def _targets(split: Split, task: Task) -> Tensor:
    """Targets [n, c] in float64, one-hot for classification."""
    if task.kind == "classification":
        return torch.nn.functional.one_hot(split.y.long(), task.classes).to(torch.float64)
    return split.y.to(torch.float64).reshape(len(split), -1)


class _Head:
    """The probe's weights, their optimizer and what a snapshot measures (an
    `attacks.trajectory.Learner`).
    """

    def __init__(
        self,
        probe: LinearProbe,
        problem: Problem,
        optimizer: Optimizer,
        task: Task,
        z_test: Tensor,
        seed: int,
        scaling: dict[str, Tensor],
    ) -> None:
        self.problem, self.optimizer, self.task, self.seed = problem, optimizer, task, seed
        self.batch_size, self.scaling = probe.batch_size, scaling
        self.z_test, self.y_test = z_test, _targets(task.test, task)
        self.uses_rate = optimizer.uses_rate
        self.reset()
        self.optimum = problem.optimum() if isinstance(problem, Squared) else _reference(problem)
        self.optimum_loss = problem.loss(self.optimum)
        self.centre = self._centre(probe.optimizer)

    def _centre(self, name: str) -> float:
        """Where the search for a rate starts: 1/L, or for methods that fix the size of a step, that
        size.

        Adam and Adagrad move every weight by about the rate itself, so theirs is the largest entry
        of one exact step of steepest descent: it scales with the features as the weights do.
        """
        g = self.problem.gradient(self.w)
        if name in ("adam", "adagrad"):
            size = self.problem.line_minimum(self.w, g, -g) * float(g.abs().max())
            return size if size > 0 else 1.0
        bound = self.problem.smoothness()
        return 1 / bound if bound > 0 else 1.0

    def reset(self) -> None:
        self.w = self.problem.start()
        self.state = self.optimizer.init(self.w)

    def advance(self, step: int, rate: float) -> None:
        rows = batch_rows(step, self.problem.n, self.batch_size, self.seed, self.task.name)
        self.w, self.state = self.optimizer.step(self.w, self.state, rate, rows)

    def loss(self) -> float:
        return self.problem.loss(self.w)

    def measure(self) -> dict[str, float]:
        problem, w = self.problem, self.w
        values = {
            "train_loss": self.loss(),
            "test_loss": problem.data_loss(self.z_test, self.y_test, w),
        }
        if isinstance(problem, Squared):
            values["excess_loss"] = problem.excess(w, self.optimum)
            distance = float(self.optimum.square().sum())
            if distance > 0:
                values["norm_ratio"] = float((w - self.optimum).square().sum()) / distance
        else:
            values["excess_loss"] = max(values["train_loss"] - self.optimum_loss, 0.0)
            if math.isnan(values["train_loss"]):
                values["excess_loss"] = math.nan
        if self.task.kind == "classification":
            values["train_accuracy"] = _accuracy(problem.z @ w, self.task.train.y)
            values["test_accuracy"] = _accuracy(self.z_test @ w, self.task.test.y)
        return values

    def tensors(self) -> dict[str, Tensor]:
        return {"w": self.w, **{f"state.{k}": v for k, v in self.state.items()}}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.w = tensors["w"].clone()
        self.state = {
            k.removeprefix("state."): v.clone()
            for k, v in tensors.items()
            if k.startswith("state.")
        }

    def weights(self) -> dict[str, Tensor]:
        return {"head": self.w, **self.scaling}


def _accuracy(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(1) == y).double().mean())


def _reference(problem: Problem) -> Tensor:
    """Weights near the infimum of cross entropy: Newton until the gradient is 1e-10 of the first,
    or 40 steps.
    """
    w, newton = problem.start(), Newton(problem, Settings())
    first = float(problem.gradient(w).norm())
    state = newton.init(w)
    for _ in range(_REFERENCE_STEPS):
        if float(problem.gradient(w).norm()) <= 1e-10 * first:
            break
        w, state = newton.step(w, state, 0.0, None)
    return w
