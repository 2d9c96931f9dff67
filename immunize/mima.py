"""Immunizers of text-to-image models: MIMA (arXiv 2412.15320), its baselines and the deep lower level.

One class, `Mima`, is the paper's method, ``joint``, ``compose``, IMMA (arXiv 2311.18815) and the released code; the
presets in ``conf/immunize`` differ in options only. `MimaDeep` has another gradient in the same loop.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from immunize.merge import Merge
from immunize.mima_bilevel import BilevelObjective, BilevelOptions, Rest
from immunize.mima_deep import DeepObjective
from immunize.mima_deep_step import BENIGN, EVALUATIONS, DeepOptions
from immunize.mima_losses import PRECISIONS
from immunize.mima_lower import Attackers
from immunize.mima_options import GradientOptions, LowerOptions, MergeGroup, check_families
from immunize.mima_sampling import PRIORS, Halves
from immunize.mima_scopes import SCOPES, scope_names
from immunize.mima_setup import ARRANGEMENTS, Setup, concept_halves, selected
from immunize.mima_trainer import Objective, Schedule, Section, Trainer, repeat
from lab.diffusion import DiffusionModel
from lab.errors import UserError
from lab.options import choice, count, flag, names, number
from lab.types import Checkpoint, ConceptCase, Kind, Log

logger = logging.getLogger(__name__)

# keyword options are fields, each written once; two immunizers stay different objects
_options = dataclass(kw_only=True, eq=False)


@_options
class ConceptImmunizer:
    """What every concept immunizer shares.

    Args:
        concepts: ``merged``: all targets, adapted one by one and merged at every step; ``joint``: pooled into one
            concept, no merge; ``composed``: each immunized alone, the results merged once; ``single``: one target.
        target: its number in the case, for ``single``. One concept needs no merge, whichever way it is chosen.
        scope: Π_u, see `immunize.mima_scopes.scope_names`.
        steps, beta, beta_schedule, optimizer, weight_decay, clip, checkpoint_every: of the upper level, see
            `immunize.mima_trainer.Schedule`.
        batch_size, prior_batch_size: pictures of a concept and of the prior per step.
        cap: largest loss of a concept that is still pushed up, null for none.
        w_prior: weight of the prior's loss, which stays small. prior: ``keep`` (the case's unrelated pictures),
            ``class`` (pictures of the targets' classes), ``both``.
        merge: see `immunize.mima_options.MergeGroup`.
        precision: ``float32``, or ``bfloat16`` with float32 masters of the weights.
        gradient_checkpointing: recompute activations; slower, for real sizes.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: str
    concepts: str = "merged"
    target: int = 0
    scope: str = "attn2"
    steps: int = 100
    beta: float = 1e-4
    beta_schedule: str = "constant"
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float | None = None
    checkpoint_every: int = 20
    batch_size: int = 8
    prior_batch_size: int = 8
    cap: float | None = None
    w_prior: float = 1.0
    prior: str = "keep"
    merge: Any = None
    precision: str = "float32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        choice("immunize.concepts", self.concepts, ARRANGEMENTS)
        count("immunize.target", self.target, 0)
        choice("immunize.scope", self.scope, SCOPES)
        self.schedule = Schedule(
            self.steps, self.beta, self.beta_schedule, self.optimizer, self.weight_decay, self.clip,
            self.checkpoint_every,
        )  # fmt: skip
        count("immunize.batch_size", self.batch_size)
        count("immunize.prior_batch_size", self.prior_batch_size)
        if self.cap is not None:
            number("immunize.cap", self.cap, above=0)
        number("immunize.w_prior", self.w_prior, 0)
        choice("immunize.prior", self.prior, PRIORS)
        self.merging = MergeGroup.read({} if self.merge is None else self.merge)
        choice("immunize.precision", self.precision, PRECISIONS)
        flag("immunize.gradient_checkpointing", self.gradient_checkpointing)

    def check(self, cases: Sequence[ConceptCase]) -> None:
        """Raises `lab.errors.UserError` for cases that cannot be immunized."""
        for case in cases:
            selected(case, self.concepts, self.target)

    def objective(self, setup: Setup, concepts: Sequence[Halves], merge: Merge) -> Objective:
        raise NotImplementedError

    def needs_prior(self) -> bool:
        return self.w_prior > 0

    def needs_merge(self) -> bool:
        return True

    def needs_decoys(self) -> int:
        """Pictures per target, see `immunize.mima_sampling.Halves`."""
        return 0

    def __call__(
        self, model: DiffusionModel, case: ConceptCase, *, seed: int, checkpoint: Checkpoint | None, log: Log
    ) -> DiffusionModel:
        """See `lab.types.Immunizer`; an early end by divergence returns the last good weights and is logged.

        Raises:
            UserError: options or pictures that cannot work. Diverged: not even the first step was finite.
        """
        setup = Setup.build(model, case, seed, self.precision, self.prior if self.needs_prior() else None)
        targets = selected(case, self.concepts, self.target)
        chosen = concept_halves(model, targets, seed, setup.dtype, self.needs_decoys())
        merging = self.merging if self.needs_merge() else None
        runs, merges, last = setup.arrange(chosen, self.concepts, merging, self.batch_size)
        section, log = Section(checkpoint), _with_report(log, last)
        for i, (concepts, merge) in enumerate(zip(runs, merges, strict=True)):
            here = _numbered(log, i, len(runs), self.schedule.steps)
            if i < len(section.done):
                repeat(section.rows[i], here)
                continue
            theta = setup.restart()
            objective = self.objective(setup, concepts, merge)
            trainer = Trainer(self.schedule, theta, objective, here, self.name, partial(setup.sound, concepts))
            section.finish(trainer.run(section), trainer.rows)
        found = section.done[0] if len(runs) == 1 else last(setup.part(section.done[0]), section.done)
        return _result(model, found)


def _with_report(log: Log, merge: Merge) -> Log:
    """The first row says of the merge how well it is conditioned, see `immunize.merge_factors.Factors`."""
    report = {f"merge_{key}": value for key, value in merge.report.items() if key != "constraint_residual"}
    if report:
        logger.info("merge: %s", ", ".join(f"{key} {value:.3g}" for key, value in report.items()))
    return lambda step, **values: log(step, **({**values, **report} if step == 0 else values))


def _numbered(log: Log, i: int, count: int, steps: int) -> Log:
    """For several trainings one after the other: steps go on counting, and each row says which one it is of."""
    if count == 1:
        return log
    return lambda step, **values: log(step + i * steps, concept=float(i), **values)


def _result(model: DiffusionModel, found: Mapping[str, Tensor]) -> DiffusionModel:
    result = model.copy()
    state = result.unet.state_dict()
    result.unet.load_state_dict({**state, **{name: w.detach().to(state[name]) for name, w in found.items()}})
    return result


@_options
class Mima(ConceptImmunizer):
    """Bi-level immunization through merge and lower level, see `immunize.mima_bilevel`.

    Args:
        lower: see `immunize.mima_options.LowerOptions`.
        hypergradient: see `immunize.mima_options.GradientOptions`.
        attackers, templates, curriculum, k_min, k_max: draw the lower optimizer anew per step and concept in place
            of ``lower``, see `immunize.mima_lower.Attackers`; their scopes must be ``lower.scope``.
    """

    name: str = "mima"
    lower: Any = None
    hypergradient: Any = None
    attackers: Any = None
    templates: Any = ("captions",)
    curriculum: float = 0.0
    k_min: int = 1
    k_max: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.level = LowerOptions.read({} if self.lower is None else self.lower)
        self.through = GradientOptions.read({} if self.hypergradient is None else self.hypergradient)
        if self.level.rest == "adamw" and self.through.method != "alternating":
            told = "belongs to hypergradient.method=alternating; the other methods have one lower optimizer."
            raise UserError("immunize.lower.rest", self.level.rest, told)
        if (
            self.through.method == "implicit"
            and self.level.optimizer == "sgd"
            and self.level.alpha * self.through.rho >= 2
        ):
            told = (
                f"gradient steps of size immunize.lower.alpha={self.level.alpha} on (ρ/2)‖θ'−θ‖² diverge: take ρ < 2/α."
            )
            raise UserError("immunize.hypergradient.rho", self.through.rho, told)
        self.drawn: Attackers | None = None
        if self.attackers is not None:
            self.drawn = Attackers(self.attackers, self.k_min, self.k_max, self.templates, self.curriculum)
            check_families(self.attackers, self.level, self.through)
        elif self.through.method == "implicit" and self.level.rank is not None:
            told = "must be null with immunize.hypergradient.method=implicit, whose lower level moves weights."
            raise UserError("immunize.lower.rank", self.level.rank, told)

    def shards(self, case: ConceptCase) -> int:
        """Into how many parts, run by processes of their own, one immunization of ``case`` can be split."""
        return len(case.targets) if self.concepts == "merged" else 1

    def objective(self, setup: Setup, concepts: Sequence[Halves], merge: Merge) -> Objective:
        unet = setup.denoiser.model.unet
        options = BilevelOptions(
            steps=self.steps, batch_size=self.batch_size, prior_batch_size=self.prior_batch_size, cap=self.cap,
            w_prior=self.w_prior, lower=self.level, gradient=self.through, merging=self.merging,
            checkpointing=self.gradient_checkpointing,
        )  # fmt: skip
        names_l = scope_names(unet, self.level.scope, "immunize.lower.scope")
        rest = None
        if self.level.rest == "adamw":
            others = [n for n in scope_names(unet, "attn2") if n.endswith(".weight") and n not in names_l]
            rest = Rest.build(setup.denoiser.theta, others, self.level.alpha, self.level.weight_decay)
        names_u = scope_names(unet, self.scope)
        return BilevelObjective(
            options, setup.denoiser, names_u, names_l, concepts, setup.prior, merge, setup.seed, self.drawn, rest
        )


@_options
class MimaDeep(ConceptImmunizer):
    """Immunization against attackers that train for many steps, see `immunize.mima_deep`.

    Args:
        attackers, k_min, k_max, templates, curriculum: see `immunize.mima_lower.Attackers`.
        lower_batch_size: pictures per step of an attacker.
        at: marks, fractions of K at which the attacked weights are looked at.
        evaluate: where: ``merged`` weights of all concepts, each concept's ``own`` attacked copy, or both.
        prior_at: the prior's loss is taken at ``start`` (θ itself) or at the ``adapted`` weights (as in MIMA).
        prior_ramp: factor on both preservation terms when the concepts' loss has come to the cap; 1 is constant.
        w_distill: weight of the distance to the original model's predictions on the prior's pictures, at θ.
        w_benign: weight of a benign concept's term after the attack; 0 or a case without rehearsal concepts leaves
            it out. benign: its ``loss``, or its ``regret``, the loss beyond that of the original after the same attack.
        w_decoy: weight of the diffusion loss, at the attacked weights, of what the original paints for the concept's
            captions: an attack that learns the concept has to unlearn these. decoys: such pictures per target.
        online: an upper step at every mark of an attack, which then goes on, in place of one per attack.
    """

    name: str = "mima_deep"
    attackers: Any
    k_min: int
    k_max: int
    templates: Any = ("captions",)
    curriculum: float = 0.0
    lower_batch_size: int = 8
    at: Any = (0.5, 1.0)
    evaluate: Any = EVALUATIONS
    prior_at: str = "start"
    prior_ramp: float = 1.0
    w_distill: float = 0.0
    w_benign: float = 0.0
    benign: str = "regret"
    w_decoy: float = 0.0
    decoys: int = 40
    online: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.drawn = Attackers(self.attackers, self.k_min, self.k_max, self.templates, self.curriculum)
        count("immunize.lower_batch_size", self.lower_batch_size)
        fractions = list(self.at) if isinstance(self.at, Sequence) and not isinstance(self.at, str) else [self.at]
        self.at = tuple(sorted(number("immunize.at", f, above=0, high=1) for f in fractions))
        if not self.at:
            raise UserError("immunize.at", fractions, "needs at least one fraction of the lower steps, e.g. [0.5,1].")
        given = names("immunize.evaluate", self.evaluate)
        self.evaluate = tuple(choice("immunize.evaluate", place, EVALUATIONS) for place in given)
        if not self.evaluate:
            raise UserError("immunize.evaluate", given, f"needs at least one of {', '.join(EVALUATIONS)}.")
        choice("immunize.prior_at", self.prior_at, ("start", "adapted"))
        number("immunize.prior_ramp", self.prior_ramp, 1)
        number("immunize.w_distill", self.w_distill, 0)
        number("immunize.w_benign", self.w_benign, 0)
        choice("immunize.benign", self.benign, BENIGN)
        number("immunize.w_decoy", self.w_decoy, 0)
        count("immunize.decoys", self.decoys)
        flag("immunize.online", self.online)
        rule = self.merging.options.rule
        if rule in ("masked", "gated"):
            raise UserError("immunize.merge.rule", rule, "mima_deep merges by closed_form or mean.")

    def needs_prior(self) -> bool:
        return self.w_prior > 0 or self.w_distill > 0

    def check(self, cases: Sequence[ConceptCase]) -> None:
        super().check(cases)
        for case in cases if self.w_benign else ():
            for concept in case.rehearsal:
                if len(concept.own) < 2:
                    told = f"rehearsal concept {concept.name} has {len(concept.own)} picture(s) for the immunizer; it"
                    raise UserError("scenario", case.name, f"{told} needs at least 2, or set immunize.w_benign=0.")

    def needs_merge(self) -> bool:
        return "merged" in self.evaluate or self.concepts == "composed"

    def needs_decoys(self) -> int:
        return self.decoys if self.w_decoy else 0

    def shards(self, case: ConceptCase) -> int:
        """As `Mima.shards`; a merged model needs all attacked copies in one place."""
        if self.concepts != "merged" or self.evaluate != ("own",):
            return 1
        return len(case.targets) + (1 if self.w_benign and case.rehearsal else 0)

    def objective(self, setup: Setup, concepts: Sequence[Halves], merge: Merge) -> Objective:
        options = DeepOptions(
            steps=self.steps, batch_size=self.batch_size, lower_batch_size=self.lower_batch_size,
            prior_batch_size=self.prior_batch_size, at=self.at, evaluate=self.evaluate, cap=self.cap,
            w_prior=self.w_prior, prior_at=self.prior_at, prior_ramp=self.prior_ramp, w_distill=self.w_distill,
            w_benign=self.w_benign, benign=self.benign, w_decoy=self.w_decoy, online=self.online,
            checkpointing=self.gradient_checkpointing,
        )  # fmt: skip
        names_u = scope_names(setup.denoiser.model.unet, self.scope)
        rehearsal = setup.rehearsal() if self.w_benign else ()
        return DeepObjective(
            options, self.drawn, setup.denoiser, names_u, concepts, rehearsal, setup.prior, merge, setup.seed
        )
