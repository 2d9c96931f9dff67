"""Attacks on feature extractors: shared options, snapshots, resume."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from attacks.search import RateSearch, Trials, run_trials
from lab.core.config import Count, Positive, Text, config
from lab.core.data import Case, Kind, Task
from lab.core.errors import Diverged, UserError
from lab.core.seeding import batch_rows
from lab.core.training import Schedule, progress, schedule_factor, train
from lab.core.types import Attacker, Budget, Checkpoint, FeatureModel, Trajectory

# seconds between two saves of a running attack; what is saved never changes the result
SAVE_SECONDS = 20.0
# an attack whose training loss exceeds this multiple of its first value has diverged
BLOW_UP = 1e6

Loss = Literal["squared", "cross_entropy"]


@config
class FeatureAttack(Attacker[FeatureModel, Task]):
    """Options of every attacker of a feature extractor.

    Args:
        name: key under ``attacks``.
        loss: ``auto`` (squared for regression, cross entropy for classification) | ``squared`` (½
            mean squared error, one-hot targets for classification) | ``cross_entropy``.
        lr: ``auto`` for a search, or a number > 0.
        lr_trials: trials of the search, each as long as the attack itself; equal in every model.
        schedule: factor on the rate over the whole trajectory.
        batch_size: rows of a mini-batch; None = all.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep"})

    name: Text
    loss: Literal["auto", "squared", "cross_entropy"] = "auto"
    lr: Positive | Literal["auto"] = "auto"
    lr_trials: Count = 5
    schedule: Schedule = "constant"
    batch_size: Count | None = 64

    @abstractmethod
    def learner(self, model: FeatureModel, task: Task, seed: int) -> FeatureLearner:
        """Return what is trained on ``task``, a part of its own copy of ``model``.

        Raises:
            UserError: a task or a model that cannot be trained.
            Diverged: the model's features are not finite.
        """

    def __call__(
        self,
        model: FeatureModel,
        task: Task,
        *,
        seed: int,
        budget: Budget,
        checkpoint: Checkpoint | None,
    ) -> Trajectory:
        """Train on ``task.train``; see `lab.core.types.Attacker` and `run`."""
        return run(self.learner(model, task, seed), self, task.name, budget, checkpoint)

    def resolve_loss(self, task: Task) -> Loss:
        """Return the loss for ``task``.

        Raises:
            UserError: cross entropy on a regression, or training targets of one class only.
        """
        regression = task.kind == "regression"
        if not regression and len(torch.unique(task.train.y)) < 2:
            fix = "has one class only in its training targets; use more rows or another task."
            raise UserError("scenario", task.name, fix)
        if regression and self.loss == "cross_entropy":
            fix = f"task {task.name} is a regression; use squared or auto."
            raise UserError(f"attacks.{self.name}.loss", self.loss, fix)
        if self.loss != "auto":
            return self.loss
        return "squared" if regression else "cross_entropy"

    def check(self, cases: tuple[Case, ...]) -> None:
        """Resolve the loss for every task, before anything runs."""
        for case in cases:
            for task in case.tasks:
                self.resolve_loss(task)

    def batch(self, step: int, task: Task, seed: int) -> Tensor | None:
        """Return the row numbers of mini-batch ``step``, or None for all rows."""
        rows = len(task.train)
        if self.batch_size is None or self.batch_size >= rows:
            return None
        return batch_rows(step, rows, self.batch_size, seed, "attack", task.name)


def accuracies(task: Task, train: Tensor, test: Tensor) -> dict[str, float]:
    """Return the accuracies of scores [n, c] of all rows; none for a regression."""
    if task.kind == "regression":
        return {}
    hits = {"train": train.argmax(1) == task.train.y, "test": test.argmax(1) == task.test.y}
    return {f"{split}_accuracy": float(hit.double().mean()) for split, hit in hits.items()}


class FeatureLearner(Protocol):
    """What is trained.

    An update depends on `tensors` and the step number alone.
    """

    uses_rate: bool
    centre: float  # where the search for a learning rate starts

    def reset(self) -> None:
        """Go back to step 0."""

    def advance(self, step: int, rate: float) -> None:
        """Do update number ``step`` (from 0) with learning rate ``rate``."""

    def loss(self) -> float:
        """Return the training objective over all rows."""

    def measure(self) -> dict[str, float]:
        """Return what a snapshot records; ``train_loss`` and ``test_loss`` among them."""

    def info(self) -> dict[str, Any]:
        """Return facts for the record."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, from which `restore` continues bit for bit."""

    def restore(self, tensors: dict[str, Tensor]) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        """Return what the attacker ends with."""


class _Training:
    """An attack along its budget at one learning rate, with its snapshots (a `Trainee`)."""

    def __init__(
        self, learner: FeatureLearner, options: FeatureAttack, budget: Budget, rate: float
    ) -> None:
        self.learner, self.options, self.budget, self.rate = learner, options, budget, rate
        self.marks = set(budget.snapshots())
        self.trajectory = Trajectory([], {})

    def step(self, step: int) -> None:
        if step == 0:
            self.learner.reset()
            self._snapshot(0)
        factor = schedule_factor(self.options.schedule, step, self.budget.steps)
        self.learner.advance(step, self.rate * factor)
        if step + 1 in self.marks:
            self._snapshot(step + 1)

    def _snapshot(self, step: int) -> None:
        values, trajectory = self.learner.measure(), self.trajectory
        first = trajectory.values.get("train_loss", [values["train_loss"]])[0]
        limit = BLOW_UP * max(first, torch.finfo(torch.float64).tiny)
        if not all(map(math.isfinite, values.values())) or values["train_loss"] > limit:
            raise Diverged(f"the loss is not finite after {step} updates", step)
        trajectory.steps.append(step)
        for name, value in values.items():
            trajectory.values.setdefault(name, []).append(float(value))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.learner.tensors(), {
            "steps": self.trajectory.steps,
            "values": self.trajectory.values,
        }

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.learner.restore(tensors)
        self.trajectory.steps, self.trajectory.values = values["steps"], values["values"]


def score_rate(
    learner: FeatureLearner, options: FeatureAttack, budget: Budget, rate: float, label: str
) -> float | None:
    """Return the mean of the training losses at the horizon and at the end; None if it diverged.

    The trial is the whole run: same batches, same schedule. Scored at the horizon alone, the best
    rate is often one that collapses later, and a collapsed attack looks like protection.
    """
    learner.reset()
    early = math.nan
    for step in progress(range(budget.steps), f"{label}, rate {rate:.2g}"):
        learner.advance(step, rate * schedule_factor(options.schedule, step, budget.steps))
        if step + 1 == budget.horizon:
            early = learner.loss()
            if not math.isfinite(early):
                return None
    loss = (early + learner.loss()) / 2
    return loss if math.isfinite(loss) else None


def run(
    learner: FeatureLearner,
    options: FeatureAttack,
    task: str,
    budget: Budget,
    checkpoint: Checkpoint | None,
) -> Trajectory:
    """Train along ``budget`` and measure at its snapshots.

    With ``lr: auto`` a search for the learning rate comes first (`attacks.search.RateSearch`).

    Returns:
        the trajectory. Where numbers blow up it ends there with status ``diverged`` and without
        weights.

    Raises:
        Diverged: the features of the model are not finite before the first update.
    """
    label = f"{options.name} on {task}"
    searches = learner.uses_rate and options.lr == "auto"

    def rate_of(exponent: float) -> float:
        return learner.centre * 10**exponent

    def trial(scores: Trials) -> float | None:
        rate = rate_of(RateSearch(scores).propose())
        return score_rate(learner, options, budget, rate, label)

    scores, checkpoint = run_trials(options.lr_trials if searches else 0, trial, checkpoint)
    search = RateSearch(scores)
    rate = rate_of(search.best) if options.lr == "auto" else options.lr
    training = _Training(learner, options, budget, rate)
    trajectory = training.trajectory
    try:
        train(training, budget.steps, label=label, checkpoint=checkpoint, save_seconds=SAVE_SECONDS)
        final = learner.weights().items()
        trajectory.weights = {k: v.detach().clone().contiguous() for k, v in final}
    except Diverged:
        if not trajectory.steps:
            raise
        trajectory.status = "diverged"
    trajectory.info = learner.info()
    if learner.uses_rate:
        pairs = zip(search.losses, scores, strict=True)
        table = [{"lr": rate_of(exponent), "loss": score} for exponent, score in pairs]
        trajectory.info |= {"lr": rate, "lr_trials": table, "schedule": options.schedule}
    return trajectory
