"""Immunizers of text-to-image models: MIMA (arXiv 2412.15320), its baselines and the deep lower
level.

One class, `Mima`, is the paper's method, ``joint``, ``compose``, IMMA (arXiv 2311.18815) and the
released code; the presets in ``conf/immunize`` differ in options only. `MimaDeep` has another
gradient in the same loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from immunize.merge.closed_form import Merge
from immunize.mima.attackers import Attackers
from immunize.mima.base import ConceptImmunizer, immunizer_options
from immunize.mima.bilevel import BilevelObjective, BilevelOptions, SecondaryOptimizer
from immunize.mima.deep import DeepObjective
from immunize.mima.deep_step import BENIGN, EVALUATIONS, DeepOptions
from immunize.mima.options import GradientOptions, LowerOptions, check_lower
from immunize.mima.sampling import ConceptSplit, Decoys, enough
from immunize.mima.scopes import scope_names
from immunize.mima.setup import Setup
from immunize.mima.trainer import Objective
from lab.core.data import ConceptCase
from lab.core.errors import UserError
from lab.core.options import choice, count, flag, names, number, unread


@immunizer_options
class Mima(ConceptImmunizer):
    """Bi-level immunization through merge and lower level, see `immunize.mima.bilevel`.

    Args:
        inner_loop: see `immunize.mima.options.LowerOptions`.
        hypergradient: see `immunize.mima.options.GradientOptions`.
        attackers, k_min, k_max: draw the lower optimizer anew per step and concept in place of
            ``inner_loop``, see `immunize.mima.attackers.Attackers`; their scopes must be
            ``inner_loop.scope``.
    """

    name: str = "mima"
    inner_loop: Any = None
    hypergradient: Any = None
    attackers: Any = None
    k_min: int = 1
    k_max: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.level = LowerOptions.read({} if self.inner_loop is None else self.inner_loop)
        self.through = GradientOptions.read(
            {} if self.hypergradient is None else self.hypergradient
        )
        if self.level.rest == "adamw" and self.through.method != "alternating":
            told = (
                "belongs to hypergradient.method=alternating; the other methods have one "
                "lower optimizer."
            )
            raise UserError("immunize.inner_loop.rest", self.level.rest, told)
        self.drawn: Attackers | None = None
        if self.attackers is not None:
            self.drawn = Attackers(self.attackers, self.k_min, self.k_max)
        for option, default in (("k_min", 1), ("k_max", 1)):
            unread(
                f"immunize.{option}",
                getattr(self, option),
                default,
                self.drawn is not None,
                "immunize.attackers",
            )
        check_lower(self.level, self.through, self.drawn)
        unread(
            "immunize.inner_loop.prior",
            self.level.prior,
            False,
            self.needs_prior(),
            "immunize.w_prior > 0",
        )
        self._check_read()

    def needs_templates(self) -> tuple[str, ...]:
        return self.drawn.templates if self.drawn is not None else ()

    def shards(self, case: ConceptCase) -> int:
        """Into how many parts, run by processes of their own, one immunization of ``case`` can be
        split.
        """
        return len(case.targets) if self.concepts == "merged" else 1

    def objective(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> Objective:
        unet = setup.denoiser.model.unet
        options = BilevelOptions(
            steps=self.steps,
            batch_size=self.batch_size,
            prior_batch_size=self.prior_batch_size,
            cap=self.cap,
            w_prior=self.w_prior,
            lower=self.level,
            gradient=self.through,
            merging=self.merging,
            checkpointing=self.gradient_checkpointing,
        )
        names_l = scope_names(unet, self.level.scope, "immunize.inner_loop.scope")
        rest = None
        if self.level.rest == "adamw":
            others = [
                n for n in scope_names(unet, "attn2") if n.endswith(".weight") and n not in names_l
            ]
            rest = SecondaryOptimizer.build(
                setup.denoiser.theta, others, self.level.lr, self.level.weight_decay
            )
        names_u = scope_names(unet, self.scope)
        return BilevelObjective(
            options,
            setup.denoiser,
            names_u,
            names_l,
            concepts,
            setup.prior,
            merge,
            setup.seed,
            self.drawn,
            rest,
        )


@immunizer_options
class MimaDeep(ConceptImmunizer):
    """Immunization against attackers that train for many steps, see `immunize.mima.deep`.

    Args:
        attackers, k_min, k_max: see `immunize.mima.attackers.Attackers`.
        inner_batch_size: pictures per step of an attacker.
        at: marks, fractions of K at which the attacked weights are looked at.
        evaluate: where: ``merged`` weights of all concepts, each concept's ``own`` attacked copy,
            or both.
        prior_at: the prior's loss is taken at ``start`` (θ itself) or at the ``adapted`` weights
            (as in MIMA).
        prior_ramp: factor on the preservation terms that are taken at θ when the concepts' loss has
            come to the cap: both with ``prior_at=start``, the distance to the original alone with
            ``adapted``; 1 is constant.
        w_distill: weight of the distance to the original model's predictions on the prior's
            pictures, at θ.
        w_benign: weight of a benign concept's term after the attack; 0 or a case without rehearsal
            concepts leaves it out. benign: its ``loss``, or its ``regret``, the loss beyond that of
            the original after the same attack.
        w_decoy: weight of the diffusion loss, at the attacked weights, of what the original paints
            for the concept's captions: an attack that learns the concept has to unlearn these.
            decoys: such pictures per target, painted in decoy_steps of DDIM at guidance 4, whatever
                the scenario samples with.
        online: an upper step at every mark of an attack, which then goes on, in place of one per
            attack.
    """

    name: str = "mima_deep"
    attackers: Any
    k_min: int
    k_max: int
    inner_batch_size: int = 8
    at: Any = (0.5, 1.0)
    evaluate: Any = EVALUATIONS
    prior_at: str = "start"
    prior_ramp: float = 1.0
    w_distill: float = 0.0
    w_benign: float = 0.0
    benign: str = "loss"
    w_decoy: float = 0.0
    decoys: int = 40
    decoy_steps: int = 20
    online: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.drawn = Attackers(self.attackers, self.k_min, self.k_max)
        count("immunize.inner_batch_size", self.inner_batch_size)
        fractions = (
            list(self.at)
            if isinstance(self.at, Sequence) and not isinstance(self.at, str)
            else [self.at]
        )
        self.at = tuple(sorted(number("immunize.at", f, above=0, high=1) for f in fractions))
        if not self.at:
            raise UserError(
                "immunize.at",
                fractions,
                "needs at least one fraction of the lower steps, e.g. [0.5,1].",
            )
        given = names("immunize.evaluate", self.evaluate)
        self.evaluate = tuple(choice("immunize.evaluate", place, EVALUATIONS) for place in given)
        if not self.evaluate:
            raise UserError(
                "immunize.evaluate", given, f"needs at least one of {', '.join(EVALUATIONS)}."
            )
        choice("immunize.prior_at", self.prior_at, ("start", "adapted"))
        number("immunize.prior_ramp", self.prior_ramp, 1)
        number("immunize.w_distill", self.w_distill, 0)
        number("immunize.w_benign", self.w_benign, 0)
        choice("immunize.benign", self.benign, BENIGN)
        number("immunize.w_decoy", self.w_decoy, 0)
        count("immunize.decoys", self.decoys)
        count("immunize.decoy_steps", self.decoy_steps)
        flag("immunize.online", self.online)
        rule = self.merging.options.rule
        if rule in ("masked", "gated"):
            raise UserError("immunize.merge.rule", rule, "mima_deep merges by closed_form or mean.")
        unread("immunize.benign", self.benign, "loss", self.w_benign > 0, "immunize.w_benign > 0")
        self._check_read()

    def needs_prior(self) -> bool:
        return self.w_prior > 0 or self.w_distill > 0

    def check(self, cases: Sequence[ConceptCase]) -> None:
        super().check(cases)
        for case in cases if self.w_benign else ():
            for concept in case.rehearsal:
                enough(concept, "rehearsal concept", ", or set immunize.w_benign=0")

    def needs_merge(self) -> bool:
        return "merged" in self.evaluate or self.concepts == "composed"

    def needs_decoys(self) -> Decoys | None:
        return Decoys(self.decoys, self.decoy_steps) if self.w_decoy else None

    def needs_templates(self) -> tuple[str, ...]:
        return self.drawn.templates

    def shards(self, case: ConceptCase) -> int:
        """As `Mima.shards`; a merged model needs all attacked copies in one place."""
        if self.concepts != "merged" or self.evaluate != ("own",):
            return 1
        return len(case.targets) + (1 if self.w_benign and case.rehearsal else 0)

    def objective(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> Objective:
        options = DeepOptions(
            steps=self.steps,
            batch_size=self.batch_size,
            inner_batch_size=self.inner_batch_size,
            prior_batch_size=self.prior_batch_size,
            at=self.at,
            evaluate=self.evaluate,
            cap=self.cap,
            w_prior=self.w_prior,
            prior_at=self.prior_at,
            prior_ramp=self.prior_ramp,
            w_distill=self.w_distill,
            w_benign=self.w_benign,
            benign=self.benign,
            w_decoy=self.w_decoy,
            online=self.online,
            checkpointing=self.gradient_checkpointing,
        )
        names_u = scope_names(setup.denoiser.model.unet, self.scope)
        rehearsal = setup.rehearsal(self.drawn.templates) if self.w_benign else ()
        return DeepObjective(
            options,
            self.drawn,
            setup.denoiser,
            names_u,
            concepts,
            rehearsal,
            setup.prior,
            merge,
            setup.seed,
        )
