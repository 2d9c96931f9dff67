"""One training loop for every network of MiniSD: AdamW, one cycle, EMA, resumable at any step bit
for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lab.core.errors import Diverged
from lab.core.options import count, number
from lab.core.progress import progress
from lab.core.seeding import generator
from lab.core.types import Checkpoint, Log

logger = logging.getLogger(__name__)
Step = Callable[[int, torch.Generator], Tensor]
Validate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps, batch: optimizer steps and examples per step.
        lr: peak learning rate of AdamW; rises linearly over ``warmup`` steps, falls to 0 on a half
            cosine.
        ema: decay of the averaged weights (0 = the last weights are kept); warms up as (1 + t)/(10
            + t).
        clip: largest gradient norm.
        save_every: steps between checkpoints.
        key: config key of this group, for messages.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.0
    clip: float = 1.0
    save_every: int = 250
    key: str = "train"

    def __post_init__(self) -> None:
        for key in ("steps", "batch", "save_every"):
            count(f"{self.key}.{key}", getattr(self, key))
        count(f"{self.key}.warmup", self.warmup, 0)
        number(f"{self.key}.lr", self.lr, above=0)
        number(f"{self.key}.weight_decay", self.weight_decay, 0)
        number(f"{self.key}.ema", self.ema, 0, below=1)
        number(f"{self.key}.clip", self.clip, above=0)

    def rate(self, step: int) -> float:
        """Learning rate of the step number ``step`` (from 0)."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        done = max(0, step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class _State:
    """Model, optimizer and average as named tensors."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.average = {n: v.detach().clone() for n, v in model.state_dict().items()}
        decay = [p for p in self.trained.values() if p.ndim > 1]
        rest = [p for p in self.trained.values() if p.ndim <= 1]
        groups = [
            {"params": decay, "weight_decay": schedule.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.lr, fused=True)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"model/{n}": v for n, v in self.model.state_dict().items()}
        found |= {f"average/{n}": v for n, v in self.average.items()}
        for name, parameter in self.trained.items():
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"adam/{key}/{name}": value for key, value in moments.items()}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        size = len("model/")
        self.model.load_state_dict(
            {n[size:]: v for n, v in tensors.items() if n.startswith("model/")}
        )
        for name, average in self.average.items():
            average.copy_(tensors[f"average/{name}"])
        for name, parameter in self.trained.items():
            if f"adam/step/{name}" not in tensors:  # never had a gradient
                continue
            # the fused step walks memory: moments must lie as their parameter does (channels last);
            # files forget that
            moments = {
                key: torch.empty_like(parameter).copy_(tensors[f"adam/{key}/{name}"])
                for key in ("exp_avg", "exp_avg_sq")
            }
            steps = tensors[f"adam/step/{name}"].to(parameter.device, copy=True)
            self.optimizer.state[parameter] = {"step": steps, **moments}

    def update(self, step: int) -> None:
        decay = min(self.schedule.ema, (1 + step) / (10 + step))
        state = self.model.state_dict()
        for name, average in self.average.items():
            if average.is_floating_point():
                average.lerp_(state[name], 1 - decay)
            else:
                average.copy_(state[name])


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of ``model`` are."""
    return next(model.parameters()).device


def train(
    model: nn.Module,
    step: Step,
    schedule: Schedule,
    *,
    seed: int,
    label: str,
    checkpoint: Checkpoint | None,
    log: Log,
    validate: Validate | None = None,
    validate_every: int = 500,
) -> nn.Module:
    """Minimise ``step(number, generator)`` over the parameters of ``model`` that require gradients,
    in place.

    The generator of a step depends on (seed, label, step) alone, so a resumed training repeats the
    unbroken one. It draws in main memory whatever device the model is on, so a GPU sees the same
    pictures and the same noise. ``log`` gets the mean loss of the last 50 steps every 50 steps, and
    what ``validate`` returns (computed on the averaged weights). The model ends with the averaged
    weights. The same lines go to the run's log, with the time that is left, for trainings that
    nobody watches.

    Raises:
        Diverged: the loss left the finite numbers.
    """
    state, first = _State(model, schedule), 0
    recent: list[float] = []  # losses since the last row of the log
    found = checkpoint.load() if checkpoint is not None else None
    if found is not None:
        state.restore(found[0])
        first, recent = int(found[1]["step"]), list(found[1]["recent"])
        for row, earlier in found[1]["log"]:
            log(row, **earlier)
    rows: list[tuple[int, dict[str, float]]] = list(found[1]["log"]) if found is not None else []
    model.train()
    clock = time.monotonic()
    for number_ in progress(range(first, schedule.steps), label, schedule.steps - first):
        for group in state.optimizer.param_groups:
            group["lr"] = schedule.rate(number_)
        loss = step(number_, generator(seed, label, number_))
        if not torch.isfinite(loss):
            raise Diverged(f"{label}: the loss is {loss.item()}", number_)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(state.trained.values(), schedule.clip)
        state.optimizer.step()
        state.update(number_)
        recent.append(loss.item())
        done = number_ + 1
        values: dict[str, float] = {}
        if done % 50 == 0 or done == schedule.steps:
            values["loss"], recent = sum(recent) / len(recent), []
        if validate is not None and (done % validate_every == 0 or done == schedule.steps):
            values |= _on_average(state, validate)
        if values:
            rows.append((done, values))
            log(done, **values)
            left = (time.monotonic() - clock) / (done - first) * (schedule.steps - done) / 60
            told = " ".join(f"{key} {value:.4f}" for key, value in values.items())
            logger.info(
                "%s step %d of %d, about %.0f minutes left: %s",
                label,
                done,
                schedule.steps,
                left,
                told,
            )
        if checkpoint is not None and done % schedule.save_every == 0 and done < schedule.steps:
            checkpoint.save(state.tensors(), {"step": done, "log": rows, "recent": recent})
    model.load_state_dict(state.average)
    return model.eval()


def _on_average(state: _State, validate: Validate) -> dict[str, float]:
    now = {n: v.clone() for n, v in state.model.state_dict().items()}
    state.model.load_state_dict(state.average)
    state.model.eval()
    with torch.no_grad():
        found = validate()
    state.model.load_state_dict(now)
    state.model.train()
    return found
