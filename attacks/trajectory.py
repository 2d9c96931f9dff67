"""Runs a learner along its budget: tuning, snapshots, divergence, resume. Shared by every
attacker.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from attacks.tuning import Rate, search
from lab.core.errors import Diverged
from lab.core.progress import progress
from lab.core.seeding import generator
from lab.core.types import Budget, Checkpoint, Trajectory

SAVE_SECONDS = (
    20.0  # time between two saves of a running attack; what is saved never changes the result
)
BLOW_UP = 1e6  # an attack whose training loss exceeds this multiple of its first value has diverged


class Learner(Protocol):
    """What is trained. Everything that an update reads lies in `tensors`, or follows from the step
    number.
    """

    uses_rate: bool
    centre: float  # where the search for a learning rate starts

    def reset(self) -> None:
        """Back to step 0."""

    def advance(self, step: int, rate: float) -> None:
        """Update number ``step`` (from 0) with learning rate ``rate``."""

    def loss(self) -> float:
        """Training objective over all rows."""

    def measure(self) -> dict[str, float]:
        """What a snapshot records; ``train_loss`` and ``test_loss`` among them."""

    def tensors(self) -> dict[str, Tensor]:
        """State, from which `restore` continues bit for bit."""

    def restore(self, tensors: dict[str, Tensor]) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        """What the attacker ends with."""


@lru_cache(maxsize=8)
def _order(rows: int, seed: int, label: str, epoch: int) -> Tensor:
    return torch.randperm(rows, generator=generator(seed, "attack", label, epoch))


def batch_rows(
    step: int, rows: int, batch_size: int | None, seed: int, label: str
) -> Tensor | None:
    """Row indices of mini-batch ``step``, a function of the seed alone; None when the batch is the
    whole set.

    Epochs are permutations cut into full batches; rows left over wait for the next epoch.
    """
    if batch_size is None or batch_size >= rows:
        return None
    epoch, index = divmod(step, rows // batch_size)
    return _order(rows, seed, label, epoch)[index * batch_size : (index + 1) * batch_size]


class _Saver:
    """Saves a running attack, at most once in `SAVE_SECONDS`."""

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self.checkpoint, self.last = checkpoint, time.monotonic()

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        if self.checkpoint is not None and time.monotonic() - self.last >= SAVE_SECONDS:
            self.checkpoint.save(
                {k: v.detach().clone().contiguous() for k, v in tensors.items()}, values
            )
            self.last = time.monotonic()


def _tune(
    learner: Learner,
    rate: Rate,
    budget: Budget,
    saved: dict[str, Any],
    saver: _Saver,
    label: str | None,
) -> tuple[float, list]:
    """The learning rate and its table of trials [exponent, loss or None where the trial
    diverged].
    """
    if rate.lr is not None or not learner.uses_rate:
        return rate.lr or 0.0, []
    table = {
        float(e): math.inf if loss is None else float(loss) for e, loss in saved.get("trials", [])
    }

    def rows() -> list[list[float | None]]:
        return [[e, loss if math.isfinite(loss) else None] for e, loss in table.items()]

    def trial(lr: float) -> float:
        learner.reset()
        early = math.inf
        steps = range(budget.steps)
        for step in (
            steps
            if label is None
            else progress(steps, f"{label}, trial of rate {lr:.3g}", budget.steps)
        ):
            learner.advance(step, lr * rate.factor(step, budget.steps))
            if step + 1 == budget.horizon:
                early = learner.loss()
                if not math.isfinite(early):
                    return math.inf
        return (early + learner.loss()) / 2

    lr = search(
        trial, learner.centre, rate.trials, table, lambda: saver.save({}, {"trials": rows()})
    )
    return lr, rows()


def _keep(trajectory: Trajectory, step: int, values: dict[str, float]) -> bool:
    """Append a snapshot; False, and nothing kept, when it has left the finite range."""
    first = trajectory.values.get("train_loss", [values["train_loss"]])[0]
    limit = BLOW_UP * max(first, torch.finfo(torch.float64).tiny)
    if not all(map(math.isfinite, values.values())) or values["train_loss"] > limit:
        return False
    trajectory.steps.append(step)
    for name, value in values.items():
        trajectory.values.setdefault(name, []).append(float(value))
    return True


def run(
    learner: Learner,
    rate: Rate,
    budget: Budget,
    checkpoint: Checkpoint | None,
    info: dict[str, Any],
    label: str | None = None,
) -> Trajectory:
    """Train along ``budget`` and measure at its snapshots.

    A search for the learning rate comes first: each trial is the whole run (same batches, same
    schedule) and is scored by the mean of the training loss at the horizon and at the end. Scorerd
    at the horizon alone, the best rate is often one that collapses later, and a collapsed attack
    looks like protection. ``label`` shows progress bars.

    Returns:
        the trajectory. Where numbers blow up it ends there with status ``diverged`` and without
        weights.

    Raises:
        Diverged: the features of the model are not finite before the first update.
    """
    tensors, saved = (checkpoint.load() if checkpoint else None) or ({}, {})
    saver = _Saver(checkpoint)
    lr, trials = _tune(learner, rate, budget, saved, saver, label)
    table = [{"lr": learner.centre * 10**e, "loss": loss} for e, loss in trials]
    if learner.uses_rate:
        info = {**info, "lr": lr, "lr_trials": table, "schedule": rate.schedule}
    start = int(saved.get("step", 0))
    trajectory = Trajectory(
        list(saved.get("steps", [])), {k: list(v) for k, v in saved.get("values", {}).items()}
    )
    trajectory.info = info
    learner.reset()
    if start:
        learner.restore(tensors)
    elif not _keep(trajectory, 0, learner.measure()):
        raise Diverged("the loss is not finite before the first update", 0)
    marks = set(budget.snapshots())
    steps: Iterable[int] = range(start, budget.steps)
    for step in progress(steps, label, budget.steps - start) if label else steps:
        learner.advance(step, lr * rate.factor(step, budget.steps))
        if step + 1 in marks and not _keep(trajectory, step + 1, learner.measure()):
            trajectory.status = "diverged"
            return trajectory
        values = {
            "trials": trials,
            "step": step + 1,
            "steps": trajectory.steps,
            "values": trajectory.values,
        }
        saver.save(learner.tensors(), values)
    trajectory.weights = {k: v.detach().clone().contiguous() for k, v in learner.weights().items()}
    return trajectory
