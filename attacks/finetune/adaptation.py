"""Mini-batch training of a copy of the network and a head: what `finetune` and `lora` share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.options import LOSSES, check_budget, check_losses, resolve_loss
from attacks.trajectory import batch_rows, run
from attacks.tuning import Rate
from lab.core.data import Case, Kind, Split, Task
from lab.core.errors import UserError
from lab.core.optimizer_state import restore_state, state_tensors
from lab.core.options import choice, count
from lab.core.types import Attacker, Budget, Checkpoint, FeatureModel, Trajectory
from lab.models.activations import prefix

_EVALUATION_ROWS = 256
TRIALS = 5  # as conf/attacks/base
_CENTRES = {
    "adam": 1e-3,
    "sgd": 1e-2,
}  # where the search for a rate starts: common defaults of the two


@dataclass
class Moving:
    """What an attacker trains on a copy: ``parameters`` by name, none before block ``start``; facts
    for the record.
    """

    net: FeatureModel
    start: int
    parameters: dict[str, nn.Parameter]
    info: dict[str, Any]


class Adaptation(Attacker):
    """Trains part of a copy of the network together with a head [d, c] that starts at zero.

    The blocks before the first that moves are evaluated once (`lab.models.activations.prefix`).
    Deep extractors train in float32, linear ones in float64. Batch-norm statistics stay as they
    are. Snapshots hold ``train_loss``, ``test_loss`` and, for classification, the accuracies.

    Args:
        name: key under ``attacks``.
        optimizer: ``adam`` | ``sgd`` (heavy ball, 0.9), both as in torch.
        loss: ``auto`` (squared for regression, cross entropy for classification) | ``squared`` (½
            mean squared error, one-hot targets for classification) | ``cross_entropy``.
        lr: ``auto`` or a number > 0.
        lr_trials: trials of the search, each as long as the run itself.
        schedule: ``constant`` | ``cosine`` | ``linear``.
        batch_size: rows of a mini-batch; None = all.

    Raises:
        UserError: an option that is unknown or out of range.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"deep"})

    def __init__(
        self,
        *,
        name: str,
        optimizer: str = "adam",
        loss: str = "auto",
        lr: float | str = "auto",
        lr_trials: int = TRIALS,
        schedule: str = "constant",
        batch_size: int | None = 64,
    ) -> None:
        self.name, self.key = name, f"attacks.{name}"
        self.optimizer = choice(f"{self.key}.optimizer", optimizer, _CENTRES)
        self.loss = choice(f"{self.key}.loss", loss, LOSSES)
        self.rate = Rate.parse(name, lr, lr_trials, schedule, TRIALS)
        self.batch_size = (
            None if batch_size is None else count(f"{self.key}.batch_size", batch_size)
        )

    def check(self, cases: tuple[Case, ...]) -> None:
        """Before anything runs: every task can be trained on with ``loss``.

        Raises:
            UserError: cross entropy on a regression, or targets that cannot be learnt.
        """
        check_losses(f"{self.key}.loss", self.loss, cases)

    @abstractmethod
    def open(self, net: FeatureModel, seed: int) -> Moving:
        """Choose, or add, what moves in ``net``, a copy whose parameters are all frozen."""

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
            UserError: a budget, loss, task or choice of blocks that cannot be trained.
            Diverged: the loss is not finite before the first update.
        """
        check_budget(budget)
        loss = resolve_loss(f"{self.key}.loss", self.loss, task)
        dtype = torch.float64 if model.kind == "linear" else torch.float32
        net = copy.deepcopy(model).to(dtype).requires_grad_(False)
        moving = self.open(net, seed)
        for parameter in moving.parameters.values():
            parameter.requires_grad_(True)
        inputs = tuple(prefix(model, split.x, moving.start) for split in (task.train, task.test))
        learner = _Network(self, moving, task, loss, inputs, dtype, seed)
        info = {
            "attack": self.name,
            "optimizer": self.optimizer,
            "loss": loss,
            "batch_size": self.batch_size,
            "parameters": sum(p.numel() for p in learner.parameters),
            **moving.info,
        }
        return run(learner, self.rate, budget, checkpoint, info, f"{self.name} on {task.name}")


def moving_blocks(net: FeatureModel, blocks: int | None, key: str) -> list[int]:
    """Indices of the last ``blocks`` blocks that have parameters (None: all of them).

    Raises:
        UserError: the model has fewer such blocks.
    """
    have = [i for i, block in enumerate(net.blocks) if any(True for _ in block.parameters())]
    if not have or (blocks or 0) > len(have):
        raise UserError(
            key,
            blocks,
            f"the model has {len(have)} blocks with parameters; choose 1 … {len(have)}.",
        )
    return have if blocks is None else have[-blocks:]


class _Network:
    """A network, a head and their optimizer (an `attacks.trajectory.Learner`)."""

    uses_rate = True

    def __init__(
        self,
        attack: Adaptation,
        moving: Moving,
        task: Task,
        loss: str,
        inputs: tuple[Tensor, ...],
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.net, self.start, self.task, self.kind = moving.net, moving.start, task, loss
        self.optimizer_name, self.batch_size = attack.optimizer, attack.batch_size
        self.train_x, self.test_x = inputs
        self.dtype, self.seed, self.centre = dtype, seed, _CENTRES[attack.optimizer]
        self.head = nn.Parameter(torch.zeros(self.net.feature_dim, task.classes, dtype=dtype))
        self.named = {"head": self.head, **moving.parameters}
        self.parameters = list(self.named.values())
        self.initial = [p.detach().clone() for p in self.parameters]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        for parameter, value in zip(self.parameters, self.initial, strict=True):
            parameter.copy_(value)
            parameter.grad = None
        adam = self.optimizer_name == "adam"
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(self.parameters)
            if adam
            else torch.optim.SGD(self.parameters, momentum=0.9)
        )

    def _scores(self, x: Tensor) -> Tensor:
        if self.start == 0:
            x = self.net.inputs(x)
        return self.net.run(x.to(self.dtype), self.start) @ self.head

    def _objective(self, scores: Tensor, y: Tensor) -> Tensor:
        if self.kind == "cross_entropy":
            return F.cross_entropy(scores, y.long())
        if self.task.kind == "classification":
            y = F.one_hot(y.long(), self.task.classes)
        return (scores - y.to(self.dtype).reshape(len(scores), -1)).square().sum() / (
            2 * len(scores)
        )

    def advance(self, step: int, rate: float) -> None:
        x, y = self.train_x, self.task.train.y
        rows = batch_rows(step, len(y), self.batch_size, self.seed, self.task.name)
        if rows is not None:
            x, y = x[rows], y[rows]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self._objective(self._scores(x), y).backward()
        self.optimizer.step()

    @torch.no_grad()
    def _evaluate(self, x: Tensor, split: Split) -> tuple[float, float]:
        """Loss and accuracy (0 for regression) over all rows."""
        parts = [
            self._scores(x[i : i + _EVALUATION_ROWS]) for i in range(0, len(x), _EVALUATION_ROWS)
        ]
        scores = torch.cat(parts).to(torch.float64)
        hits = (
            (scores.argmax(1) == split.y).double().mean()
            if self.task.kind == "classification"
            else 0.0
        )
        return float(self._objective(scores, split.y)), float(hits)

    def loss(self) -> float:
        return self._evaluate(self.train_x, self.task.train)[0]

    def measure(self) -> dict[str, float]:
        train_loss, train_hits = self._evaluate(self.train_x, self.task.train)
        test_loss, test_hits = self._evaluate(self.test_x, self.task.test)
        values = {"train_loss": train_loss, "test_loss": test_loss}
        if self.task.kind == "classification":
            values |= {"train_accuracy": train_hits, "test_accuracy": test_hits}
        return values

    def tensors(self) -> dict[str, Tensor]:
        return state_tensors(self.parameters, self.optimizer)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        restore_state(self.parameters, self.optimizer, tensors)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named.items()}
