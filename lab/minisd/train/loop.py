"""The training of every network of MiniSD: AdamW, one cycle, averaged weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lab.core import training
from lab.core.config import Count, Index, NonNegative, Positive, options
from lab.core.errors import Diverged
from lab.core.seeding import generator
from lab.core.training import restore_slots, slots
from lab.core.types import Checkpoint, Log

logger = logging.getLogger(__name__)
Loss = Callable[[int, torch.Generator], Tensor]
Validate = Callable[[], dict[str, float]]
_LOG_EVERY = 50  # steps over which the logged loss is a mean


@options
class Schedule:
    """How long and how fast a network is trained.

    Attributes:
        steps, batch: optimizer steps and examples per step.
        lr: peak learning rate of AdamW; rises linearly over ``warmup`` steps, falls to 0 on a half
            cosine.
        ema: decay of the averaged weights, below 1 (0 = the last weights are kept); warms up as
            (1 + t)/(10 + t).
        clip: largest gradient norm.
        save_every: steps between checkpoints.
    """

    steps: Count
    batch: Count
    lr: Positive
    warmup: Index = 100
    weight_decay: NonNegative = 0.01
    ema: NonNegative = 0.0
    clip: Positive = 1.0
    save_every: Count = 250

    def rate(self, step: int) -> float:
        """Return the learning rate of step number ``step`` (from 0)."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        done = max(0, step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class _NetworkTraining:
    """A network in training: model, optimizer, averaged weights. A `lab.core.training.Trainee`."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        schedule: Schedule,
        seed: int,
        label: str,
        validate: Validate | None,
        validate_every: int,
    ) -> None:
        self.model, self.loss, self.schedule, self.seed, self.label = (
            model,
            loss,
            schedule,
            seed,
            label,
        )
        self.validate, self.validate_every = validate, validate_every
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in trained if p.ndim > 1],
                "weight_decay": schedule.weight_decay,
            },
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.trained = trained
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.lr, fused=True)
        self.average = {n: v.detach().clone() for n, v in model.state_dict().items()}
        self.recent: list[float] = []  # losses since the last row of the log

    def step(self, step: int) -> dict[str, float] | None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step)
        loss = self.loss(step, generator(self.seed, self.label, step))
        if not torch.isfinite(loss):
            raise Diverged(f"{self.label}: the loss is {loss.item()}", step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.schedule.clip)
        self.optimizer.step()
        self._average(step)
        self.recent.append(loss.item())
        done, last = step + 1, step + 1 == self.schedule.steps
        row: dict[str, float] = {}
        if done % _LOG_EVERY == 0 or last:
            row["loss"], self.recent = sum(self.recent) / len(self.recent), []
        if self.validate is not None and (done % self.validate_every == 0 or last):
            row |= self._validate_average(self.validate)
        if not row:
            return None
        values = " ".join(f"{key} {value:.4f}" for key, value in row.items())
        logger.info("%s step %d of %d: %s", self.label, done, self.schedule.steps, values)
        return {"step": done, **row}

    def _average(self, step: int) -> None:
        decay = min(self.schedule.ema, (1 + step) / (10 + step))
        state = self.model.state_dict()
        for name, average in self.average.items():
            if average.is_floating_point():
                average.lerp_(state[name], 1 - decay)
            else:
                average.copy_(state[name])

    def _validate_average(self, validate: Validate) -> dict[str, float]:
        current = {n: v.clone() for n, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.model.eval()
        with torch.no_grad():
            values = validate()
        self.model.load_state_dict(current)
        self.model.train()
        return values

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"model/{n}": v for n, v in self.model.state_dict().items()}
        tensors |= {f"average/{n}": v for n, v in self.average.items()}
        tensors |= {f"optimizer/{n}": v for n, v in slots(self.optimizer).items()}
        return tensors, {"recent": self.recent}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor
        self.model.load_state_dict(parts["model"])
        for name, average in self.average.items():
            average.copy_(parts["average"][name])
        restore_slots(self.optimizer, parts["optimizer"])
        self.recent = list(values["recent"])


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters of ``model`` are."""
    return next(model.parameters()).device


def train(
    model: nn.Module,
    loss: Loss,
    schedule: Schedule,
    *,
    seed: int,
    label: str,
    checkpoint: Checkpoint | None,
    log: Log,
    validate: Validate | None = None,
    validate_every: int = 500,
) -> nn.Module:
    """Minimise ``loss(step, generator)`` over the parameters that require gradients, in place.

    The generator of a step depends on (seed, label, step) alone, so a resumed training repeats the
    unbroken one. It draws in main memory whatever device the model is on, so a GPU sees the same
    images and the same noise. ``log`` gets the mean loss of the last 50 steps every 50 steps, and
    what ``validate`` returns (computed on the averaged weights). The model ends with the averaged
    weights.

    Raises:
        Diverged: the loss left the finite numbers.
    """
    network = _NetworkTraining(model, loss, schedule, seed, label, validate, validate_every)
    model.train()
    training.train(
        network,
        schedule.steps,
        label=label,
        checkpoint=checkpoint,
        log=log,
        save_every=schedule.save_every,
    )
    model.load_state_dict(network.average)
    return model.eval()
