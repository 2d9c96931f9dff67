"""MIMA (arXiv 2412.15320) and its baselines: K inner steps, a merge, the gradient through both.

    J(θ) = mean_n [ −min(L(x^u_n, c_n; θ̂), cap) + w_prior · L(x^prior; θ̂) ]

One class, `Mima`, is the paper's method, ``joint``, ``compose``, IMMA (arXiv 2311.18815) and the
released code; the presets in ``conf/immunize`` differ in options only. The gradient is that of
`immunize.mima.hypergradient`; here are the losses, the batches and what is logged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from pydantic import model_validator
from torch import Tensor

from immunize.merge.closed_form import Merge, Params
from immunize.merge.layers import scope_names
from immunize.merge.learned import learn
from immunize.mima.base import ConceptImmunizer, Setup, capped
from immunize.mima.gradients import accumulate, checkpointed, gradient_at
from immunize.mima.hypergradient import HypergradientOptions, HypergradientResult, hypergradient
from immunize.mima.inner_attackers import Attack
from immunize.mima.inner_loop import InnerLoop, InnerLoss, InnerProblem
from immunize.mima.outer_loop import Objective
from immunize.mima.sampling import Batch, ConceptSplit, Pool
from lab.core.config import Text, config
from lab.core.data import ConceptCase
from lab.core.distributed import team
from lab.core.optimizer_state import restore_slots, slots
from lab.core.seeding import derive


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
        loops = [(f.kind == "lora", f.optimizer, f.lr[1], 0.0) for f in families]
        if self.attackers is None:
            loops = [(inner.rank is not None, inner.optimizer, inner.lr, inner.weight_decay)]
        for is_lora, optimizer, lr, decay in loops:
            if is_lora:
                raise ValueError(
                    "hypergradient.method=implicit needs an inner loop that moves weights: "
                    "inner_loop.rank=null and attackers of kind=weights"
                )
            if optimizer == "adamw" and decay:
                raise ValueError(
                    "inner_loop.weight_decay must be 0 with hypergradient.method=implicit: the "
                    "proximal term is its decay, towards θ"
                )
            if optimizer == "sgd" and lr * self.hypergradient.rho >= 2:
                raise ValueError(
                    f"gradient steps of size {lr} on (ρ/2)‖θ'−θ‖² diverge: take "
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


class SecondaryOptimizer:
    """The released inner loop's second half: AdamW at the inner rate on the cross-attention's other
    matrices.

    Its moments live as long as the run.
    """

    def __init__(self, theta: Params, names: Sequence[str], settings: InnerLoop) -> None:
        self.leaves = {name: theta[name].detach().clone() for name in names}
        self.optimizer = torch.optim.AdamW(
            self.leaves.values(), lr=settings.lr, weight_decay=settings.weight_decay
        )

    @torch.no_grad()
    def step(self, theta: Params, gradient: Params) -> Params:
        """Return what one step from θ adds to each name."""
        for name, leaf in self.leaves.items():
            leaf.copy_(theta[name])
            leaf.grad = gradient[name]
        self.optimizer.step()
        return {name: leaf - theta[name] for name, leaf in self.leaves.items()}


class BilevelObjective(Objective):
    """Gradient of J for Π_u; ``alternating`` also moves the inner set of θ in place."""

    def __init__(
        self, config: Mima, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge
    ) -> None:
        self.config, self.setup, self.concepts, self.merge = config, setup, concepts, merge
        self.denoiser, self.prior, self.seed = setup.denoiser, setup.prior, setup.seed
        self.team = team()
        unet, inner = self.denoiser.model.unet, config.inner_loop
        self.outer_names = scope_names(unet, config.scope)
        self.inner_names = scope_names(unet, inner.scope, "immunize.inner_loop.scope")
        self.secondary: SecondaryOptimizer | None = None
        moves = self.outer_names
        if config.hypergradient.method == "alternating":
            moves += self.inner_names
        if inner.secondary_optimizer == "adamw":
            others = [x for x in scope_names(unet, "attn2") if x not in self.inner_names]
            others = [x for x in others if x.endswith(".weight")]
            self.secondary = SecondaryOptimizer(self.denoiser.theta, others, inner)
            moves += tuple(others)
        self.moves = tuple(dict.fromkeys(moves))

    def state(self) -> Params:
        state = slots(self.secondary.optimizer) if self.secondary is not None else {}
        if self.merge.learned is not None:
            state |= {f"merge/{k}": value for k, value in self.merge.learned.parameters.items()}
        return state

    def shared_state(self) -> Params:
        return self.state()

    def load(self, state: Params) -> None:
        if self.secondary is not None:
            own = {k: v for k, v in state.items() if not k.startswith("merge/")}
            restore_slots(self.secondary.optimizer, own)
        if self.merge.learned is not None:
            old = self.merge.learned.parameters
            self.merge.learned.parameters = {key: state[f"merge/{key}"].to(old[key]) for key in old}

    def gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        method = self.config.hypergradient.method
        self.denoiser.sync(self.moves)
        names = dict.fromkeys((*self.moves, *self.inner_names))
        point = {name: theta[name].detach() for name in names}
        losses: dict[int, tuple[float, float]] = {}
        inner = [self._inner_problem(point, n, step) for n in range(len(self.concepts))]
        saving = self.config.gradient_checkpointing
        with checkpointed(self.denoiser.model.unet) if saving else nullcontext():
            shift = self._secondary_step(self.secondary, point, inner) if self.secondary else {}
            if self.merge.learned is not None:
                self._learn(point, inner)

            def outer(weights: Params, n: int) -> Tensor:
                moved = {k: w + shift[k] if k in shift else w for k, w in weights.items()}
                value, losses[n] = self._outer_loss(moved, n, step)
                return value

            result = hypergradient(
                point,
                inner,
                outer,
                self.merge,
                self.outer_names,
                self.config.hypergradient,
                team=self.team,
            )
        if method == "alternating":
            with torch.no_grad():
                for name, value in self.team.same(result.merged).items():
                    theta[name].copy_(value + shift[name] if name in shift else value)
        rows = [row for _, row in sorted(self.team.gather(losses).items())]
        return self.team.same(result.gradient), self._values(rows, result)

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

    # the two loops

    def _attack(self, concept: ConceptSplit, step: int) -> Attack | None:
        """Return the attacker of this step, where attackers are drawn."""
        if self.config.attackers is None:
            return None
        return self.config.draw(self.seed, concept.name, step)

    def _batch(self, pool: Pool, concept: ConceptSplit, step: int, level: str, k: int) -> Batch:
        """Draw images with the captions that this step's attacker teaches, and asks by."""
        attack = self._attack(concept, step)
        pool = pool if attack is None else pool.template(attack.template)
        size = self.config.batch_size * concept.concepts
        return pool.batch(size, self.seed, concept.name, step, level, k)

    def _prior_loss(self, weights: Params, concept: ConceptSplit, step: int) -> Tensor:
        assert self.prior is not None
        size = self.config.prior_batch_size * concept.concepts
        batch = self.prior.batch(size, self.seed, concept.name, step, "prior", 0)
        return self.denoiser.loss(batch, weights)

    def _inner_problem(self, theta: Params, n: int, step: int) -> InnerProblem:
        config, concept = self.config, self.concepts[n]
        settings, attack = config.inner_loop, self._attack(concept, step)
        if attack is not None:
            settings = replace(  # type: ignore[type-var]
                settings,
                lr=attack.lr,
                steps=attack.steps,
                optimizer=attack.optimizer,
                rank=attack.rank or None,
                weight_decay=0.0,
            )
        batches: dict[int, Batch] = {}

        def loss(weights: Params, k: int) -> Tensor:
            if k not in batches:
                batches[k] = self._batch(concept.inner, concept, step, "lower", k)
            value = self.denoiser.loss(batches[k], weights)
            if settings.prior and config.w_prior:
                value = value + config.w_prior * self._prior_loss(weights, concept, step)
            return value

        rho = config.hypergradient.rho if config.hypergradient.method == "implicit" else 0.0
        seed = derive(self.seed, "mima", "factors", concept.name, step)
        return InnerProblem(settings, theta, self.inner_names, loss, n, seed=seed, rho=rho)

    def _outer_loss(self, weights: Params, n: int, step: int) -> tuple[Tensor, tuple[float, float]]:
        """Return the n-th term of J, and the uncapped loss and the prior's."""
        config, concept = self.config, self.concepts[n]
        loss = self.denoiser.loss(self._batch(concept.outer, concept, step, "upper", 0), weights)
        value, prior_loss = -capped(loss, config.cap), math.nan
        if config.w_prior:
            prior = self._prior_loss(weights, concept, step)
            prior_loss = float(prior.detach())
            value = value + config.w_prior * prior
        return value, (float(loss.detach()), prior_loss)

    def _learn(self, theta: Params, inner: Sequence[InnerProblem]) -> None:
        """Take a step of the merging weights on Σ_n L(x^l_n; θ̂) before the gradient, in which they
        are constants.
        """
        learned = self.merge.learned
        assert learned is not None
        adapted = [problem.adapted(problem.run(keep=False).final) for problem in inner]
        losses: list = [lambda weights, loss=problem.loss: loss(weights, 0) for problem in inner]
        learn(learned, self.merge, theta, adapted, losses, sparsity=self.config.merge.sparsity)
        learned.parameters = self.team.same(learned.parameters)

    def _secondary_step(
        self, secondary: SecondaryOptimizer, theta: Params, inner: Sequence[InnerProblem]
    ) -> Params:
        """Return what the secondary optimizer adds to θ, on the mean of the first inner losses."""
        total: Params = {}
        names = tuple(secondary.leaves)

        def compute(n: int) -> Params:
            return gradient_at(lambda w: inner[n].loss({**theta, **w}, 0), theta, {}, names)[1]

        def add(_: int, gradient: Params) -> None:
            accumulate(total, gradient, 1 / len(inner))

        self.team.ordered(len(inner), compute, add)
        return secondary.step(theta, total)
