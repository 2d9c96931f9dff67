"""KAPPA (arXiv 2505.23760, Alg. 1), its ablations and its baselines.

Own extensions (docs/reference/methods.md §2.2): corridor schedule, running and full spectra,
cluster averaging, worst-case weights, the attacker's preconditioner, and ``scale``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from immunize.kappa import spectral
from immunize.kappa.trainer import TINY, GradientImmunizer, KappaTrainer, TaskTrainer, check_finite
from lab.core.condition import Preconditioner, precondition, singular_values
from lab.core.config import Count, Flag, NonNegative, Positive, PositiveShare, Text, config
from lab.core.data import Case
from lab.core.errors import UserError
from lab.core.training import Row
from lab.core.types import FeatureModel


@config
class Kappa(GradientImmunizer):
    """θ ← θ − η∇L(D_P) − ηλ_P K_P⁻¹∇R_well(H_P) − ηλ_H K_H⁻¹∇R_ill(H_H).

    Args:
        lambda_p, lambda_h: λ_P, λ_H ≥ 0; one of them 0 gives the ablations ``kappa_ill_only`` and
            ``kappa_well_only``.
        scale: what the matrices inside the two terms are divided by, K and H alike. ``none``: the
            sum over a batch of rows, as written in the paper, so that λ depends on the units of the
            data; ``rows``: the mean over a batch of rows; ``initial``: σ_1(H(θ_0)) at the size of a
            batch; ``current``: σ_1 of the step's own H, held constant under the derivative.
        preconditioned: the K⁻¹ of Alg. 1.
        ridge_benign, ridge_harmful: ρ in (K + ρI)⁻¹, in units of ``scale``; 0 is the
            pseudo-inverse.
        solve_side: ``left`` as written, ``right`` as released (needs both ridges > 0); of linear
            extractors, as a layer of a network has its Gram matrix on its input side.
        rank_rule: p and k are numerical ranks (``rank``) or the number of features (``dimension``,
            released).
        rank_tolerance: relative to σ_max of the feature matrix; None for max(n, d)·ε.
        cluster_tolerance: relative width of the cluster of extremal eigenvalues that is averaged.
        optimizer_aware: the optimizer after whose own preconditioner κ is measured
            (`lab.core.condition.precondition`).
        supervised: weight of L(D_P); its head is fitted to θ_0 first and then moves along.
        lambda_schedule: ``fixed`` or ``corridor`` (dual ascent, in units of the initial λ): λ_P ←
            [λ_P + ρλ_P0(log κ_P − log κ_P0 − log c_P)]₊ and λ_H ← [λ_H + ρλ_H0(log κ_H0 + log c_H −
            log κ_H)]₊, κ of the estimate that the step uses.
        corridor_rate: ρ.
        corridor_benign, corridor_harmful: c_P and c_H: κ(H_P) at most and κ(H_H) at least this
            many times its value at the first step.
        worst_case: weights q = softmax(−τ(log κ(H_Hi) − log κ_0i)) over harmful tasks, so that
            weight goes to the one whose κ has grown least (distributionally robust weights); else
            equal weights.
        worst_case_temperature: τ.
        spectrum: rows behind each estimate of a Gram matrix, at the scale of one batch. ``batch``:
            one batch b_t, H = X_bᵀX_b. ``running``: H = Σ_{j<m} w_j X_{t−j}ᵀX_{t−j}, w_j =
            β^j/Σ_i β^i, the last m batches at the *current* weights; unbiased for the same mean,
            its variance is Σ w_j² of it; costs m times as much. ``full``: all N rows, weight
            batch/N each.
        running_decay: β.
        running_window: m.
    """

    # the functions of H_P and of H_H that are descended
    terms: ClassVar[tuple[spectral.Objective, spectral.Objective]] = (spectral.well, spectral.ill)

    name: Text = "kappa"
    lambda_p: NonNegative
    lambda_h: NonNegative
    scale: Literal["none", "rows", "initial", "current"] = "initial"
    preconditioned: Flag = True
    ridge_benign: NonNegative = 0.0
    ridge_harmful: NonNegative = 0.0
    solve_side: Literal["left", "right"] = "left"
    rank_rule: Literal["rank", "dimension"] = "rank"
    rank_tolerance: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    cluster_tolerance: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    optimizer_aware: Literal["none"] | Preconditioner = "none"
    supervised: NonNegative = 1.0
    lambda_schedule: Literal["fixed", "corridor"] = "fixed"
    corridor_rate: NonNegative = 0.1
    corridor_benign: Positive = 1.0
    corridor_harmful: Positive = 1.0
    worst_case: Flag = False
    worst_case_temperature: Positive = 1.0
    spectrum: Literal["batch", "running", "full"] = "batch"
    running_decay: PositiveShare = 0.9
    running_window: Count = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_p == self.lambda_h == self.supervised == 0:
            fix = "λ_P, λ_H and supervised are all 0; choose immunize=none for no immunization."
            raise UserError("immunize.lambda_h", 0, fix)
        if self.solve_side == "right" and min(self.ridge_benign, self.ridge_harmful) <= 0:
            fix = "needs ridge_benign > 0 and ridge_harmful > 0."
            raise UserError("immunize.solve_side", "right", fix)

    def trainer(self, model: FeatureModel, case: Case, seed: int) -> KappaTrainer:
        return SpectralTrainer(self, model, case, seed)


@config
class KappaOpt(Kappa):
    """The baseline Opt κ: descends λ_P log κ(H_P) + λ_H/log κ(H_H) (§5.1 of arXiv 2505.23760, the
    release).
    """

    terms = (spectral.log_kappa, spectral.inverse_log_kappa)

    rank_rule: Literal["rank"] = "rank"  # log κ has no p and k


@config
class KappaImma(GradientImmunizer):
    """The baseline IMMA (arXiv 2311.18815) on the linear probe, first order.

    Lower level: w' = w − α∇_w L_H(w, θ), ``inner_steps`` times on the step's rows, α =
    ``inner_step``/L with L the curvature of that batch. Upper level: max_θ log L_H(w', θ) −
    ``w_prior``·L_P(w_P, θ), w' held constant (first order). Equal weights over harmful tasks. The
    attacker's heads carry over from step to step.

    Deviates from IMMA in the logarithm, which has the same maximisers but a gradient that does not
    grow with the loss: on a linear extractor the plain loss is unbounded and diverges for every
    step size.

    Args:
        inner_steps: attacker's steps per update.
        inner_step: in units of the stable step 1/L.
        w_prior: weight of the benign loss.
    """

    name: Text = "kappa_imma"
    inner_steps: Count = 1
    inner_step: Positive = 0.5
    w_prior: NonNegative = 1.0

    def trainer(self, model: FeatureModel, case: Case, seed: int) -> KappaTrainer:
        return ImmaTrainer(self, model, case, seed)


@dataclass
class BatchSpectrum:
    """The spectrum of one task at one step."""

    task: int
    rows: Tensor
    y: Tensor
    factor: spectral.Factor  # of the matrix that the spectral term sees, in units of ``scale``
    log_kappa: float
    scale: Tensor  # [n, 1] root weights in units of ``scale``
    pull: Callable[[Tensor], Tensor]  # back through the attacker's preconditioner


class SpectralTrainer(KappaTrainer):
    """λ_P f(H_P) + λ_H Σ_i q_i g(H_Hi) + supervised·L(D_P), with preconditioned gradients for f and
    g.
    """

    options: Kappa

    def __init__(self, options: Kappa, model: FeatureModel, case: Case, seed: int) -> None:
        super().__init__(options, model, case, seed)
        self.values = {"lambdas": [options.lambda_p, options.lambda_h], "first": []}
        self.units = [self._units(task) for task in range(len(case.tasks))]
        self.heads = self.fit_heads([case.benign]) if options.supervised > 0 else {}

    def _units(self, task: int) -> tuple[float, float]:
        """Return what features of a task are divided by, before and after the attacker's
        preconditioner.
        """
        o = self.options
        if o.scale == "none" or (o.scale == "current" and o.optimizer_aware == "none"):
            return 1.0, 1.0  # the units of `current` are measured anew in every step
        y = self.engine.features(task).to(torch.float64)
        size = min(o.batch_size, len(y))
        if o.scale == "rows":
            return size**0.5, size**0.5
        share = (size / len(y)) ** 0.5
        unit = float(singular_values(y)[0]) * share
        if o.optimizer_aware == "none":
            return unit, unit
        matrix, _ = precondition(y, o.optimizer_aware)
        # after Adam's, σ grows with the root of the features; after the others it does not
        return unit, float(singular_values(matrix)[0]) * (
            share**0.5 if o.optimizer_aware == "adam" else 1.0
        )

    def rows(self, task: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the row numbers [m] of an estimate and square roots of their weights [m, 1]."""
        o, n = self.options, len(self.case.tasks[task].train)
        size = min(o.batch_size, n)
        if o.spectrum == "full":
            return torch.arange(n), torch.full((n, 1), (size / n) ** 0.5, dtype=torch.float64)
        ages = range(min(o.running_window, step + 1) if o.spectrum == "running" else 1)
        weights = torch.tensor([o.running_decay**j for j in ages], dtype=torch.float64)
        roots = (weights / weights.sum()).sqrt().repeat_interleave(size)
        return torch.cat([self.batch(task, step - j) for j in ages]), roots[:, None]

    def _estimate(self, task: int, step: int) -> BatchSpectrum:
        o = self.options
        rows, roots = self.rows(task, step)
        moves = o.lambda_h > 0 if task else o.lambda_p > 0 or o.supervised > 0
        y = self.engine.view(task, rows, gradient=moves)
        check_finite(y, "features are not finite")
        matrix, pull = y * roots, None
        if o.optimizer_aware != "none":
            matrix, pull = precondition(matrix, o.optimizer_aware)
        factor = spectral.thin_factor(matrix, o.rank_tolerance)
        if len(factor.s) < 2:
            raise FloatingPointError(
                "the features of a batch have rank below 2, so their κ cannot move"
            )
        log_kappa = 2 * math.log(float(factor.s[0] / factor.s[-1]))
        data_unit, unit = self.units[task]
        if o.scale == "current":
            unit = float(factor.s[0])
            data_unit = unit if pull is None else data_unit
        factor = spectral.Factor(factor.u, factor.s / unit, factor.vt)

        def back(gradient: Tensor) -> Tensor:
            return gradient if pull is None else pull(gradient / unit) * data_unit

        return BatchSpectrum(task, rows, y, factor, log_kappa, roots / data_unit, back)

    def _push(
        self, estimate: BatchSpectrum, objective: spectral.Objective, weight: float, ridge: float
    ) -> None:
        o, factor = self.options, estimate.factor
        size = len(factor.s) if o.rank_rule == "rank" else estimate.y.shape[1]
        _, slope = objective(factor.sigma, size, o.cluster_tolerance)
        gradient = estimate.pull(spectral.feature_gradient(factor, weight * slope))
        check_finite(gradient, "the gradient of a condition-number term is not finite")
        solve = ridge if o.preconditioned else None
        self.engine.add(estimate.task, gradient, estimate.scale, solve, o.solve_side)

    def _weights(self, growth: list[float]) -> list[float]:
        """Return the weights of the harmful tasks; ``growth``: log κ/κ_0 of each."""
        if not self.options.worst_case:
            return [1.0 / len(growth)] * len(growth)
        logits = -self.options.worst_case_temperature * torch.tensor(growth, dtype=torch.float64)
        return logits.softmax(0).tolist()

    def _lambdas(self, benign: float, harmful: float) -> list[float]:
        """Return λ_P and λ_H after dual ascent, from log κ/κ_0 of both sides."""
        o, (lambda_p, lambda_h) = self.options, self.values["lambdas"]
        above = benign - math.log(o.corridor_benign)
        below = math.log(o.corridor_harmful) - harmful
        return [
            max(0.0, lambda_p + o.corridor_rate * o.lambda_p * above),
            max(0.0, lambda_h + o.corridor_rate * o.lambda_h * below),
        ]

    def descend(self, step: int) -> Row:
        o = self.options
        estimates = [self._estimate(task, step) for task in range(len(self.case.tasks))]
        kappas = [estimate.log_kappa for estimate in estimates]
        first = self.values["first"] = self.values["first"] or kappas
        growth = [kappa - start for kappa, start in zip(kappas, first, strict=True)]
        weights = self._weights(growth[1:])
        if o.lambda_schedule == "corridor":
            harmful = sum(q * g for q, g in zip(weights, growth[1:], strict=True))
            self.values["lambdas"] = self._lambdas(growth[0], harmful)
        lambda_p, lambda_h = self.values["lambdas"]
        row = {"lambda_p": lambda_p, "lambda_h": lambda_h}
        benign, harmful_term = o.terms
        if lambda_p > 0:
            self._push(estimates[0], benign, lambda_p, o.ridge_benign)
        for i, (estimate, q) in enumerate(zip(estimates[1:], weights, strict=True)):
            if lambda_h > 0:
                self._push(estimate, harmful_term, lambda_h * q, o.ridge_harmful)
            if len(weights) > 1:
                row[f"weight_{i}"] = q
        if self.heads:
            row["benign_loss"] = self.supervise(estimates[0].y, estimates[0].rows, o.supervised)
        return row


class ImmaTrainer(TaskTrainer):
    """The updates of `KappaImma`."""

    options: KappaImma

    def descend(self, step: int) -> Row:
        row: dict[str, float] = {}
        losses = []
        for task, head in self.heads.items():
            rows = self.batch(task, step)
            y = self.engine.view(task, rows)
            check_finite(y, "features are not finite")
            if task == 0:
                row["benign_loss"] = self.supervise(y, rows, self.options.w_prior)
                continue
            for _ in range(self.options.inner_steps):
                head.descend(y, head.loss(y, rows)[2], self.options.inner_step)
            value, by_feature, _ = head.loss(y, rows)
            losses.append(value)
            self.engine.add(task, -by_feature / (max(value, TINY) * (len(self.heads) - 1)))
        row["harmful_loss"] = sum(losses) / len(losses)
        check_finite(row.values(), "a loss is not finite")
        return row
