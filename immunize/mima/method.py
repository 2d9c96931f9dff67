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

from immunize.merge.closed_form import Merge, Params
from immunize.merge.learned import LearnedWeights, learn
from immunize.merge.rows import scope_names
from immunize.mima.base import ConceptImmunizer, ConceptObjective, Setup, capped
from immunize.mima.gradients import accumulate, gradient_at
from immunize.mima.hypergradient import HypergradientOptions, HypergradientResult, hypergradient
from immunize.mima.inner_attackers import Attack
from immunize.mima.inner_loop import InnerLoop, InnerProblem
from immunize.mima.outer_loop import Objective
from immunize.mima.sampling import ConceptSplit
from lab.core.config import Text, config
from lab.core.data import ConceptCase
from lab.core.seeding import derive
from lab.core.training import restore_slots, slots


@config
class Mima(ConceptImmunizer):
    """Bi-level immunization through merge and inner loop.

    Args:
        inner_loop: see `immunize.mima.inner_loop.InnerLoop`.
        hypergradient: see `immunize.mima.hypergradient.HypergradientOptions`.
        attackers, k_min, k_max: draw the inner optimizer, its rate, rank and K anew per step and
            concept in place of those of ``inner_loop``; their scopes must be ``inner_loop.scope``.
    """

    name: Text = "mima"
    inner_loop: InnerLoop = InnerLoop()
    hypergradient: HypergradientOptions = HypergradientOptions()

    @model_validator(mode="after")
    def _check_inner_loop(self) -> Mima:
        """Refuse an inner loop that the gradient cannot pass."""
        method, inner = self.hypergradient.method, self.inner_loop
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
        kinds = {f.kind for f in families} if self.attackers else {"lora" if inner.rank else ""}
        if "lora" in kinds:
            raise ValueError(
                "hypergradient.method=implicit needs an inner loop that moves weights: "
                "inner_loop.rank=null and attackers of kind=weights"
            )
        if self.attackers is None and inner.decay:
            raise ValueError(
                "inner_loop.weight_decay must be 0 with hypergradient.method=implicit: the "
                "proximal term is its decay, towards θ"
            )
        steps = [f.lr[1] for f in families if f.optimizer == "sgd"]
        if self.attackers is None and inner.optimizer == "sgd":
            steps = [inner.lr]
        if max(steps, default=0.0) * self.hypergradient.rho >= 2:
            raise ValueError(
                f"gradient steps of size {max(steps)} on (ρ/2)‖θ'−θ‖² diverge: take "
                "hypergradient.rho < 2 ÷ the inner lr"
            )
        return self

    def shards(self, case: ConceptCase) -> int:
        """Return into how many parts, run by processes of their own, one immunization of ``case``
        can be split.
        """
        return len(case.targets) if self.concepts == "merged" else 1

    def objective(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> Objective:
        return BilevelObjective(self, setup, concepts, merge)


class BilevelObjective(ConceptObjective):
    """Gradient of J for Π_u; ``alternating`` also moves the inner set of θ in place.

    Attributes:
        secondary: the released inner loop's second half: AdamW at the inner rate on copies of the
            cross-attention's other matrices. Its moments live as long as the run.
    """

    def __init__(
        self, config: Mima, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge
    ) -> None:
        super().__init__(setup, concepts, merge)
        self.config, inner = config, config.inner_loop
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
        if config.hypergradient.method == "alternating":
            moves = (*self.outer_names, *self.inner_names, *self.copies)
            self.moves = tuple(dict.fromkeys(moves))

    def state(self) -> Params:
        state = slots(self.secondary) if self.secondary is not None else {}
        if self.merge.learned is not None:
            state |= {f"merge/{k}": value for k, value in self.merge.learned.parameters.items()}
        return state

    def shared_state(self) -> Params:
        return self.state()

    def load(self, state: Params) -> None:
        if self.secondary is not None:
            own = {k: v for k, v in state.items() if not k.startswith("merge/")}
            restore_slots(self.secondary, own)
        if self.merge.learned is not None:
            old = self.merge.learned.parameters
            self.merge.learned.parameters = {key: state[f"merge/{key}"].to(old[key]) for key in old}

    def compute_gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        config, options = self.config, self.config.hypergradient
        names = dict.fromkeys((*self.moves, *self.inner_names))
        point = {name: theta[name].detach() for name in names}
        attacks: list[Attack | None] = [None] * len(self.concepts)
        if config.attackers is not None:
            attacks = [config.draw(self.seed, c.name, step) for c in self.concepts]
        losses: dict[int, tuple[float, float]] = {}
        inner = [self._inner_problem(point, n, a, step) for n, a in enumerate(attacks)]
        shift = self._secondary_step(self.secondary, point, inner) if self.secondary else {}
        if self.merge.learned is not None:
            self._learn(self.merge.learned, point, inner)

        def outer(weights: Params, n: int) -> Tensor:
            """Return the n-th term of J; keep the uncapped loss and the prior's."""
            weights = {k: w + shift[k] if k in shift else w for k, w in weights.items()}
            concept = self.concepts[n]
            batch = self.draw_batch(concept.outer, concept, attacks[n], step, "upper")
            loss = self.denoiser.loss(batch, weights)
            prior = (
                self._prior_loss(weights, concept, step) if config.w_prior else loss.new_zeros(())
            )
            losses[n] = float(loss.detach()), float(prior.detach())
            value = -capped(loss, config.cap)
            return value + config.w_prior * prior if config.w_prior else value

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
        self, losses: list[tuple[float, float]], result: HypergradientResult
    ) -> dict[str, float]:
        """Return what to log."""
        drop = result.inner_loop_drop
        values = {
            "outer_loss": sum(outer for outer, _ in losses) / len(losses),
            "inner_loop_drop": sum(drop) / len(drop),
        }
        if len(drop) > 1:
            pairs = zip(self.concepts, drop, strict=True)
            values |= {f"inner_loop_drop_{c.name}": value for c, value in pairs}
        if not math.isnan(result.cosine):  # the first-order gradient is not compared with itself
            values["cosine"] = result.cosine
        if self.config.w_prior:
            values["prior_loss"] = sum(prior for _, prior in losses) / len(losses)
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
        self, theta: Params, n: int, attack: Attack | None, step: int
    ) -> InnerProblem:
        config, concept, settings = self.config, self.concepts[n], self.config.inner_loop
        if attack is not None:
            settings = replace(
                settings,
                lr=attack.lr,
                steps=attack.steps,
                optimizer=attack.optimizer,
                rank=attack.rank or None,
                weight_decay=0.0,
            )
        draw = partial(self.draw_batch, concept.inner, concept, attack, step, "lower")
        batches = [draw(k) for k in range(settings.steps)]

        def loss(weights: Params, k: int) -> Tensor:
            value = self.denoiser.loss(batches[k], weights)
            if settings.prior and config.w_prior:
                value = value + config.w_prior * self._prior_loss(weights, concept, step)
            return value

        rho = config.hypergradient.rho if config.hypergradient.method == "implicit" else 0.0
        seed = derive(self.seed, "mima", "factors", concept.name, step)
        return InnerProblem(settings, theta, self.inner_names, loss, n, seed=seed, rho=rho)

    def _learn(self, learned: LearnedWeights, theta: Params, inner: Sequence[InnerProblem]) -> None:
        """Take a step of the merging weights on Σ_n L(x^l_n; θ̂) before the gradient, in which they
        are constants.
        """
        adapted = [problem.adapted(problem.run(keep=False).final) for problem in inner]
        losses = [partial(_first_loss, problem) for problem in inner]
        learn(learned, self.merge, theta, adapted, losses, sparsity=self.config.merge.sparsity)
        learned.parameters = self.team.broadcast(learned.parameters)

    def _secondary_step(
        self, optimizer: torch.optim.AdamW, theta: Params, inner: Sequence[InnerProblem]
    ) -> Params:
        """Return what one step of the secondary optimizer from θ adds to it, on the mean of the
        first inner losses.
        """
        total: Params = {}

        def compute(n: int) -> Params:
            return gradient_at(partial(_first_loss, inner[n]), theta, {}, [*self.copies])[1]

        def add(_: int, gradient: Params) -> None:
            accumulate(total, gradient, 1 / len(inner))

        self.team.reduce_in_order(len(inner), compute, add)
        with torch.no_grad():
            for name, copy in self.copies.items():
                copy.copy_(theta[name])
                copy.grad = total[name]
        optimizer.step()
        return {name: copy.detach() - theta[name] for name, copy in self.copies.items()}


def _first_loss(problem: InnerProblem, weights: Params) -> Tensor:
    """Return the loss on the first inner batch."""
    return problem.loss({**problem.theta, **weights}, 0)
