"""Attacks on feature extractors: shared options, learning-rate search, snapshots, resume."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from lab.core.config import Count, Positive, Text, config
from lab.core.data import Case, Kind, Task
from lab.core.errors import Diverged, UserError
from lab.core.seeding import batch_rows
from lab.core.training import train
from lab.core.types import Attacker, Budget, Checkpoint, FeatureModel, Trajectory

# seconds between two saves of a running attack; what is saved never changes the result
SAVE_SECONDS = 20.0
# an attack whose training loss exceeds this multiple of its first value has diverged
BLOW_UP = 1e6

Schedule = Literal["constant", "cosine", "linear"]
Loss = Literal["squared", "cross_entropy"]


def schedule_factor(schedule: str, step: int, total: int) -> float:
    """Return the factor on the learning rate at update ``step`` (0 … ``total`` - 1), at first 1."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / total))
    return 1 - step / total if schedule == "linear" else 1.0


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

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, from which `restore` continues bit for bit."""

    def restore(self, tensors: dict[str, Tensor]) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        """Return what the attacker ends with."""


@dataclass
class RateSearch:
    """Pattern search on the decimal exponent of the learning rate.

    A decade up and down from the centre, one neighbour further while the best one lies at the edge,
    then half as wide a step around the best one. A fixed grid of as many points would depend on the
    scale of the features, which an immunizer is free to change.

    Attributes:
        losses: exponent → loss of the trial; inf where it diverged.
        width: distance to the neighbours that are tried.
    """

    losses: dict[float, float] = field(default_factory=dict)
    width: float = 1.0

    @property
    def best(self) -> float:
        """The exponent with the lowest loss, the smaller one of equals."""
        return min(self.losses, key=lambda e: (self.losses[e], e), default=0.0)

    def propose(self) -> float:
        """Return the exponent to try next; the same one until its loss is known."""
        while True:
            neighbours = (self.best, self.best + self.width, self.best - self.width)
            for exponent in neighbours:
                if exponent not in self.losses:
                    return exponent
            self.width /= 2


class _Attack:
    """The trials of the search one after the other, then the attack (a `Trainee`)."""

    def __init__(self, learner: FeatureLearner, options: FeatureAttack, budget: Budget) -> None:
        self.learner, self.options, self.budget = learner, options, budget
        self.marks = set(budget.snapshots())
        self.trials = options.lr_trials if learner.uses_rate and options.lr == "auto" else 0
        self.search = RateSearch()
        self.early = 0.0  # loss of the trial at the horizon
        self.trajectory = Trajectory([], {})

    def rate(self, exponent: float) -> float:
        lr = self.options.lr
        return self.learner.centre * 10**exponent if lr == "auto" else lr

    def step(self, step: int) -> None:
        trial, update = divmod(step, self.budget.steps)
        searching = trial < self.trials
        if update == 0:
            self.learner.reset()
            self.early = 0.0
            if not searching:
                self._snapshot(0)
        rate = self.rate(self.search.propose() if searching else self.search.best)
        if math.isfinite(self.early):
            factor = schedule_factor(self.options.schedule, update, self.budget.steps)
            self.learner.advance(update, rate * factor)
        if searching:
            self._score(update + 1)
        elif update + 1 in self.marks:
            self._snapshot(update + 1)

    def _score(self, updates: int) -> None:
        """Note the loss of a trial: the mean of its losses at the horizon and at the end."""
        if updates == self.budget.horizon:
            self.early = self.learner.loss()
        if updates == self.budget.steps:
            loss = (self.early + self.learner.loss()) / 2
            self.search.losses[self.search.propose()] = loss if math.isfinite(loss) else math.inf

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
        trials = torch.tensor(list(self.search.losses.items()), dtype=torch.float64)
        early = torch.tensor(self.early, dtype=torch.float64)
        tensors = self.learner.tensors() | {"trials": trials.reshape(-1, 2), "early": early}
        trajectory = {"steps": self.trajectory.steps, "values": self.trajectory.values}
        return tensors, {"width": self.search.width, **trajectory}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        trials, self.early = tensors.pop("trials"), float(tensors.pop("early"))
        self.search = RateSearch(dict(trials.tolist()), values["width"])
        self.learner.restore(tensors)
        self.trajectory.steps, self.trajectory.values = values["steps"], values["values"]


def run(
    learner: FeatureLearner,
    options: FeatureAttack,
    budget: Budget,
    checkpoint: Checkpoint | None,
    info: dict[str, Any],
    label: str | None = None,
) -> Trajectory:
    """Train along ``budget`` and measure at its snapshots.

    A search for the learning rate comes first: each trial is the whole run (same batches, same
    schedule) and is scored by the mean of the training loss at the horizon and at the end. Scored
    at the horizon alone, the best rate is often one that collapses later, and a collapsed attack
    looks like protection. ``label`` shows progress bars.

    Returns:
        the trajectory. Where numbers blow up it ends there with status ``diverged`` and without
        weights.

    Raises:
        Diverged: the features of the model are not finite before the first update.
    """
    attack = _Attack(learner, options, budget)
    trajectory, steps = attack.trajectory, (attack.trials + 1) * budget.steps
    try:
        train(attack, steps, label=label, checkpoint=checkpoint, save_seconds=SAVE_SECONDS)
        final = learner.weights().items()
        trajectory.weights = {k: v.detach().clone().contiguous() for k, v in final}
    except Diverged:
        if not trajectory.steps:
            raise
        trajectory.status = "diverged"
    trajectory.info = dict(info)
    if learner.uses_rate:
        table = [
            {"lr": learner.centre * 10**e, "loss": loss if math.isfinite(loss) else None}
            for e, loss in attack.search.losses.items()
        ]
        rate = attack.rate(attack.search.best)
        trajectory.info |= {"lr": rate, "lr_trials": table, "schedule": options.schedule}
    return trajectory
