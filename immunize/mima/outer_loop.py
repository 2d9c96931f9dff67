"""The outer loop of every concept immunizer: descend an objective over the parameters of Π_u.

Concept immunizers differ in the gradient only (`Objective`). Randomness is a function of (seed,
step), so a resumed run continues bit for bit.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch

from immunize.merge.closed_form import Params
from immunize.mima.gradients import is_finite
from lab.core.config import Count, NonNegative, Positive, config
from lab.core.distributed import team
from lab.core.errors import Diverged
from lab.core.training import restore_slots, slots

logger = logging.getLogger(__name__)
_FINITE = ("gradient_norm", "outer_loss", "prior_loss", "benign_loss")  # what a run must not lose


class Objective(ABC):
    """What the outer loop descends.

    Attributes: outer_names: Π_u. moves: all names that a step may change; the objective itself
        changes the rest.
    """

    outer_names: tuple[str, ...]
    moves: tuple[str, ...]

    @abstractmethod
    def gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        """Return ∂J/∂θ for the names of Π_u (J is minimised) and what to log.

        Raises:
            FloatingPointError, Diverged: a loop left the finite numbers.
        """

    def state(self) -> Params:
        """Return the tensors that a resumed run needs besides θ and the step; with several
        processes called on all of them.
        """
        return {}

    def shared_state(self) -> Params:
        """Return those of them that every process of a team holds."""
        return {}

    def load(self, state: Params) -> None:  # noqa: B027 - nothing to continue without a state
        """Continue from what `state` returned."""


@config
class OuterLoopOptions:
    """The outer loop.

    Args:
        steps: number of updates. lr: β, their size. lr_schedule: ``constant`` or ``cosine`` to 0.
        optimizer: ``adamw`` or ``sgd``. weight_decay: of ``adamw``.
        clip: largest norm of the gradient, null for no bound.
        checkpoint_every: steps between saved states.
    """

    steps: Count = 100
    lr: Positive = 1e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: NonNegative = 0.0
    clip: Positive | None = None
    checkpoint_every: Count = 20


class OuterLoop:
    """A `lab.core.training.Trainee` of one or several runs, one after the other, of ``steps`` each.

    A run moves the entries ``objective.moves`` of ``theta`` in place. Where the numbers leave the
    finite range it goes back to its last good weights, at which every loss and gradient was finite
    last, logs ``diverged`` = 1 and takes no further steps.

    Args:
        theta: all parameters by name, float32 or float64.
        begin: puts θ back to its start and returns the objective of the run with this number.
        is_sound: whether the losses at θ are finite; asked after the last step of a run, whose
            weights no gradient has seen.

    Attributes:
        done: what each run that is over ended with.
    """

    def __init__(
        self,
        options: OuterLoopOptions,
        theta: Params,
        begin: Callable[[int], Objective],
        *,
        runs: int = 1,
        is_sound: Callable[[int], bool] = lambda run: True,
    ) -> None:
        self.options, self.theta, self.begin = options, theta, begin
        self.runs, self.is_sound, self.team = runs, is_sound, team()
        self.done: list[Params] = []

    def _begin(self, run: int) -> None:
        self.run, self.objective = run, self.begin(run)
        self.has_ended = False
        self.good: Params = {}
        moving, o = [self.theta[name] for name in self.objective.outer_names], self.options
        self.optimizer: torch.optim.Optimizer
        if o.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(moving, lr=o.lr)
        else:
            self.optimizer = torch.optim.AdamW(moving, lr=o.lr, weight_decay=o.weight_decay)

    def step(self, step: int) -> dict[str, float] | None:
        """Do update number ``step`` of all runs together.

        Raises:
            Diverged: not even the first step of a run was finite.
        """
        run, own_step = divmod(step, self.options.steps)
        if own_step == 0:
            self._begin(run)
        row = None if self.has_ended else self._attempt(own_step)
        if own_step == self.options.steps - 1:
            if row is not None and not (is_finite(self._copy().values()) and self.is_sound(run)):
                row |= self._go_back()
            self.team.assert_equal(self._alike, "at the end")
            self.done.append(self._copy())
        return row if row is None or self.runs == 1 else {**row, "concept": float(run)}

    def _attempt(self, step: int) -> dict[str, float]:
        """Update θ, or go back to the last good weights where that is not possible."""
        before = self._copy()
        try:
            gradient, values = self.objective.gradient(self.theta, step)
            # one device synchronisation for all tensors
            norm = float(torch.stack([g.double().norm() for g in gradient.values()]).norm())
            values = {**values, "gradient_norm": norm}
            wrong = {k: values[k] for k in _FINITE if not math.isfinite(values.get(k, 0.0))}
            if wrong:
                raise FloatingPointError(", ".join(f"{k} is {v}" for k, v in wrong.items()))
        except (FloatingPointError, Diverged) as error:
            if not self.good:  # there is nothing to go back to but where the run began
                self._put(before)
                message = f"the weights left the finite numbers at the first step: {error}"
                raise Diverged(message, 0) from error
            logger.warning("step %d ends the run, last good weights are kept: %s", step, error)
            return self._go_back()
        self.good = before
        clip = self.options.clip
        factor = clip / norm if clip is not None and norm > clip else 1.0
        for name in self.objective.outer_names:
            self.theta[name].grad = gradient[name] * factor
        if self.options.lr_schedule == "cosine":
            rate = self.options.lr * 0.5 * (1 + math.cos(math.pi * step / self.options.steps))
            self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if (step + 1) % self.team.check_every == 0:
            self.team.assert_equal(self._alike, f"after step {step}")
        return values

    def _go_back(self) -> dict[str, float]:
        self._put(self.good)
        self.has_ended = True
        return {"diverged": 1.0}

    def _copy(self) -> Params:
        return {name: self.theta[name].detach().clone() for name in self.objective.moves}

    @torch.no_grad()
    def _put(self, weights: Params) -> None:
        for name, value in weights.items():
            self.theta[name].copy_(value)

    def _alike(self) -> Params:
        """Return what every process of a team must hold alike."""
        moved = {f"theta/{name}": self.theta[name] for name in self.objective.moves}
        shared = self.objective.shared_state()
        return moved | {f"objective/{name}": value for name, value in shared.items()}

    # state

    def state(self) -> tuple[Params, dict[str, Any]]:
        parts = {
            "theta": self._copy(),
            "good": self.good,
            "objective": self.objective.state(),
            "optimizer": slots(self.optimizer),
        }
        parts |= {f"done{i}": weights for i, weights in enumerate(self.done)}
        tensors = {f"{part}/{k}": v for part, some in parts.items() for k, v in some.items()}
        return tensors, {"run": self.run, "done": len(self.done), "has_ended": self.has_ended}

    def restore(self, tensors: Params, values: dict[str, Any]) -> None:
        self._begin(values["run"])

        def select(part: str) -> Params:
            chosen = {k: v for k, v in tensors.items() if k.startswith(f"{part}/")}
            return {key.partition("/")[2]: value for key, value in chosen.items()}

        self.has_ended = values["has_ended"]
        self._put(select("theta"))
        self.good = {name: x.to(self.theta[name].device) for name, x in select("good").items()}
        self.objective.load(select("objective"))
        restore_slots(self.optimizer, select("optimizer"))
        self.done = [select(f"done{i}") for i in range(values["done"])]
