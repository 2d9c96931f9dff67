"""CLAMP (Sarker et al., CVPR 2026): harmful fine-tuning becomes contractive, so that each update is
smaller than the one before and all future updates together have a bound.

The attacker starts at ω_0 and takes K steps of gradient descent on the harmful loss L at a step
size η: u_t = −η g_t, ω_{t+1} = ω_t + u_t. The weights θ that are released descend

    primary loss + w_long · [L(ω_0) − L(ω_K) + ‖g_K‖ B + ½ Λ B² − slack]₊    B = ‖u_K‖ / (1 − c)
                 + w_contraction · softplus(c − max_contraction)
                 + w_curvature · Σ_{t ≤ K} softplus(min_curvature − η κ_t)
                 − w_start · L(ω_0).

c = ‖T(ω_K + εv) − T(ω_K)‖ / ε estimates the contraction factor of the update map T, κ_t = [L(ω_t +
δû_t) − 2 L(ω_t) + L(ω_t − δû_t)] / δ² the curvature along the attack, with û_t = u_t/‖u_t‖. No
Hessian is formed; the gradient passes through all K steps.

The code of the paper is not public. Ours: v = û_K, so that c tells how much smaller the next update
is (in a random direction c is 1 for every network of this size); Λ is measured by the same probe; c
counts as at most ``max_contraction`` in B; one batch gives every term of an update of θ; û_t and v
are constants of the derivative; curvature counts in units of 1/η; L(ω_0) is bounded (``cap``), or
enters as its logarithm for feature extractors, since it has no maximum. AdamW ignores the size of
gradients, which the bound is about: nothing is claimed against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from immunize.gradients import Params, accumulate, gradient_at, math_attention
from immunize.kappa.trainer import TINY, GradientImmunizer, Head, KappaTrainer
from immunize.merge.build import scope_names
from immunize.merge.closed_form import Merge
from immunize.mima.inner_loop import InnerLoop, InnerLoopOptions
from immunize.mima.outer_loop import ConceptImmunizer, Objective, Setup, capped
from immunize.mima.sampling import ConceptSplit
from lab.core.config import Count, NonNegative, Positive, PositiveShare, Text, config
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
        max_contraction, min_curvature: where the second and the third term begin.
        probe: ε and δ, as shares of ‖u_t‖.
    """

    w_long: NonNegative = 1.0
    w_contraction: NonNegative = 1.0
    w_curvature: NonNegative = 0.1
    w_start: NonNegative = 1.0
    slack: NonNegative = 0.0
    max_contraction: PositiveShare = 0.9
    min_curvature: NonNegative = 1.0
    probe: Positive = 0.1

    @model_validator(mode="after")
    def _check_contraction(self) -> ClampOptions:
        if self.max_contraction == 1:
            raise ValueError("max_contraction must be below 1: at 1 the updates have no bound")
        return self


def _norm(params: Params) -> Tensor:
    return torch.stack([x.square().sum() for x in params.values()]).sum().sqrt()


def _moved(params: Params, direction: Params, length: Tensor | float) -> Params:
    return {name: x + length * direction[name] for name, x in params.items()}


def predicted_gain(
    loss: Callable[[Params], Tensor], start: Params, lr: float, steps: int, options: ClampOptions
) -> tuple[Tensor, dict[str, float], Params]:
    """Return the first three terms of the module's objective, what to log, and ω_K.

    Args:
        loss: L(ω), a scalar with a graph to θ.
        start: ω_0, with gradients.
        lr: η. steps: K.
    """

    def gradient(omega: Params) -> tuple[Tensor, Params]:
        value = loss(omega)
        slopes = torch.autograd.grad(value, list(omega.values()), create_graph=True)
        return value, dict(zip(omega, slopes, strict=True))

    omega, values, flat = start, [], start[next(iter(start))].new_zeros(())
    for step in range(steps + 1):
        value, g = gradient(omega)
        values.append(value)
        length = lr * _norm(g)
        size = max(float(length.detach()), TINY)
        unit = {name: -lr * x.detach() / size for name, x in g.items()}
        delta = options.probe * size
        ahead, behind = (loss(_moved(omega, unit, s * delta)) for s in (1, -1))
        curvature = lr * (ahead - 2 * value + behind) / delta**2
        flat = flat + F.softplus(options.min_curvature - curvature)
        if step < steps:
            omega = _moved(omega, g, -lr)
    further = gradient(_moved(omega, unit, delta))[1]
    turned = {name: (further[name] - g[name]) / delta for name in g}
    contraction = _norm({name: unit[name] - lr * x for name, x in turned.items()})
    tail = length / (1 - contraction.clamp(max=options.max_contraction))
    gain = values[0] - values[-1] + _norm(g) * tail + _norm(turned) / 2 * tail.square()
    total = options.w_long * F.relu(gain - options.slack)
    total = total + options.w_contraction * F.softplus(contraction - options.max_contraction)
    total = total + options.w_curvature * flat
    row = {"predicted_gain": gain, "contraction": contraction, "curvature": curvature}
    return total, {k: float(v.detach()) for k, v in row.items()}, omega


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
        return False

    def objective(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> Objective:
        return ClampObjective(setup, concepts, merge)


class ClampObjective(Objective):
    """Gradient of the module's objective for Π_u, mean over the targets."""

    config: Clamp

    def gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        self.denoiser.sync(self.moves)
        o, count = self.config, len(self.concepts)
        total: Params = {}
        rows: dict[int, dict[str, float]] = {}

        def compute(n: int) -> Params:
            gradient, rows[n] = self._of_concept(theta, n, step)
            return gradient

        def add(_: int, gradient: Params) -> None:
            accumulate(total, gradient, 1 / count)

        self.team.reduce_in_order(count, compute, add)
        every = [row for _, row in sorted(self.team.gather(rows).items())]
        values = {key: sum(row[key] for row in every) / count for key in every[0]}
        if o.w_prior:
            batch = self.draw_prior(o.prior_batch_size, step, "prior", 0)
            prior, gradient = gradient_at(
                lambda weights: self.denoiser.loss(batch, weights), theta, {}, self.outer_names
            )
            accumulate(total, gradient, o.w_prior)
            values["prior_loss"] = prior
        return self.team.broadcast(total), values

    def _of_concept(self, theta: Params, n: int, step: int) -> tuple[Params, dict[str, float]]:
        o, concept = self.config, self.concepts[n]
        batch = self.draw_batch(concept.inner, concept, None, step, "lower")
        leaves = {name: theta[name].detach().requires_grad_() for name in self.outer_names}
        names = scope_names(self.unet, o.inner_loop.scope, "immunize.inner_loop.scope")
        fixed = {name: theta[name].detach() for name in names}
        attack = InnerLoop(
            o.inner_loop,
            {**fixed, **leaves},
            names,
            lambda weights, _: self.denoiser.loss(batch, weights),
            n,
            seed=derive(self.seed, "clamp", "factors", concept.name, step),
        )
        with math_attention(), torch.enable_grad():
            start = {name: x + torch.zeros_like(x) for name, x in attack.initial().items()}
            for x in start.values():
                if not x.requires_grad:
                    x.requires_grad_()
            gain, row, _ = predicted_gain(
                lambda omega: attack.objective(0, {}, omega),
                start,
                o.inner_loop.lr,
                o.inner_loop.steps,
                o,
            )
            first = attack.objective(0, {}, start)
            total = gain - o.w_start * capped(first, o.cap)
            slopes = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        row["harmful_loss"] = float(first.detach())
        return dict(zip(leaves, slopes, strict=True)), row


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


class ClampTrainer(KappaTrainer):
    """The updates of `KappaClamp`."""

    def __init__(self, options: KappaClamp, model: FeatureModel, case: Case, seed: int) -> None:
        super().__init__(options, model, case, seed)
        self.o, self.values = options, {}
        y = self.engine.features(0)
        self.heads = {i: Head(task, y.shape[1]) for i, task in enumerate(case.tasks)}
        self.heads[0].fit(y)

    def descend(self, step: int) -> Row:
        rows = self.batch(0, step)
        y = self.engine.view(0, rows)
        row = {"benign_loss": self.supervise(y, rows, self.o.w_prior)}
        harmful = len(self.heads) - 1
        for task in range(1, harmful + 1):
            gradient, told = self._of_task(task, self.batch(task, step))
            self.engine.add(task, gradient / harmful)
            for key, value in told.items():
                row[key] = row.get(key, 0.0) + value / harmful
        if not all(torch.isfinite(torch.tensor(list(row.values())))):
            raise FloatingPointError("a loss is not finite")
        return row

    def _of_task(self, task: int, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
        o, head = self.o, self.heads[task]
        y = self.engine.view(task, rows).requires_grad_()
        lr = o.inner_step / max(head.lipschitz(y.detach()), TINY)
        with torch.enable_grad():
            start = {"w": head.w.clone().requires_grad_()}
            gain, row, end = predicted_gain(
                lambda omega: head.value(y, rows, omega["w"]), start, lr, o.inner_steps, o
            )
            first = head.value(y, rows, start["w"])
            total = gain - o.w_start * first.clamp(min=TINY).log()
            (gradient,) = torch.autograd.grad(total, [y])
        head.w = end["w"].detach()
        return gradient, {**row, "harmful_loss": float(first.detach())}
