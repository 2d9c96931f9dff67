"""MIMA (arXiv 2412.15320) and its baselines: K inner steps, a merge, the gradient through both.

    J(θ) = mean_n [ −min(L(x^u_n, c_n; θ̂), cap) + w_prior · L(x^prior; θ̂) ]

One class, `Mima`, is the paper's method, ``joint``, ``compose``, IMMA (arXiv 2311.18815) and the
released code; the presets in ``conf/immunize`` differ in options only. The gradient is that of
`immunize.mima.hypergradient`; here are the losses, the batches and what is logged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from pydantic import model_validator
from torch import Tensor

from immunize.gradients import Params, accumulate, gradient_at
from immunize.merge.build import scope_names
from immunize.merge.closed_form import Merge
from immunize.merge.learned import LearnedWeights, learn
from immunize.mima.hypergradient import HypergradientOptions, HypergradientResult, hypergradient
from immunize.mima.inner_loop import DrawnAttacker, InnerLoop, InnerLoopOptions
from immunize.mima.outer_loop import ConceptImmunizer, Objective, Setup, capped
from immunize.mima.sampling import ConceptSplit
from lab.core.config import Text, config
from lab.core.data import ConceptCase
from lab.core.seeding import derive
from lab.core.training import part_of, restore_slots, slots


@config
class Mima(ConceptImmunizer):
    """Bi-level immunization through merge and inner loop.

    Args:
        inner_loop: see `immunize.mima.inner_loop.InnerLoopOptions`.
        hypergradient: see `immunize.mima.hypergradient.HypergradientOptions`.
        attackers, k_min, k_max: draw the inner optimizer, its rate, rank and K anew per step and
            concept in place of those of ``inner_loop``; their scopes must be ``inner_loop.scope``.
    """

    name: Text = "mima"
    inner_loop: InnerLoopOptions = InnerLoopOptions()
    hypergradient: HypergradientOptions = HypergradientOptions()

    @model_validator(mode="after")
    def _check_inner_loop(self) -> Mima:
        """Refuse an inner loop that the gradient cannot pass."""
        method, inner = self.hypergradient.method, self.inner_loop
        if method == "alternating" and self.null_space is not None:
            raise ValueError(
                "null_space must be null with hypergradient.method=alternating: its inner steps "
                "stay in the weights"
            )
        if inner.secondary_optimizer != "none" and method != "alternating":
            raise ValueError(
                "inner_loop.secondary_optimizer belongs to hypergradient.method=alternating; the "
                "other methods have one inner optimizer"
            )
        for name, family in self.families.items():
            if family.scopes != (inner.scope,):
                raise ValueError(
                    f"attackers.{name}.scopes must be [{inner.scope}], that of inner_loop.scope"
                )
        if method != "implicit":
            return self
        families = self.families.values()
        rates = [f.lr[1] for f in families if f.optimizer == "sgd"]
        if self.attackers is None:
            rates = [inner.lr] if inner.optimizer == "sgd" else []
        if any(f.kind == "lora" for f in families) or (self.attackers is None and inner.rank):
            raise ValueError(
                "hypergradient.method=implicit needs an inner loop that moves weights: "
                "inner_loop.rank=null and attackers of kind=weights"
            )
        if self.attackers is None and inner.decay:
            raise ValueError(
                "inner_loop.weight_decay must be 0 with hypergradient.method=implicit: the "
                "proximal term is its decay, towards θ"
            )
        if max(rates, default=0.0) * self.hypergradient.rho >= 2:
            raise ValueError(
                f"gradient steps of size {max(rates)} on (ρ/2)‖θ'−θ‖² diverge: take "
                "hypergradient.rho < 2 ÷ the inner lr"
            )
        return self

    def shards(self, case: ConceptCase) -> int:
        """Return into how many parts, run by processes of their own, one immunization of ``case``
        can be split.
        """
        return len(case.targets) if self.concepts == "merged" else 1

    def objective(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> Objective:
        return BilevelObjective(setup, concepts, merge)


class BilevelObjective(Objective):
    """Gradient of J for Π_u; ``alternating`` also moves the inner set of θ in place.

    Attributes:
        secondary: the released inner loop's second half: AdamW at the inner rate on copies of the
            cross-attention's other matrices. Its moments live as long as the run.
    """

    config: Mima

    def __init__(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> None:
        super().__init__(setup, concepts, merge)
        inner = self.config.inner_loop
        self.inner_names = scope_names(self.unet, inner.scope, "immunize.inner_loop.scope")
        self.copies: Params = {}
        self.secondary: torch.optim.AdamW | None = None
        if inner.secondary_optimizer == "adamw":
            for name in scope_names(self.unet, "attn2"):
                if name.endswith(".weight") and name not in self.inner_names:
                    self.copies[name] = self.denoiser.theta[name].detach().clone()
            self.secondary = torch.optim.AdamW(
                self.copies.values(), lr=inner.lr, weight_decay=inner.weight_decay
            )
        if self.config.hypergradient.method == "alternating":
            moves = (*self.outer_names, *self.inner_names, *self.copies)
            self.moves = tuple(dict.fromkeys(moves))

    def state(self) -> Params:
        secondary = slots(self.secondary) if self.secondary is not None else {}
        learned = self.merge.learned.parameters if self.merge.learned is not None else {}
        return {f"secondary/{k}": v for k, v in secondary.items()} | {
            f"merge/{k}": v for k, v in learned.items()
        }

    def load(self, state: Params) -> None:
        if self.secondary is not None:
            restore_slots(self.secondary, part_of(state, "secondary/"))
        if self.merge.learned is not None:
            old = self.merge.learned.parameters
            saved = part_of(state, "merge/")
            self.merge.learned.parameters = {key: saved[key].to(old[key]) for key in old}

    def gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        self.denoiser.sync(self.moves)
        config, options = self.config, self.config.hypergradient
        point = {name: theta[name].detach() for name in (*self.moves, *self.inner_names)}
        attackers: list[DrawnAttacker | None] = [None] * len(self.concepts)
        if config.attackers is not None:
            attackers = [config.draw(self.seed, c.name, step) for c in self.concepts]
        losses: dict[int, dict[str, float]] = {}
        inner = [self._inner_problem(point, n, a, step) for n, a in enumerate(attackers)]
        shift = self._secondary_step(self.secondary, point, inner) if self.secondary else {}
        if self.merge.learned is not None:
            self._learn(self.merge.learned, point, inner)

        def outer(weights: Params, n: int) -> Tensor:
            """Return the n-th term of J; note the uncapped loss and the prior's."""
            weights = {k: w + shift[k] if k in shift else w for k, w in weights.items()}
            concept = self.concepts[n]
            batch = self.draw_batch(concept.outer, concept, attackers[n], step, "upper")
            loss = self.denoiser.loss(batch, weights)
            losses[n] = {"outer_loss": float(loss.detach())}
            value = -capped(loss, config.cap)
            if config.w_prior:
                prior = self._prior_loss(weights, concept, step)
                losses[n]["prior_loss"] = float(prior.detach())
                value = value + config.w_prior * prior
            return value

        result = hypergradient(
            point, inner, outer, self.merge, self.outer_names, options, team=self.team
        )
        if options.method == "alternating":
            with torch.no_grad():
                for name, value in self.team.broadcast(result.merged).items():
                    theta[name].copy_(value + shift[name] if name in shift else value)
        rows = [row for _, row in sorted(self.team.gather(losses).items())]
        return self.team.broadcast(result.gradient), self._values(rows, result)

    def _values(
        self, rows: list[dict[str, float]], result: HypergradientResult
    ) -> dict[str, float]:
        """Return what to log: means over the concepts."""
        drop = result.inner_loop_drop
        values = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        values["inner_loop_drop"] = sum(drop) / len(drop)
        if len(drop) > 1:
            pairs = zip(self.concepts, drop, strict=True)
            values |= {f"inner_loop_drop_{c.name}": value for c, value in pairs}
        if not math.isnan(result.cosine):  # the first-order gradient is not compared with itself
            values["cosine"] = result.cosine
        for key, value in result.info.items():
            if isinstance(value, list):  # one per concept; the worst of them
                values[f"implicit_{key}"] = float(max(value))
            else:
                values[key] = float(value)
        if self.merge.learned is not None and self.merge.learned.kind == "sparse":
            values["mask_density"] = self.merge.learned.density()
        return values

    def _prior_loss(self, weights: Params, concept: ConceptSplit, step: int) -> Tensor:
        size = self.config.prior_batch_size * concept.concepts
        return self.denoiser.loss(self.draw_prior(size, concept.name, step, "prior", 0), weights)

    def _inner_problem(
        self, theta: Params, n: int, attacker: DrawnAttacker | None, step: int
    ) -> InnerLoop:
        config, concept, settings = self.config, self.concepts[n], self.config.inner_loop
        if attacker is not None:
            settings = replace(attacker.settings, eps=settings.eps, prior=settings.prior)
        draw = partial(self.draw_batch, concept.inner, concept, attacker, step, "lower")
        batches = [draw(k) for k in range(settings.steps)]

        def loss(weights: Params, k: int) -> Tensor:
            value = self.denoiser.loss(batches[k], weights)
            if settings.prior and config.w_prior:
                value = value + config.w_prior * self._prior_loss(weights, concept, step)
            return value

        rho = config.hypergradient.rho if config.hypergradient.method == "implicit" else 0.0
        seed = derive(self.seed, "mima", "factors", concept.name, step)
        return InnerLoop(settings, theta, self.inner_names, loss, n, seed=seed, rho=rho)

    def _learn(self, learned: LearnedWeights, theta: Params, inner: Sequence[InnerLoop]) -> None:
        """Take a step of the merging weights on Σ_n L(x^l_n; θ̂) before the gradient, in which they
        are constants.
        """
        adapted = [problem.adapted(problem.run(keep=False).final) for problem in inner]
        losses = [partial(_first_loss, problem) for problem in inner]
        learn(learned, self.merge, theta, adapted, losses, sparsity=self.config.merge.sparsity)
        learned.parameters = self.team.broadcast(learned.parameters)

    def _secondary_step(
        self, optimizer: torch.optim.AdamW, theta: Params, inner: Sequence[InnerLoop]
    ) -> Params:
        """Return what one step of the secondary optimizer from θ adds to it, on the mean of the
        first inner losses.
        """
        total: Params = {}
        self.team.reduce_in_order(
            len(inner),
            lambda n: gradient_at(partial(_first_loss, inner[n]), theta, {}, [*self.copies])[1],
            lambda _, gradient: accumulate(total, gradient, 1 / len(inner)),
        )
        with torch.no_grad():
            for name, copy in self.copies.items():
                copy.copy_(theta[name])
                copy.grad = total[name]
        optimizer.step()
        return {name: copy.detach() - theta[name] for name, copy in self.copies.items()}


def _first_loss(problem: InnerLoop, weights: Params) -> Tensor:
    """Return the loss on the first inner batch."""
    return problem.loss({**problem.theta, **weights}, 0)
