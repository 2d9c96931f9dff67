"""What one immunization step descends. `SpectralObjective` serves KAPPA and its ablations,
`BilevelObjective` IMMA.

An objective looks at the rows of a step, leaves the gradient in the engine and says what it saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from immunize.kappa.engines import Engine, Preconditioner, View
from immunize.kappa.heads import Head
from immunize.kappa.sampling import RowSampler
from immunize.kappa.spectral import (
    Factor,
    Objective,
    Side,
    diagonal_preconditioner,
    feature_gradient,
    thin_factor,
)
from lab.core.condition import singular_values
from lab.core.data import Case

TINY = 1e-300
HEAD_STEP = 0.5  # heads move by this share of their stable step 1/L, so that they cannot diverge


@dataclass
class Setup:
    """What an objective gets at the start of a run: task 0 is the benign one."""

    engine: Engine
    case: Case
    samplers: list[RowSampler]


class StepObjective(Protocol):
    """What the loop of `immunize.kappa.trainer` descends."""

    def start(self, setup: Setup) -> None:
        """Called once, before the first step or a resume."""

    def step(self, step: int) -> dict[str, float]:
        """Leave the gradient of ``step`` in the engine; returns what is logged. Raises
        FloatingPointError.
        """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able values that a checkpoint keeps."""

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `state` gave."""


@dataclass
class Measured:
    """One task at one step: features and the factor of what the spectral term sees."""

    view: View
    factor: Factor  # of the matrix over ``unit``
    log_kappa: float
    scale: Tensor  # [n, 1] root weights over ``data_unit``
    pull: Callable[[Tensor], Tensor] | None  # back through the attacker's preconditioner
    unit: float
    data_unit: float


def supervise(head: Head, view: View, engine: Engine, weight: float) -> float:
    """Joint step on the benign loss: gradient for the features, and the head moves."""
    value, by_feature, by_head = head.loss(view.y, view.rows)
    engine.add(view, weight * by_feature)
    head.descend(by_head, HEAD_STEP / max(head.lipschitz(view.y), TINY))
    return value


@dataclass
class SpectralOptions:
    """Options of `SpectralObjective`; the class `immunize.kappa.method.Kappa` documents and checks
    them.
    """

    benign: Objective
    harmful: Objective
    lambda_p: float
    lambda_h: float
    scale: Literal["none", "initial", "current"]
    preconditioned: bool
    ridge_benign: float
    ridge_harmful: float
    solve_side: Side
    rank_rule: Literal["rank", "dimension"]
    rank_tolerance: float | None
    cluster_tolerance: float
    optimizer_aware: Literal["none", "diagonal"]
    supervised: float
    lambda_schedule: Literal["fixed", "corridor"]
    corridor_rate: float
    corridor_benign: float
    corridor_harmful: float
    worst_case: bool
    worst_case_temperature: float


class SpectralObjective:
    """λ_P f(H_P) + λ_H Σ_i q_i g(H_Hi) + supervised·L(D_P), with preconditioned gradients for f and
    g.

    ``worst_case``: q = softmax(−τ(log κ(H_Hi) − log κ_0i)), so that weight goes to the harmful task
    whose κ has grown least (distributionally robust weights); otherwise q_i = 1/m.
    ``corridor`` (dual ascent, units of the initial λ): λ_P ← [λ_P + ρλ_P0(log κ_P − log κ_P0 − log
    c_P)]₊ and λ_H ← [λ_H + ρλ_H0(log κ_H0 + log c_H − log κ_H)]₊, κ of the estimate that the step
    uses.
    """

    def __init__(self, options: SpectralOptions) -> None:
        self.o = options

    def start(self, setup: Setup) -> None:
        self.setup, o = setup, self.o
        self.lambdas = [o.lambda_p, o.lambda_h]
        self.first: list[float] = []  # log κ of every task at the first step
        self.units: list[float] = []  # what features are divided by, per task
        self.aware_units: list[float] = []
        for task, sampler in enumerate(setup.samplers):
            y = setup.engine.features(task).to(torch.float64)
            share = (sampler.batch / sampler.n) ** 0.5
            self.units.append(1.0 if o.scale == "none" else float(singular_values(y)[0]) * share)
            aware = o.optimizer_aware == "diagonal" and o.scale != "none"
            self.aware_units.append(
                float(singular_values(diagonal_preconditioner(y)[0])[0]) if aware else 1.0
            )
        self.head: Head | None = None
        if o.supervised > 0:
            y = setup.engine.features(0)
            self.head = Head(setup.case.benign, y.shape[1])
            self.head.fit(y)

    def _measure(self, task: int, step: int) -> Measured:
        o = self.o
        rows, roots = self.setup.samplers[task].rows(step)
        moves = (o.lambda_p if task == 0 else o.lambda_h) > 0 or (
            task == 0 and self.head is not None
        )
        view = self.setup.engine.view(task, rows, gradient=moves)
        if not bool(torch.isfinite(view.y).all()):
            raise FloatingPointError("features are not finite")
        matrix, pull = view.y * roots, None
        if o.optimizer_aware == "diagonal":
            matrix, pull = diagonal_preconditioner(matrix)
        factor = thin_factor(matrix, o.rank_tolerance)
        if len(factor.s) < 2:
            raise FloatingPointError(
                "the features of a batch have rank below 2, so their κ cannot move"
            )
        log_kappa = 2 * math.log(float(factor.s[0] / factor.s[-1]))
        unit, data_unit = self.units[task], self.units[task]
        if o.scale == "current":
            unit = float(factor.s[0])
            data_unit = unit if pull is None else self.units[task]
        elif pull is not None:
            unit = self.aware_units[task]
        factor = Factor(factor.u, factor.s / unit, factor.vt)
        return Measured(view, factor, log_kappa, roots / data_unit, pull, unit, data_unit)

    def _push(self, seen: Measured, objective: Objective, weight: float, ridge: float) -> None:
        o = self.o
        size = len(seen.factor.s) if o.rank_rule == "rank" else seen.view.y.shape[1]
        _, slope = objective(seen.factor.sigma, size, o.cluster_tolerance)
        gradient = feature_gradient(seen.factor, weight * slope)
        if seen.pull is not None:
            gradient = seen.pull(gradient / seen.unit) * seen.data_unit
        if not bool(torch.isfinite(gradient).all()):
            raise FloatingPointError("the gradient of a condition-number term is not finite")
        solve = Preconditioner(ridge, o.solve_side) if o.preconditioned else None
        self.setup.engine.add_regularizer(seen.view, seen.scale, gradient, solve)

    def _dual_ascent(self, growth: list[float]) -> None:
        """``growth``: log κ/κ_0 of the benign task and, weighted, of the harmful ones."""
        o = self.o
        above = growth[0] - math.log(o.corridor_benign)
        below = math.log(o.corridor_harmful) - growth[1]
        self.lambdas[0] = max(0.0, self.lambdas[0] + o.corridor_rate * o.lambda_p * above)
        self.lambdas[1] = max(0.0, self.lambdas[1] + o.corridor_rate * o.lambda_h * below)

    def step(self, step: int) -> dict[str, float]:
        o = self.o
        seen = [self._measure(task, step) for task in range(len(self.setup.samplers))]
        if not self.first:
            self.first = [m.log_kappa for m in seen]
        growth = [m.log_kappa - first for m, first in zip(seen, self.first, strict=True)]
        weights = self._weights(growth[1:])
        if o.lambda_schedule == "corridor":
            self._dual_ascent(
                [growth[0], sum(q * g for q, g in zip(weights, growth[1:], strict=True))]
            )
        lambda_p, lambda_h = self.lambdas
        values = {"lambda_p": lambda_p, "lambda_h": lambda_h}
        if lambda_p > 0:
            self._push(seen[0], o.benign, lambda_p, o.ridge_benign)
        for i, (m, q) in enumerate(zip(seen[1:], weights, strict=True)):
            if lambda_h > 0:
                self._push(m, o.harmful, lambda_h * q, o.ridge_harmful)
            if len(weights) > 1:
                values[f"weight_{i}"] = q
        if self.head is not None:
            values["benign_loss"] = supervise(
                self.head, seen[0].view, self.setup.engine, o.supervised
            )
        return values

    def _weights(self, growth: list[float]) -> list[float]:
        if not self.o.worst_case:
            return [1.0 / len(growth)] * len(growth)
        logits = -self.o.worst_case_temperature * torch.tensor(growth, dtype=torch.float64)
        return logits.softmax(0).tolist()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {} if self.head is None else {"benign_head": self.head.w}
        return tensors, {"lambdas": self.lambdas, "first": self.first}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.lambdas, self.first = list(values["lambdas"]), list(values["first"])
        if self.head is not None:
            self.head.w = tensors["benign_head"].clone()


class BilevelObjective:
    """First-order IMMA (arXiv 2311.18815) on the linear probe.

    Lower level: w' = w − α∇_w L_H(w, θ), ``inner_steps`` times on the step's rows, α =
    ``inner_step``/L with L the curvature of that batch. Upper level: max_θ log L_H(w', θ) −
    ``w_prior``·L_P(w_P, θ), w' held constant (first order). Equal weights over harmful tasks. The
    attacker's heads carry over from step to step.

    Deviates from IMMA in the logarithm, which has the same maximisers but a gradient that does not
    grow with the
    loss: on a linear extractor the plain loss is unbounded and diverges for every step size.
    """

    def __init__(self, inner_steps: int, inner_step: float, w_prior: float) -> None:
        self.inner_steps, self.inner_step, self.w_prior = inner_steps, inner_step, w_prior

    def start(self, setup: Setup) -> None:
        self.setup = setup
        dim = setup.engine.features(0).shape[1]
        self.heads = [Head(task, dim) for task in setup.case.tasks]
        self.heads[0].fit(setup.engine.features(0))

    def step(self, step: int) -> dict[str, float]:
        engine, values, harmful = self.setup.engine, {}, []
        for task, head in enumerate(self.heads):
            rows, _ = self.setup.samplers[task].rows(step)
            view = engine.view(task, rows)
            if not bool(torch.isfinite(view.y).all()):
                raise FloatingPointError("features are not finite")
            if task == 0:
                values["benign_loss"] = supervise(head, view, engine, self.w_prior)
                continue
            step_size = self.inner_step / max(head.lipschitz(view.y), TINY)
            for _ in range(self.inner_steps):
                head.descend(head.loss(view.y, rows)[2], step_size)
            value, by_feature, _ = head.loss(view.y, rows)
            harmful.append(value)
            engine.add(view, -by_feature / (max(value, TINY) * (len(self.heads) - 1)))
        values["harmful_loss"] = sum(harmful) / len(harmful)
        if not all(math.isfinite(v) for v in values.values()):
            raise FloatingPointError("a loss is not finite")
        return values

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"head_{i}": head.w for i, head in enumerate(self.heads)}, {}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        for i, head in enumerate(self.heads):
            head.w = tensors[f"head_{i}"].clone()
