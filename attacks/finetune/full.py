"""Fine-tuning of a part or the whole of the extractor together with a head."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.feature_attack import FeatureAttack, FeatureLearner, accuracies
from lab.core.config import Count, Text, config
from lab.core.data import Kind, Task
from lab.core.errors import UserError
from lab.core.training import restore_state, state_tensors
from lab.core.types import FeatureModel
from lab.models.activations import prefix

_EVALUATION_ROWS = 256
# where the search for a rate starts: common defaults; Gauss-Newton: the full step
_CENTRES = {"adam": 1e-3, "sgd": 1e-2, "gauss_newton": 1.0}
_DAMPING = 1e-3  # of Gauss-Newton, relative to the mean of the kernel's diagonal: as K-FAC's


@dataclass
class TrainedPart:
    """What moves in a network: ``parameters`` by name, none before block ``start``; facts for the
    record.
    """

    start: int
    parameters: dict[str, nn.Parameter]
    info: dict[str, Any]


@config
class Adaptation(FeatureAttack):
    """Trains part of a copy of the network together with a head [d, c] that starts at zero.

    The blocks before the first that moves are evaluated once (`lab.models.activations.prefix`).
    Deep extractors train in float32, linear ones in float64. Batch-norm statistics stay as they
    are. Snapshots hold ``train_loss``, ``test_loss`` and, for classification, the accuracies.

    Args:
        optimizer: ``adam`` | ``sgd`` (heavy ball, 0.9), both as in torch | ``gauss_newton``: θ ← θ
            − η Jᵀ(JJᵀ + λI)⁻¹(f − y) on each batch, JJᵀ the empirical neural tangent kernel
            [rows·classes, rows·classes], λ = 1e-3 times its mean diagonal; squared loss only. J is
            held in memory: rows · classes · parameters numbers.
        blocks: last blocks that move; None = all. Blocks without parameters do not count.

    Raises:
        UserError: when called, more blocks than the model has.
    """

    optimizer: Literal["adam", "sgd", "gauss_newton"] = "adam"
    blocks: Count | None = None

    def __post_init__(self) -> None:
        if self.optimizer == "gauss_newton" and self.loss != "squared":
            fix = "gauss_newton descends the squared loss; set loss=squared."
            raise UserError(f"attacks.{self.name}.loss", self.loss, fix)

    @abstractmethod
    def open(self, net: FeatureModel, seed: int) -> TrainedPart:
        """Choose, or add, what moves in ``net``, a copy whose parameters are all frozen."""

    def moving_blocks(self, net: FeatureModel) -> list[int]:
        """Return the indices of the blocks that move."""
        indices = [i for i, block in enumerate(net.blocks) if any(True for _ in block.parameters())]
        if (self.blocks or 1) > len(indices):
            reason = f"the model has {len(indices)} blocks with parameters."
            raise UserError(f"attacks.{self.name}.blocks", self.blocks, reason)
        return indices[-(self.blocks or len(indices)) :]

    def learner(self, model: FeatureModel, task: Task, seed: int) -> FeatureLearner:
        return _Network(self, model, task, seed)


@config
class FullFinetune(Adaptation):
    """Trains every block, or the last ``blocks``, and a head; for a linear extractor that is θ and
    w.
    """

    name: Text = "extractor_full_finetune"

    def open(self, net: FeatureModel, seed: int) -> TrainedPart:
        indices = self.moving_blocks(net)
        parameters = {
            f"blocks.{i}.{name}": parameter
            for i in indices
            for name, parameter in net.blocks[i].named_parameters()
        }
        names = [net.block_names[i] for i in indices]
        return TrainedPart(indices[0], parameters, {"blocks": names})


@config
class LastBlockFinetune(FullFinetune):
    """Trains the last blocks and a head."""

    accepts: ClassVar[frozenset[Kind]] = frozenset({"deep"})

    name: Text = "last_block_finetune"
    blocks: Count | None = 1


class _Network:
    """A network, a head and their optimizer (an `attacks.feature_attack.FeatureLearner`)."""

    uses_rate = True

    def __init__(self, attack: Adaptation, model: FeatureModel, task: Task, seed: int) -> None:
        self.attack, self.task, self.seed = attack, task, seed
        self.loss_name, self.centre = attack.resolve_loss(task), _CENTRES[attack.optimizer]
        self.dtype = torch.float64 if model.kind == "linear" else torch.float32
        self.net = model.copy().to(self.dtype).requires_grad_(False)
        self.moving = attack.open(self.net, seed)
        self.train_x, self.test_x = (
            prefix(model, split.x, self.moving.start) for split in (task.train, task.test)
        )
        head = torch.zeros(model.feature_dim, task.classes, dtype=self.dtype)
        self.named = {"head": nn.Parameter(head), **self.moving.parameters}
        self.parameters = list(self.named.values())
        self.initial = [p.detach().clone() for p in self.parameters]
        self.reset()

    def info(self) -> dict[str, Any]:
        return {
            "attack": self.attack.name,
            "optimizer": self.attack.optimizer,
            "loss": self.loss_name,
            "batch_size": self.attack.batch_size,
            "parameters": sum(p.numel() for p in self.parameters),
            **self.moving.info,
        }

    @torch.no_grad()
    def reset(self) -> None:
        for parameter, value in zip(self.parameters, self.initial, strict=True):
            parameter.copy_(value).requires_grad_(True)
        if self.attack.optimizer == "adam":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters)
        else:
            momentum = 0.9 if self.attack.optimizer == "sgd" else 0.0
            self.optimizer = torch.optim.SGD(self.parameters, momentum=momentum)

    def _scores(self, x: Tensor) -> Tensor:
        if self.moving.start == 0:
            x = self.net.inputs(x)
        return self.net.run(x.to(self.dtype), self.moving.start) @ self.named["head"]

    def _objective(self, scores: Tensor, y: Tensor) -> Tensor:
        if self.loss_name == "cross_entropy":
            return F.cross_entropy(scores, y.long())
        if self.task.kind == "classification":
            y = F.one_hot(y.long(), self.task.classes)
        difference = scores - y.to(self.dtype).reshape(len(scores), -1)
        return difference.square().sum() / (2 * len(scores))

    def advance(self, step: int, rate: float) -> None:
        x, y = self.train_x, self.task.train.y
        rows = self.attack.batch(step, self.task, self.seed)
        if rows is not None:
            x, y = x[rows], y[rows]
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        scores = self._scores(x)
        if self.attack.optimizer == "gauss_newton":
            self._set_gauss_newton(scores, y)
        else:
            self._objective(scores, y).backward()
        self.optimizer.step()

    def _set_gauss_newton(self, scores: Tensor, y: Tensor) -> None:
        """Leave Jᵀ(JJᵀ + λI)⁻¹(scores − targets) in ``.grad`` of the parameters."""
        (slope,) = torch.autograd.grad(self._objective(scores, y), scores, retain_graph=True)
        residual = slope.flatten() * len(scores)
        eye = torch.eye(len(residual), dtype=self.dtype)
        jacobian = torch.autograd.grad(
            scores.flatten(), self.parameters, eye, is_grads_batched=True
        )
        rows = [part.flatten(1) for part in jacobian]
        kernel = sum((part @ part.T for part in rows), torch.zeros_like(eye))
        kernel = kernel + _DAMPING * kernel.diagonal().mean() * eye
        weights = torch.linalg.solve(kernel, residual)
        for parameter, part in zip(self.parameters, rows, strict=True):
            parameter.grad = (weights @ part).view_as(parameter)

    @torch.no_grad()
    def _all_scores(self, x: Tensor) -> Tensor:
        parts = [self._scores(part) for part in x.split(_EVALUATION_ROWS)]
        return torch.cat(parts).to(torch.float64)

    def loss(self) -> float:
        return float(self._objective(self._all_scores(self.train_x), self.task.train.y))

    def measure(self) -> dict[str, float]:
        train, test = self._all_scores(self.train_x), self._all_scores(self.test_x)
        values = {
            "train_loss": float(self._objective(train, self.task.train.y)),
            "test_loss": float(self._objective(test, self.task.test.y)),
        }
        return values | accuracies(self.task, train, test)

    def tensors(self) -> dict[str, Tensor]:
        return state_tensors(self.parameters, self.optimizer)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        restore_state(self.parameters, self.optimizer, tensors)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named.items()}
