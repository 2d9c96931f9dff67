"""The objective of MIMA (arXiv 2412.15320) and its baselines: K lower steps, a merge, the gradient
through both.

    J(θ) = mean_n [ −min(L(x^u_n, c_n; θ̂), cap) + w_prior · L(x^prior; θ̂) ]

The gradient is that of `immunize.mima.hypergradient`; here are the losses, the batches and what is
logged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from immunize.merge.closed_form import Merge
from immunize.merge.learned import Learned, learn
from immunize.mima.attackers import Attack, Attackers
from immunize.mima.hypergradient import hypergradient
from immunize.mima.inner_loop import Adapter, Lower, LowerLevel, LowerLoss
from immunize.mima.losses import Denoiser, Params, Weights, accumulate, capped, gradient_at
from immunize.mima.options import GradientOptions, LowerOptions, MergeGroup
from immunize.mima.products import checkpointed
from immunize.mima.sampling import Batch, ConceptSplit, Pool
from lab.core.distributed import Team, team
from lab.core.optimizer_state import restore_slots, slots
from lab.core.seeding import derive


@dataclass(frozen=True)
class BilevelOptions:
    """See `immunize.mima.method.Mima`."""

    steps: int
    batch_size: int
    prior_batch_size: int
    cap: float | None
    w_prior: float
    lower: LowerOptions
    gradient: GradientOptions
    merging: MergeGroup
    checkpointing: bool = False


@dataclass
class SecondaryOptimizer:
    """The released lower level's second half: AdamW at the lower rate on the cross-attention's
    other matrices.

    Its moments live as long as the run.
    """

    names: tuple[str, ...]
    optimizer: torch.optim.Optimizer
    leaves: Params = field(default_factory=dict)

    @staticmethod
    def build(
        theta: Params, names: Sequence[str], lr: float, weight_decay: float
    ) -> SecondaryOptimizer:
        leaves = {name: theta[name].detach().clone() for name in names}
        optimizer = torch.optim.AdamW(list(leaves.values()), lr=lr, weight_decay=weight_decay)
        return SecondaryOptimizer(tuple(names), optimizer, leaves)

    def step(self, theta: Params, gradient: Params) -> Params:
        """What one step from θ adds to each of ``names``."""
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(theta[name])
                leaf.grad = gradient[name]
        self.optimizer.step()
        return {name: leaf.detach() - theta[name] for name, leaf in self.leaves.items()}


class BilevelObjective:
    """Gradient of J for ``upper_names``; ``alternating`` also moves the lower set of ``theta`` in
    place.

    Args:
        attackers: draws the lower optimizer anew per step and concept in place of
            ``options.lower``.
        rest: for ``alternating`` only.
        together: processes that share the concepts; None for those that the run has put on this
            immunization.
    """

    def __init__(
        self,
        options: BilevelOptions,
        denoiser: Denoiser,
        upper_names: Sequence[str],
        lower_names: Sequence[str],
        concepts: Sequence[ConceptSplit],
        prior: Pool | None,
        merge: Merge,
        seed: int,
        attackers: Attackers | None = None,
        rest: SecondaryOptimizer | None = None,
        together: Team | None = None,
    ) -> None:
        self.options, self.denoiser, self.concepts, self.prior = options, denoiser, concepts, prior
        self.upper_names, self.lower_names = tuple(upper_names), tuple(lower_names)
        self.merge, self.seed, self.attackers, self.rest = merge, seed, attackers, rest
        self.team = together or team()
        more = self.lower_names if options.gradient.method == "alternating" else ()
        self.moves = tuple(dict.fromkeys((*self.upper_names, *more, *(rest.names if rest else ()))))

    def state(self) -> Params:
        found = slots(self.rest.optimizer) if self.rest is not None else {}
        if isinstance(self.merge.learned, Learned):
            found = found | {
                f"merge/{key}": value for key, value in self.merge.learned.parameters.items()
            }
        return found

    alike = state

    def load(self, state: Params) -> None:
        if self.rest is not None:
            restore_slots(
                self.rest.optimizer, {k: v for k, v in state.items() if not k.startswith("merge/")}
            )
        if isinstance(self.merge.learned, Learned):
            old = self.merge.learned.parameters
            self.merge.learned.parameters = {key: state[f"merge/{key}"].to(old[key]) for key in old}

    def gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        g = self.options.gradient
        self.denoiser.sync(self.moves)
        here = {name: theta[name] for name in dict.fromkeys((*self.moves, *self.lower_names))}
        seen: dict[int, tuple[float, float]] = {}
        lower = [self._lower(concept, step) for concept in self.concepts]
        settings = [self._settings(concept, step) for concept in self.concepts]
        with self._context():
            shift = self._rest(here, lower) if self.rest is not None else {}
            if isinstance(self.merge.learned, Learned):
                self._learn(here, lower, settings)
            found = hypergradient(
                here,
                lower,
                self._upper(step, seen, shift),
                self.merge,
                settings=settings,
                upper_names=self.upper_names,
                lower_names=self.lower_names,
                method=g.method,
                last=g.last,
                implicit=g.implicit(),
                product=g.product,
                recompute=g.recompute,
                team=self.team,
            )
        if g.method == "alternating":
            with torch.no_grad():
                for name, value in self.team.broadcast(found.merged).items():
                    theta[name].copy_(value + shift[name] if name in shift else value)
        rows = [row for _, row in sorted(self.team.gather(seen).items())]
        return self.team.broadcast(found.gradient), self._values(
            rows, found.lower_drop, found.cosine, found.info
        )

    @contextmanager
    def _context(self) -> Iterator[None]:
        if not self.options.checkpointing:
            yield
            return
        with checkpointed(self.denoiser.model.unet):
            yield

    def _values(
        self,
        seen: list[tuple[float, float]],
        drop: list[float],
        cosine: float,
        info: dict[str, object],
    ) -> dict[str, float]:
        values = {
            "upper_loss": sum(row[0] for row in seen) / len(seen),
            "lower_drop": sum(drop) / len(drop),
        }
        if len(drop) > 1:
            values |= {
                f"lower_drop_{c.name}": value for c, value in zip(self.concepts, drop, strict=True)
            }
        if not math.isnan(cosine):  # the first-order gradient is not compared with itself
            values["cosine"] = cosine
        if not math.isnan(seen[0][1]):
            values["prior_loss"] = sum(row[1] for row in seen) / len(seen)
        for key, value in info.items():
            if isinstance(value, list):  # one per concept; the worst of them
                values[f"implicit_{key}"] = float(max(value))
            elif isinstance(value, int | float):
                values[key] = float(value)
        if isinstance(self.merge.learned, Learned) and self.merge.learned.kind == "sparse":
            values["mask_density"] = self.merge.learned.density()
        return values

    # the two levels

    def _settings(self, concept: ConceptSplit, step: int) -> Lower:
        o = self.options
        seed = derive(self.seed, "mima", "factors", concept.name, step)
        if self.attackers is None:
            adapter = None if o.lower.rank is None else Adapter(o.lower.rank, seed)
            return replace(o.lower.settings(), adapter=adapter)
        drawn = self._drawn(concept, step)
        adapter = Adapter(drawn.rank, seed) if drawn.kind == "lora" else None
        optimizer = "sgd" if drawn.optimizer == "sgd" else "adamw"
        return Lower(drawn.lr, drawn.steps, optimizer, adapter, weight_decay=0.0)  # type: ignore[arg-type]

    def _lower(self, concept: ConceptSplit, step: int) -> LowerLoss:
        o = self.options
        pool = self._captioned(concept.lower, concept, step)
        batches: dict[int, Batch] = {}

        def loss(weights: Params, k: int) -> Tensor:
            if k not in batches:
                batches[k] = pool.batch(
                    o.batch_size * concept.concepts, self.seed, concept.name, step, "lower", k
                )
            value = self.denoiser.loss(batches[k], weights)
            if o.lower.prior and self.prior is not None:
                value = value + o.w_prior * self.denoiser.loss(self._prior(concept, step), weights)
            return value

        return loss

    def _drawn(self, concept: ConceptSplit, step: int) -> Attack:
        assert self.attackers is not None
        return self.attackers.draw(self.seed, concept.name, step)

    def _captioned(self, pool: Pool, concept: ConceptSplit, step: int) -> Pool:
        """``pool`` with the captions that this step's attacker teaches, and asks by."""
        return (
            pool if self.attackers is None else pool.template(self._drawn(concept, step).template)
        )

    def _prior(self, concept: ConceptSplit, step: int) -> Batch:
        assert self.prior is not None
        size = self.options.prior_batch_size * concept.concepts
        return self.prior.batch(size, self.seed, concept.name, step, "prior", 0)

    def _upper(
        self, step: int, seen: dict[int, tuple[float, float]], shift: Params
    ) -> Callable[[Params, int], Tensor]:
        """The n-th term of J; puts the uncapped loss and the prior's into ``seen``. ``shift`` is
        added to θ̂.
        """
        o = self.options

        def upper(weights: Params, n: int) -> Tensor:
            concept = self.concepts[n]
            moved = {name: w + shift[name] if name in shift else w for name, w in weights.items()}
            pool = self._captioned(concept.upper, concept, step)
            batch = pool.batch(
                o.batch_size * concept.concepts, self.seed, concept.name, step, "upper", 0
            )
            loss, kept = self.denoiser.loss(batch, moved), math.nan
            value = -capped(loss, o.cap)
            if o.w_prior and self.prior is not None:
                prior = self.denoiser.loss(self._prior(concept, step), moved)
                kept = float(prior.detach())
                value = value + o.w_prior * prior
            seen[n] = float(loss.detach()), kept
            return value

        return upper

    def _learn(self, theta: Params, lower: Sequence[LowerLoss], settings: Sequence[Lower]) -> None:
        """A step of the merging weights on Σ_n L(x^l_n; θ̂) before the gradient, in which they are
        constants.
        """
        adapted = []
        for n, (loss, setting) in enumerate(zip(lower, settings, strict=True)):
            level = LowerLevel(setting, theta, self.lower_names, loss, n)
            adapted.append(level.adapted(level.run(keep=False).final))
        losses = [lambda weights, loss=loss: loss(weights, 0) for loss in lower]
        learn(self.merge, theta, adapted, losses, sparsity=self.options.merging.sparsity)
        assert isinstance(self.merge.learned, Learned)
        self.merge.learned.parameters = self.team.broadcast(self.merge.learned.parameters)

    def _rest(self, theta: Params, lower: Sequence[LowerLoss]) -> Params:
        assert self.rest is not None
        total: Params = {}
        names = self.rest.names

        def one(n: int) -> Params:
            def first(weights: Weights) -> Tensor:
                return lower[n]({**theta, **weights}, 0)

            return gradient_at(first, theta, {}, names)[1]

        self.team.reduce_in_order(
            len(lower), one, lambda _, gradient: accumulate(total, gradient, 1 / len(lower))
        )
        return self.rest.step(theta, total)
