"""CLAMP (Sarker et al., CVPR 2026): harmful fine-tuning becomes contractive, so that each update is
smaller than the one before.

The attacker starts at ω_0 and takes K steps of gradient descent on the harmful loss L at a step
size η: u_t = −η g_t, ω_{t+1} = ω_t + u_t. The weights θ that are released descend

    primary loss + w_long · [L(ω_0) − L(ω_K) + ‖g_K‖ B + ½ Λ B² − slack]₊    B = ‖u_K‖ / (1 − c)
                 + w_contraction · softplus(c − max_contraction)
                 + w_curvature · Σ_{t ≤ K} softplus(min_curvature − η κ_t)
                 − w_start · L(ω_0).

û_t = u_t/‖u_t‖ is the direction of the attack and h_t = [g(ω_t + δû_t) − g_t]/δ the change of the
gradient along it, a Hessian-vector product by differences. κ_t = û_tᵀh_t is the curvature along the
attack, c = ‖û_K − η h_K‖ estimates how much smaller the next update is, Λ = ‖h_K‖ is the constant
of the descent lemma. The bracket is then what the attacker gains in all steps together. The
gradient passes through all K steps.

The code of the paper is not public. Ours: differences of gradients, where the paper takes second
differences of losses, which float32 resolves less well (exact products need a third derivative,
which torch 2.13 gets wrong for layer normalization); û_K as the direction of c (in a random one c
is 1 for every network of this size); c counts as at most ``max_contraction`` in B, so that the
bracket is an estimate and no bound where c is larger; one batch gives every term of an update of θ;
η, where it depends on θ, is a constant of the derivative; L(ω_0) is bounded (``cap``), or enters as
its logarithm for feature extractors, since it has no maximum. AdamW ignores the size of gradients:
nothing is claimed against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from immunize.gradients import Params, accumulate, gradient_at, math_attention
from immunize.kappa.trainer import TINY, GradientImmunizer, KappaTrainer, TaskTrainer, check_finite
from immunize.merge.build import scope_names
from immunize.merge.closed_form import Merge
from immunize.mima.inner_loop import InnerLoop, InnerLoopOptions
from immunize.mima.outer_loop import ConceptImmunizer, Objective, Setup, capped
from immunize.mima.sampling import ConceptSplit
from lab.core.config import Count, NonNegative, Positive, Text, config
from lab.core.data import Case
from lab.core.seeding import derive
from lab.core.training import Row
from lab.core.types import FeatureModel


@config
class ClampOptions:
    """Weights and limits of the terms, see the module.

    Args:
        w_long, w_contraction, w_curvature, w_start: weights of the four terms.
        slack: gain of the attacker that is tolerated, in units of the loss.
        max_contraction, min_curvature: where the second and the third term begin, the curvature in
            units of 1/η. At a contraction of 1 the updates have no bound.
        probe: δ, in units of 1 + ‖ω_t‖.
    """

    w_long: NonNegative = 1.0
    w_contraction: NonNegative = 1.0
    w_curvature: NonNegative = 0.1
    w_start: NonNegative = 1.0
    slack: NonNegative = 0.0
    max_contraction: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.9
    min_curvature: NonNegative = 1.0
    probe: Positive = 1e-3


def _dot(a: Params, b: Params) -> Tensor:
    return torch.stack([(x * b[name]).sum() for name, x in a.items()]).sum()


def predicted_gain(
    loss: Callable[[Params], Tensor], start: Params, lr: float, steps: int, options: ClampOptions
) -> tuple[Tensor, Tensor, dict[str, float], Params]:
    """Return the first three terms of the module's objective, L(ω_0), what to log, and ω_K.

    Args:
        loss: L(ω), a scalar with a graph to θ.
        start: ω_0, with gradients.
        lr: η. steps: K.

    Raises:
        FloatingPointError: a gradient of the attack is zero or not finite.
    """

    def gradient(value: Tensor, at: Params) -> Params:
        leaves = list(at.values())
        slopes = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        return dict(zip(at, slopes, strict=True))

    omega, values = start, []
    flat: Tensor | float = 0.0
    for step in range(steps + 1):
        values.append(loss(omega))
        g = gradient(values[-1], omega)
        norm = _dot(g, g).sqrt()
        if not 0 < float(norm.detach()) < math.inf:
            raise FloatingPointError(f"the gradient of the attack has the norm {float(norm)}")
        unit = {name: -x / norm for name, x in g.items()}
        delta = options.probe * (1 + _dot(omega, omega).sqrt())
        ahead = {name: x + delta * unit[name] for name, x in omega.items()}
        turned = {k: (x - g[k]) / delta for k, x in gradient(loss(ahead), ahead).items()}
        curvature = lr * _dot(turned, unit)
        flat = flat + F.softplus(options.min_curvature - curvature)
        if step < steps:
            omega = {name: x - lr * g[name] for name, x in omega.items()}
    next_update = {name: unit[name] - lr * x for name, x in turned.items()}
    contraction = _dot(next_update, next_update).sqrt()
    tail = lr * norm / (1 - contraction.clamp(max=options.max_contraction))
    gain = values[0] - values[-1] + norm * tail + _dot(turned, turned).sqrt() / 2 * tail.square()
    total = options.w_long * F.relu(gain - options.slack)
    total = total + options.w_contraction * F.softplus(contraction - options.max_contraction)
    total = total + options.w_curvature * flat
    row = {"predicted_gain": gain, "contraction": contraction, "curvature": curvature}
    return total, values[0], {k: float(v.detach()) for k, v in row.items()}, omega


# ---- text-to-image models


@config
class Clamp(ConceptImmunizer, ClampOptions):
    """CLAMP on the diffusion loss of the targets; the primary loss is that of unrelated images.

    Args:
        inner_loop: ω and the attack: ``scope``, ``rank`` (null: the weights themselves), ``lr`` η
            and ``steps`` K.
        others: see `ClampOptions` and `immunize.mima.outer_loop.ConceptImmunizer`.
    """

    name: Text = "clamp"
    inner_loop: InnerLoopOptions = InnerLoopOptions(steps=3)

    @model_validator(mode="after")
    def _check_inner_loop(self) -> Clamp:
        inner = self.inner_loop
        if inner.optimizer != "sgd" or inner.prior or inner.secondary_optimizer != "none":
            raise ValueError(
                "inner_loop must be gradient descent: optimizer=sgd, prior=false and "
                "secondary_optimizer=none"
            )
        if self.attackers is not None:
            raise ValueError("attackers must be null: inner_loop is the attack")
        return self

    def needs_merge(self) -> bool:
        return self.concepts == "composed"

    def objective(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> Objective:
        return ClampObjective(setup, concepts, merge)


class ClampObjective(Objective):
    """Gradient of the module's objective for Π_u, mean over the targets."""

    config: Clamp

    def gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        self.denoiser.sync(self.moves)
        o, count = self.config, len(self.concepts)
        total: Params = {}
        rows: list[dict[str, float]] = []
        leaves = {name: theta[name].detach().requires_grad_() for name in self.outer_names}
        for n in range(count):
            with math_attention(), torch.enable_grad():
                terms, row = self.terms({**theta, **leaves}, n, step)
                slopes = torch.autograd.grad(terms, list(leaves.values()), materialize_grads=True)
            accumulate(total, dict(zip(leaves, slopes, strict=True)), 1 / count)
            rows.append(row)
        values = {key: sum(row[key] for row in rows) / count for key in rows[0]}
        if o.w_prior:
            batch = self.draw_prior(o.prior_batch_size, step, "prior", 0)
            prior, gradient = gradient_at(
                lambda weights: self.denoiser.loss(batch, weights), theta, {}, self.outer_names
            )
            accumulate(total, gradient, o.w_prior)
            values["prior_loss"] = prior
        return total, values

    def terms(self, theta: Params, n: int, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the module's objective for one target, without the primary loss, and what to
        log.
        """
        o, concept = self.config, self.concepts[n]
        batch = self.draw_batch(concept.inner, concept, None, step, "lower")
        attack = InnerLoop(
            o.inner_loop,
            theta,
            scope_names(self.unet, o.inner_loop.scope, "immunize.inner_loop.scope"),
            lambda weights, _: self.denoiser.loss(batch, weights),
            n,
            seed=derive(self.seed, "clamp", "factors", concept.name, step),
        )
        start = attack.initial()
        for x in start.values():
            x.requires_grad_()
        gain, first, row, _ = predicted_gain(
            lambda omega: attack.objective(0, {}, omega),
            start,
            o.inner_loop.lr,
            o.inner_loop.steps,
            o,
        )
        row["harmful_loss"] = float(first.detach())
        return gain - o.w_start * capped(first, o.cap), row


# ---- feature extractors


@config
class KappaClamp(GradientImmunizer, ClampOptions):
    """CLAMP on the linear probe: ω is the attacker's head, θ the extractor.

    The probe's own step is ``inner_step``/L, L the largest curvature of the batch. Equal weights
    over harmful tasks; the attackers' heads carry over from step to step, as in `KappaImma`.

    Args:
        inner_steps: K. inner_step: η in units of the stable step 1/L.
        w_prior: weight of the benign loss.
        others: see `ClampOptions` and `immunize.kappa.trainer.GradientImmunizer`.
    """

    name: Text = "kappa_clamp"
    inner_steps: Count = 3
    inner_step: Positive = 0.5
    w_prior: NonNegative = 1.0

    def trainer(self, model: FeatureModel, case: Case, seed: int) -> KappaTrainer:
        return ClampTrainer(self, model, case, seed)


class ClampTrainer(TaskTrainer):
    """The updates of `KappaClamp`."""

    options: KappaClamp

    def descend(self, step: int) -> Row:
        rows = self.batch(0, step)
        row = {"benign_loss": self.supervise(self.engine.view(0, rows), rows, self.options.w_prior)}
        harmful = len(self.heads) - 1
        logged = []
        for task in range(1, harmful + 1):
            gradient, values = self._of_task(task, self.batch(task, step))
            self.engine.add(task, gradient / harmful)
            logged.append(values)
        row |= {key: sum(values[key] for values in logged) / harmful for key in logged[0]}
        check_finite(row.values(), "a loss is not finite")
        return row

    def _of_task(self, task: int, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the gradient with respect to the features [n, d] of a task, and what to log; its
        head goes on to ω_K.
        """
        y = self.engine.view(task, rows).requires_grad_()
        with torch.enable_grad():
            terms, row, end = self.terms(task, y, rows)
            (gradient,) = torch.autograd.grad(terms, [y])
        self.heads[task].w = end.detach()
        return gradient, row

    def terms(self, task: int, y: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, float], Tensor]:
        """Return the module's objective for one task, without the primary loss, what to log, and
        ω_K.
        """
        o, head = self.options, self.heads[task]
        gain, first, row, end = predicted_gain(
            lambda omega: head.value(y, rows, omega["w"]),
            {"w": head.w.clone().requires_grad_()},
            o.inner_step / max(head.lipschitz(y.detach()), TINY),
            o.inner_steps,
            o,
        )
        row["harmful_loss"] = float(first.detach())
        return gain - o.w_start * first.clamp(min=TINY).log(), row, end["w"]
