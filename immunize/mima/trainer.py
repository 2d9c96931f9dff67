"""The loop of every concept immunizer: descend an objective over the parameters of Π_u.

Concept immunizers differ in the gradient only (`Objective`). Randomness is a function of (seed,
step), so a resumed run continues bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lab.core.distributed import team
from lab.core.errors import Diverged
from lab.core.optimizer_state import restore_slots, slots
from lab.core.options import choice, count, number, unread
from lab.core.progress import progress
from lab.core.types import Checkpoint, Log

Params = dict[str, Tensor]
logger = logging.getLogger(__name__)
_FINITE = ("gradient norm", "upper_loss", "prior_loss", "benign_loss")  # what a run must not lose


class Objective(Protocol):
    """Attributes: upper_names: Π_u. moves: all names that a step may change; the objective itself
    changes the rest.
    """

    upper_names: tuple[str, ...]
    moves: tuple[str, ...]

    def gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        """∂J/∂θ for the names of Π_u (J is minimised) and what to log.

        Raises:
            FloatingPointError, Diverged: a level left the finite numbers.
        """

    def state(self) -> Params:
        """Tensors that a resumed run needs besides θ and the step; with several processes called on
        all of them.
        """

    def alike(self) -> Params:
        """Those of them that every process of a team holds."""

    def load(self, state: Params) -> None: ...


@dataclass(frozen=True)
class Schedule:
    """The upper level.

    Attributes:
        steps: number of updates. lr: their size β. lr_schedule: ``constant`` or ``cosine`` to
            0.
        optimizer: ``adamw`` or ``sgd``. weight_decay: of ``adamw``.
        clip: largest norm of the gradient, None for no bound. checkpoint_every: steps between saved
            states.
    """

    steps: int
    lr: float
    lr_schedule: str = "constant"
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float | None = None
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        count("immunize.steps", self.steps)
        number("immunize.lr", self.lr, above=0)
        choice("immunize.lr_schedule", self.lr_schedule, ("constant", "cosine"))
        choice("immunize.optimizer", self.optimizer, ("adamw", "sgd"))
        number("immunize.weight_decay", self.weight_decay, 0)
        unread(
            "immunize.weight_decay",
            self.weight_decay,
            0.0,
            self.optimizer == "adamw",
            "immunize.optimizer=adamw",
        )
        if self.clip is not None:
            number("immunize.clip", self.clip, above=0)
        count("immunize.checkpoint_every", self.checkpoint_every)

    def rate(self, step: int) -> float:
        if self.lr_schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Section:
    """The part of a checkpoint that belongs to one of several trainings of an immunizer, run one
    after the other.

    The weights that earlier ones ended with are kept beside the state of the running one.
    """

    def __init__(self, whole: Checkpoint | None) -> None:
        self.whole = whole
        self.done: list[Params] = []
        self.rows: list[list[dict[str, float]]] = []
        found = whole.load() if whole is not None else None
        self._state: tuple[Params, dict[str, Any]] | None = None
        if found is None:
            return
        tensors, values = found
        self.rows = [list(rows) for rows in values["rows"]]
        self.done = [{} for _ in self.rows]
        own: Params = {}
        for key, tensor in tensors.items():
            place, name = key.split("/", 1)
            (own if place == "now" else self.done[int(place)])[name] = tensor
        if values["now"] is not None:
            self._state = own, values["now"]

    def load(self) -> tuple[Params, dict[str, Any]] | None:
        state, self._state = self._state, None
        return state

    def save(self, tensors: Params, values: dict[str, Any]) -> None:
        self._write({f"now/{k}": v for k, v in tensors.items()}, values)

    def finish(self, weights: Params, rows: list[dict[str, float]]) -> None:
        """The running training is over and ended with ``weights``."""
        self.done.append(weights)
        self.rows.append(rows)
        self._write({}, None)

    def _write(self, tensors: Params, values: dict[str, Any] | None) -> None:
        if self.whole is None:
            return
        kept = {f"{i}/{k}": v for i, weights in enumerate(self.done) for k, v in weights.items()}
        self.whole.save({**tensors, **kept}, {"rows": list(self.rows), "now": values})


class Trainer:
    """Moves the entries ``objective.moves`` of ``theta`` in place.

    Args:
        theta: all parameters by name, float32 or float64.
        label: for the progress bar and messages.
        sound: whether the losses at θ are finite; asked after the last step, whose weights no
            gradient has seen.
    """

    def __init__(
        self,
        schedule: Schedule,
        theta: Params,
        objective: Objective,
        log: Log,
        label: str,
        sound: Callable[[], bool] = lambda: True,
    ) -> None:
        self.schedule, self.theta, self.objective = schedule, theta, objective
        self._log, self.label, self.team, self.sound = log, label, team(), sound
        moving = [theta[name] for name in objective.upper_names]
        if schedule.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(moving, lr=schedule.lr)
        else:
            self.optimizer = torch.optim.AdamW(
                moving, lr=schedule.lr, weight_decay=schedule.weight_decay
            )
        self.good: Params = {}
        self.rows: list[dict[str, float]] = []

    def run(self, checkpoint: Checkpoint | None) -> Params:
        """What moved, after the last step, or the last good weights where the numbers left the
        finite range.

        The last good weights are those at which every loss and gradient was finite last. A run that
        ends early logs ``diverged`` = 1 in its last row.

        Raises:
            Diverged: not even the first step was finite.
        """
        start = self._load(checkpoint)
        for step in progress(
            range(start, self.schedule.steps), self.label, self.schedule.steps - start
        ):
            try:
                self._step(step)
            except (FloatingPointError, Diverged) as error:
                if not self.good:
                    raise Diverged(
                        f"{self.label} left the finite numbers at its first step: {error}", 0
                    ) from error
                logger.warning(
                    "%s stops at step %d, the last good weights are kept: %s",
                    self.label,
                    step,
                    error,
                )
                self._restore(step)
                break
            if checkpoint is not None and (step + 1) % self.schedule.checkpoint_every == 0:
                self._save(checkpoint, step + 1)
        if (
            not all(bool(torch.isfinite(w).all()) for w in self._copy().values())
            or not self.sound()
        ):
            self._restore(self.schedule.steps)
        self.team.assert_equal(self._state, "at the end")
        return self._copy()

    def _state(self) -> Params:
        """What every process of a team must hold alike."""
        moved = {f"theta/{name}": self.theta[name] for name in self.objective.moves}
        return moved | {
            f"objective/{name}": value for name, value in self.objective.alike().items()
        }

    def _copy(self) -> Params:
        return {name: self.theta[name].detach().clone() for name in self.objective.moves}

    def _step(self, step: int) -> None:
        before = self._copy()
        try:
            gradient, values = self.objective.gradient(self.theta, step)
            # one device synchronisation for all tensors
            norm = float(torch.stack([g.double().norm() for g in gradient.values()]).norm())
            wrong = {
                k: v
                for k, v in {"gradient norm": norm, **values}.items()
                if k in _FINITE and not math.isfinite(v)
            }
            if wrong:
                raise FloatingPointError(
                    ", ".join(f"{key} is {value}" for key, value in wrong.items())
                )
        except (FloatingPointError, Diverged):
            if not self.good:  # there is nothing to go back to but where the run began
                self._put(before)
            raise
        self.good = before
        factor = 1.0
        if self.schedule.clip is not None and norm > self.schedule.clip:
            factor = self.schedule.clip / norm
        for name in self.objective.upper_names:
            self.theta[name].grad = gradient[name] * factor
        self.optimizer.param_groups[0]["lr"] = self.schedule.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._record(step, {**values, "gradient_norm": norm})
        if (step + 1) % self.team.check_every == 0:
            self.team.assert_equal(self._state, f"after step {step}")

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        row = {key: float(value) for key, value in values.items()}
        self.rows.append({"step": step, **row})
        self._log(step, **row)

    def _put(self, weights: Params) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self.theta[name].copy_(value)

    def _restore(self, step: int) -> None:
        self._put(self.good)
        self._record(step, {"diverged": 1.0})

    # state

    def _save(self, checkpoint: Checkpoint, step: int) -> None:
        tensors = {f"theta/{name}": value for name, value in self._copy().items()}
        tensors |= {f"good/{name}": value for name, value in self.good.items()}
        tensors |= {f"objective/{name}": value for name, value in self.objective.state().items()}
        tensors |= {f"optimizer/{name}": value for name, value in slots(self.optimizer).items()}
        values = {"step": step, "rows": list(self.rows)}
        checkpoint.save({k: v.detach().clone().contiguous() for k, v in tensors.items()}, values)

    def _load(self, checkpoint: Checkpoint | None) -> int:
        saved = checkpoint.load() if checkpoint is not None else None
        if saved is None:
            return 0
        tensors, values = saved
        parts: dict[str, Params] = {"theta": {}, "good": {}, "objective": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            parts[kind][name] = tensor
        self._put(parts["theta"])
        self.good = {
            name: tensor.to(self.theta[name].device) for name, tensor in parts["good"].items()
        }
        self.objective.load(parts["objective"])
        restore_slots(self.optimizer, parts["optimizer"])
        repeat(values["rows"], self._log)
        self.rows = [dict(row) for row in values["rows"]]
        return int(values["step"])


def repeat(rows: Sequence[Mapping[str, float]], log: Log) -> None:
    """Log again what an earlier process logged."""
    for row in rows:
        log(int(row["step"]), **{k: v for k, v in row.items() if k != "step"})
