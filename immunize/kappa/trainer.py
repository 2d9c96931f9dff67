"""The one training loop behind every gradient immunizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from immunize.kappa.engines import DeepEngine, LinearEngine, build_engine
from immunize.kappa.objectives import Setup, StepObjective
from immunize.kappa.sampling import RowSampler, Spectrum
from lab.core.condition import (
    grouped_condition_number,
    numerical_rank,
    relative_immunization_ratio,
    rir_bound,
    singular_values,
)
from lab.core.data import Case
from lab.core.errors import Diverged
from lab.core.optimizer_state import restore_slots, slots
from lab.core.progress import progress
from lab.core.seeding import derive
from lab.core.types import Checkpoint, FeatureModel, Log


@dataclass(frozen=True)
class Schedule:
    """How long, how large, how often; `immunize.kappa.method.Kappa` documents and checks the
    fields.
    """

    epochs: int
    steps: int | None
    batch_size: int
    lr: float
    lr_schedule: Literal["constant", "cosine"]
    optimizer: Literal["plain", "adam"]
    layers: Sequence[str] | int | None
    spectrum: Spectrum
    running_decay: float
    running_window: int
    log_points: int
    checkpoint_every: int


def log_steps(steps: int, points: int) -> frozenset[int]:
    """About ``points`` steps at which to measure: geometric, with 0 and the last one."""
    grid = {0, steps}
    if steps > 0 and points > 2:
        grid |= {round(steps ** (i / (points - 2))) for i in range(points - 1)}
    return frozenset(grid)


class Trainer:
    """Runs an objective on a copy of ``model`` and logs condition numbers of the whole training
    data.
    """

    def __init__(
        self, schedule: Schedule, model: FeatureModel, case: Case, seed: int, log: Log
    ) -> None:
        self.schedule, self.seed, self._log = schedule, seed, log
        self.engine: LinearEngine | DeepEngine = build_engine(model, case, schedule.layers)
        s = schedule
        self.samplers = [
            RowSampler(
                len(t.train),
                s.batch_size,
                s.spectrum,
                s.running_decay,
                s.running_window,
                seed,
                f"{i}/{t.name}",
            )
            for i, t in enumerate(case.tasks)
        ]
        self.steps = s.steps if s.steps is not None else s.epochs * self.samplers[0].per_epoch
        kind = torch.optim.Adam if s.optimizer == "adam" else torch.optim.SGD
        self.optimizer = kind(self.engine.parameters, lr=s.lr)
        self.linear = model.kind == "linear"
        self.setup = Setup(self.engine, case, self.samplers)
        self.rows: list[dict[str, float]] = []

    def _eta(self, step: int) -> float:
        if self.schedule.lr_schedule == "constant":
            return self.schedule.lr
        return self.schedule.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    # measuring

    def _kappa(self, task: int) -> float:
        """κ of all training rows, ``rank`` definition; for deep models the mean over groups
        (docs/methods.md §2).

        Raises:
            FloatingPointError: a numerical rank below that of θ_0. An invertible θ keeps the rank,
                so κ has left what float64 can resolve, and a κ over the directions that remain
                would look small.
        """
        y = self.engine.features(task)
        if not bool(torch.isfinite(y).all()):
            raise FloatingPointError("features are not finite")
        if not self.linear:
            if not bool(y.any(dim=1).all()):
                raise FloatingPointError("all features of some row are zero")
            values = grouped_condition_number(y, seed=derive(self.seed, "groups", task))
            return sum(values) / len(values)
        s = singular_values(y)
        rank = numerical_rank(s, y.shape)
        first = self.ranks.setdefault(task, rank)
        if rank < first:
            raise FloatingPointError(
                f"κ of task {task} is beyond float64: numerical rank {rank}, {first} at the start"
            )
        return float((s[0] / s[rank - 1]) ** 2)

    def _prepare_metrics(self) -> None:
        self.ranks: dict[int, int] = {}
        self.before = [self._kappa(task) for task in range(len(self.samplers))]
        self.bounds: list[float | None] = [None] * (len(self.samplers) - 1)
        if isinstance(self.engine, LinearEngine):
            x, theta = self.engine.inputs, self.engine.theta.detach()
            if numerical_rank(singular_values(x[0]), x[0].shape) == x[0].shape[1] == theta.shape[1]:
                self.bounds = [rir_bound(x[0], x_h, theta).value for x_h in x[1:]]

    def _report(self, step: int, values: dict[str, float]) -> None:
        """Log κ, RIR and its share of the bound; with several harmful tasks, those of the least
        immunized one.
        """
        kappas = [self._kappa(task) for task in range(len(self.samplers))]
        rirs = [
            relative_immunization_ratio(after, before, kappas[0], self.before[0])
            for after, before in zip(kappas[1:], self.before[1:], strict=True)
        ]
        worst = min(range(len(rirs)), key=rirs.__getitem__)
        row = {"rir": rirs[worst], "kappa_harmful": kappas[1 + worst], "kappa_benign": kappas[0]}
        bound = self.bounds[worst]
        if bound is not None:
            row["rir_bound_ratio"] = rirs[worst] / bound
        row |= values
        self.rows.append({"step": step, **row})
        self._log(step, **row)

    # state

    def _save(self, checkpoint: Checkpoint, objective: StepObjective, step: int) -> None:
        tensors, values = objective.state()
        named = {f"objective/{k}": v for k, v in tensors.items()}
        named |= {f"model/{k}": v for k, v in self.engine.state().items()}
        named |= {f"optimizer/{k}": v for k, v in slots(self.optimizer).items()}
        checkpoint.save(
            {k: v.detach().clone().contiguous() for k, v in named.items()},
            {"step": step, "rows": self.rows, "objective": values},
        )

    def _load(self, checkpoint: Checkpoint | None, objective: StepObjective) -> int:
        """Restore the last saved state and repeat its log rows; the step to go on with, 0 without a
        state.
        """
        saved = checkpoint.load() if checkpoint is not None else None
        if saved is None:
            return 0
        tensors, values = saved
        parts: dict[str, dict[str, Tensor]] = {"objective": {}, "model": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            parts[kind][name] = tensor
        self.engine.load(parts["model"])
        objective.load(parts["objective"], values["objective"])
        restore_slots(self.optimizer, parts["optimizer"])
        self.rows = [dict(row) for row in values["rows"]]
        for row in self.rows:
            self._log(int(row["step"]), **{k: v for k, v in row.items() if k != "step"})
        return int(values["step"])

    # the loop

    def run(
        self, objective: StepObjective, checkpoint: Checkpoint | None, label: str
    ) -> FeatureModel:
        """Descend ``objective``.

        Raises:
            Diverged: features, gradients or weights left the finite numbers; carries the last good
                step.
        """
        self._prepare_metrics()
        objective.start(self.setup)
        start = self._load(checkpoint, objective)
        points = log_steps(self.steps, self.schedule.log_points)
        for step in progress(range(start, self.steps + 1), label):
            try:
                values = objective.step(step)
                if step in points:
                    self._report(step, values)
                if step == self.steps:
                    break
                self.engine.finish()
                self.optimizer.param_groups[0]["lr"] = self._eta(step)
                self.optimizer.step()
            except (FloatingPointError, torch.linalg.LinAlgError) as error:
                raise Diverged(
                    f"{label} left the finite numbers at step {step}: {error}", max(step - 1, 0)
                ) from error
            if checkpoint is not None and (step + 1) % self.schedule.checkpoint_every == 0:
                self._save(checkpoint, objective, step + 1)
        return self.engine.export()
