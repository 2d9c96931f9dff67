"""What every immunizer of text-to-image models shares: options, which concepts are trained
together, the loop.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from immunize.merge.closed_form import Merge
from immunize.merge.rows import MergeOptions
from immunize.mima.losses import PRECISIONS
from immunize.mima.options import MergeGroup
from immunize.mima.sampling import PRIORS, ConceptSplit, Decoys
from immunize.mima.scopes import SCOPES
from immunize.mima.setup import ARRANGEMENTS, Setup, concept_halves, selected
from immunize.mima.trainer import Objective, Schedule, Section, Trainer, repeat
from lab.core.data import ConceptCase, Kind
from lab.core.errors import UserError
from lab.core.options import choice, count, flag, number, unread
from lab.core.types import Checkpoint, Immunizer, Log
from lab.models.diffusion import DiffusionModel

logger = logging.getLogger(__name__)

# keyword options are fields, each written once; two immunizers stay different objects
immunizer_options = dataclass(kw_only=True, eq=False)


@immunizer_options
class ConceptImmunizer(Immunizer):
    """What every concept immunizer shares.

    Args:
        concepts: ``merged``: all targets, adapted one by one and merged at every step; ``joint``:
            pooled into one concept, no merge; ``composed``: each immunized alone, the results
            merged once; ``single``: one target.
        target: its number in the case, for ``single``. One concept needs no merge, whichever way it
            is chosen.
        scope: Π_u, see `immunize.mima.scopes.scope_names`.
        steps, lr, lr_schedule, optimizer, weight_decay, clip, checkpoint_every: of the upper
            level, see `immunize.mima.trainer.Schedule`.
        batch_size, prior_batch_size: pictures of a concept and of the prior per step.
        cap: largest loss of a concept that is still pushed up, null for none.
        w_prior: weight of the prior's loss, which stays small. prior: ``keep`` (the case's
            unrelated pictures), ``class`` (pictures of the targets' classes), ``both``.
        merge: see `immunize.mima.options.MergeGroup`.
        precision: ``float32``, or ``bfloat16`` with float32 masters of the weights.
        gradient_checkpointing: recompute activations; slower, for real sizes.
        interpolation: s in θ0 + s (θ − θ0), the weights that are returned, between the given model
            (0) and the trained one (1); WiSE-FT, arXiv 2109.01903, eq. 1.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: str
    concepts: str = "merged"
    target: int = 0
    scope: str = "attn2"
    steps: int = 100
    lr: float = 1e-4
    lr_schedule: str = "constant"
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
    interpolation: float = 1.0

    def __post_init__(self) -> None:
        choice("immunize.concepts", self.concepts, ARRANGEMENTS)
        count("immunize.target", self.target, 0)
        unread(
            "immunize.target", self.target, 0, self.concepts == "single", "immunize.concepts=single"
        )
        choice("immunize.scope", self.scope, SCOPES)
        self.schedule = Schedule(
            self.steps,
            self.lr,
            self.lr_schedule,
            self.optimizer,
            self.weight_decay,
            self.clip,
            self.checkpoint_every,
        )
        count("immunize.batch_size", self.batch_size)
        count("immunize.prior_batch_size", self.prior_batch_size)
        if self.cap is not None:
            number("immunize.cap", self.cap, above=0)
        number("immunize.w_prior", self.w_prior, 0)
        choice("immunize.prior", self.prior, PRIORS)
        self.merging = MergeGroup.read({} if self.merge is None else self.merge)
        if self.concepts == "composed" and (rule := self.merging.options.rule) in (
            "masked",
            "gated",
        ):
            told = (
                "is learned while concepts are trained together; concepts=composed merges "
                "by closed_form or mean."
            )
            raise UserError("immunize.merge.rule", rule, told)
        choice("immunize.precision", self.precision, PRECISIONS)
        flag("immunize.gradient_checkpointing", self.gradient_checkpointing)
        number("immunize.interpolation", self.interpolation, above=0, high=1)

    def _check_read(self) -> None:
        """Whether something reads the shared options, when all are known; the merge's numbers may
        stand unread, as experiments set them for all methods.
        """
        unread("immunize.prior", self.prior, "keep", self.needs_prior(), "immunize.w_prior > 0")
        read = self.needs_merge() and self.concepts in ("merged", "composed")
        for option in ("rule", "scope"):
            default, needs = (
                getattr(MergeOptions, option),
                "concepts that are merged (immunize.concepts)",
            )
            unread(
                f"immunize.merge.{option}",
                getattr(self.merging.options, option),
                default,
                read,
                needs,
            )

    def check(self, cases: Sequence[ConceptCase]) -> None:
        """Raises `lab.core.errors.UserError` for cases that cannot be immunized."""
        for case in cases:
            selected(case, self.concepts, self.target)

    @abstractmethod
    def objective(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> Objective:
        """What the upper level descends."""

    def needs_prior(self) -> bool:
        return self.w_prior > 0

    def needs_merge(self) -> bool:
        return True

    def needs_decoys(self) -> Decoys | None:
        """For every target, see `immunize.mima.sampling.ConceptSplit`."""
        return None

    def needs_templates(self) -> tuple[str, ...]:
        """Of captions that attackers of the lower level may write, see `lab.core.captions`."""
        return ()

    def __call__(
        self,
        model: DiffusionModel,
        case: ConceptCase,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        log: Log,
    ) -> DiffusionModel:
        """See `lab.core.types.Immunizer`; an early end by divergence returns the last good weights
        and is logged.

        Raises:
            UserError: options or pictures that cannot work. Diverged: not even the first step was
                finite.
        """
        setup = Setup.build(
            model, case, seed, self.precision, self.prior if self.needs_prior() else None
        )
        targets = selected(case, self.concepts, self.target)
        chosen = concept_halves(
            model, targets, seed, setup.dtype, self.needs_decoys(), self.needs_templates()
        )
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
            trainer = Trainer(
                self.schedule, theta, objective, here, self.name, partial(setup.sound, concepts)
            )
            section.finish(trainer.run(section), trainer.rows)
        if len(runs) == 1:
            return _result(model, section.done[0], self.interpolation)
        found = last(setup.part(section.done[0]), section.done)
        if residual := last.residual():
            log(len(runs) * self.schedule.steps, **residual)
        return _result(model, found, self.interpolation)


def _with_report(log: Log, merge: Merge) -> Log:
    """The first row says of the merge how well it is conditioned, see
    `immunize.merge.factors.Factors`.
    """
    report = {
        f"merge_{key}": value for key, value in merge.report.items() if key != "constraint_residual"
    }
    if report:
        logger.info("merge: %s", ", ".join(f"{key} {value:.3g}" for key, value in report.items()))
    return lambda step, **values: log(step, **({**values, **report} if step == 0 else values))


def _numbered(log: Log, i: int, count: int, steps: int) -> Log:
    """For several trainings one after the other: steps go on counting, and each row says which one
    it is of.
    """
    if count == 1:
        return log
    return lambda step, **values: log(step + i * steps, concept=float(i), **values)


def _result(
    model: DiffusionModel, found: Mapping[str, Tensor], interpolation: float
) -> DiffusionModel:
    result = model.copy()
    state = result.unet.state_dict()
    for name, weight in found.items():
        trained = weight.detach().to(state[name])
        state[name] = (
            trained if interpolation == 1 else torch.lerp(state[name], trained, interpolation)
        )
    result.unet.load_state_dict(state)
    return result
