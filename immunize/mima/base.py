"""What every immunizer of text-to-image models shares: options, the U-Net that moves, encoded
images, and which concepts are trained together.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from immunize.merge.closed_form import Merge, Params
from immunize.merge.rows import (
    MergeOptions,
    ModelInputs,
    Scope,
    build_merge,
    scope_names,
    word_positions,
)
from immunize.mima.gradients import Weights, checkpointed
from immunize.mima.inner_attackers import AttackerOptions, DrawnAttacker
from immunize.mima.outer_loop import Objective, OuterLoop, OuterLoopOptions
from immunize.mima.sampling import (
    Batch,
    ConceptSplit,
    Decoys,
    Pool,
    cast,
    check_size,
    pool_concepts,
    prior_images,
    split_concept,
)
from lab.core.config import Count, Flag, Index, NonNegative, Positive, PositiveShare, Text, config
from lab.core.data import Concept, ConceptCase, Kind
from lab.core.distributed import team
from lab.core.errors import UserError
from lab.core.seeding import derive
from lab.core.training import train
from lab.core.types import Checkpoint, Immunizer, Log
from lab.models.diffusion import DiffusionModel

logger = logging.getLogger(__name__)


@config
class ConceptImmunizer(OuterLoopOptions, AttackerOptions, Immunizer):
    """What every concept immunizer shares.

    Args:
        concepts: ``merged``: all targets, adapted one by one and merged at every step; ``joint``:
            pooled into one concept, no merge; ``composed``: each immunized alone, the results
            merged once; ``single``: one target.
        target: its number in the case, for ``single``. One concept needs no merge, whichever way it
            is chosen.
        scope: Π_u, see `immunize.merge.rows.scope_names`.
        batch_size, prior_batch_size: images of a concept and of the prior per step.
        cap: largest loss of a concept that is still pushed up, null for none.
        w_prior: weight of the prior's loss, which stays small. prior: ``keep`` (the case's
            unrelated images), ``class`` (images of the targets' classes), ``both``.
        merge: see `immunize.merge.rows.MergeOptions`.
        precision: ``float32``, or ``bfloat16`` with float32 masters of the weights.
        gradient_checkpointing: recompute activations; slower, for real sizes.
        interpolation: s in θ0 + s (θ − θ0), the weights that are returned, between the given model
            (0) and the trained one (1); WiSE-FT, arXiv 2109.01903, eq. 1.
        others: see `immunize.mima.outer_loop.OuterLoopOptions` and
            `immunize.mima.inner_attackers.AttackerOptions`.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: Text
    concepts: Literal["merged", "joint", "composed", "single"] = "merged"
    target: Index = 0
    scope: Scope = "attn2"
    batch_size: Count = 8
    prior_batch_size: Count = 8
    cap: Positive | None = None
    w_prior: NonNegative = 1.0
    prior: Literal["keep", "class", "both"] = "keep"
    merge: MergeOptions = MergeOptions()
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: Flag = False
    interpolation: PositiveShare = 1.0

    @model_validator(mode="after")
    def _check_merge(self) -> ConceptImmunizer:
        if self.concepts == "composed" and self.merge.is_learned:
            raise ValueError(
                f"merge.rule={self.merge.rule} is learned while concepts are trained together; "
                "concepts=composed merges by closed_form or mean"
            )
        return self

    def check(self, cases: Sequence[ConceptCase]) -> None:
        """Raise `lab.core.errors.UserError` for cases that cannot be immunized."""
        for case in cases:
            self.select_targets(case)

    def select_targets(self, case: ConceptCase) -> tuple[Concept, ...]:
        """Return the targets that are immunized against.

        Raises:
            UserError: none, no such number, or one with fewer than two images.
        """
        if not case.targets:
            raise UserError("scenario", case.name, "has no target concept to immunize against.")
        targets = case.targets
        if self.concepts == "single":
            targets = targets[self.target : self.target + 1]
        if not targets:
            reason = f"case {case.name} has {len(case.targets)} target(s), numbered from 0."
            raise UserError("immunize.target", self.target, reason)
        for concept in targets:
            check_size(concept)
        return targets

    @abstractmethod
    def objective(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> Objective:
        """Return what the outer loop descends."""

    def needs_prior(self) -> bool:
        return self.w_prior > 0

    def needs_merge(self) -> bool:
        return True

    def decoys_per_target(self) -> Decoys | None:
        """Return what is painted for every target, see `immunize.mima.sampling.ConceptSplit`."""
        return None

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
            UserError: options or images that cannot work. Diverged: not even the first step was
                finite.
        """
        setup = Setup(self, model, case, seed)
        runs, merges, merge_results = setup.arrange()
        # the first row says how well the merge is conditioned (`Factors.report`)
        report = {f"merge_{key}": value for key, value in merge_results.report.items()}

        def begin(run: int) -> Objective:
            setup.restart()
            return self.objective(setup, runs[run], merges[run])

        def log_row(step: int, **values: float) -> None:
            log(step, **values, **(report if step == 0 else {}))

        loop = OuterLoop(
            self,
            setup.denoiser.theta,
            begin,
            runs=len(runs),
            is_sound=lambda run: setup.is_sound(runs[run]),
        )
        unet, steps = setup.denoiser.model.unet, len(runs) * self.steps
        with checkpointed(unet) if self.gradient_checkpointing else nullcontext():
            train(
                loop,
                steps,
                label=self.name,
                checkpoint=checkpoint,
                log=log_row,
                save_every=self.checkpoint_every,
            )
        weights = loop.done[0]
        if len(runs) > 1:
            weights = merge_results({name: setup.start[name] for name in weights}, loop.done)
            if residual := merge_results.residual():
                log(steps, **residual)
        return _with_weights(model, weights, self.interpolation)


def _with_weights(
    model: DiffusionModel, weights: Mapping[str, Tensor], interpolation: float
) -> DiffusionModel:
    result = model.copy()
    state = result.unet.state_dict()
    for name, weight in weights.items():
        trained = weight.detach().to(state[name])
        if interpolation < 1:
            trained = torch.lerp(state[name], trained, interpolation)
        state[name] = trained
    result.unet.load_state_dict(state)
    return result


def capped(loss: Tensor, cap: float | None) -> Tensor:
    """Return min(loss, cap): once the concept is as badly denoised as ``cap`` says, its term has no
    gradient any more.

    Without the cap the outer loss runs away and takes unrelated concepts along.
    """
    return loss if cap is None else loss.clamp(max=cap)


@dataclass(frozen=True)
class Denoiser:
    """The U-Net that is being immunized, and θ, the masters of its weights in float32 or float64.

    In the masters' own precision ``theta`` are the U-Net's parameters themselves. In ``bfloat16``
    the U-Net is a copy of θ that `sync` refreshes; weights are cast on the way in, gradients and
    losses are the masters'.
    """

    model: DiffusionModel
    theta: Params

    @torch.no_grad()
    def sync(self, names: Sequence[str]) -> None:
        """Give the U-Net the current values of ``names``, which later losses use where they get no
        others.
        """
        own = dict(self.model.unet.named_parameters())
        for name in names:
            if own[name] is not self.theta[name]:
                own[name].copy_(self.theta[name])

    def predict(self, batch: Batch, weights: Weights) -> tuple[Tensor, Tensor]:
        """Return the prediction for a batch and its target. Names missing in ``weights``: the
        U-Net's own.
        """
        noisy, target = self.model.noised(batch.z, batch.noise, batch.t)
        dtype = self.model.dtype
        low = {name: w.to(dtype) for name, w in weights.items()}
        guess = self.model.predict(noisy.to(dtype), batch.t, cast(batch.text, dtype), low)
        return guess.to(noisy.dtype), target

    def loss(self, batch: Batch, weights: Weights) -> Tensor:
        """Return the mean diffusion loss L(x, c; weights), a scalar."""
        guess, target = self.predict(batch, weights)
        return (guess - target).square().mean()


class Setup:
    """What one immunization works on.

    Attributes:
        model: θ_0, untouched; encodes images and captions. denoiser: θ, and a copy of the model
            that follows it.
        dtype: of θ and of everything that is encoded. start: θ_0 in it. prior: encoded, or None.
    """

    def __init__(
        self, config: ConceptImmunizer, model: DiffusionModel, case: ConceptCase, seed: int
    ) -> None:
        self.config, self.model, self.case, self.seed = config, model, case, seed
        self.dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        compute = torch.bfloat16 if config.precision == "bfloat16" else self.dtype
        work = model.copy()
        nn.Module.to(work.unet, compute)
        work.requires_grad_(False)
        original = model.unet.named_parameters()
        self.start = {name: w.detach().to(self.dtype, copy=True) for name, w in original}
        theta: Params = dict(work.unet.named_parameters())
        if compute != self.dtype:
            theta = {name: w.clone() for name, w in self.start.items()}
        self.denoiser = Denoiser(work, theta)
        self.prior: Pool | None = None
        if config.needs_prior():
            self.prior = Pool.encode(model, prior_images(case, config.prior), self.dtype)

    @torch.no_grad()
    def restart(self) -> Params:
        """Put θ back to θ_0."""
        theta = self.denoiser.theta
        for name, w in theta.items():
            w.copy_(self.start[name])
        self.denoiser.sync(tuple(theta))
        return theta

    @torch.no_grad()
    def is_sound(self, concepts: Sequence[ConceptSplit]) -> bool:
        """Tell whether θ has a finite loss on every concept."""
        batches = [concept.outer.batch(4, self.seed, concept.name, "sound") for concept in concepts]
        losses = [self.denoiser.loss(batch, self.denoiser.theta) for batch in batches]
        return all(bool(torch.isfinite(loss)) for loss in losses)

    def split(self, concepts: Sequence[Concept], decoys: Decoys | None) -> list[ConceptSplit]:
        templates = self.config.templates
        return [
            split_concept(self.model, concept, self.seed, self.dtype, decoys, templates)
            for concept in concepts
        ]

    def arrange(self) -> tuple[list[list[ConceptSplit]], list[Merge], Merge]:
        """Return the runs as lists of concepts, the merge inside each, and the merge of their
        results.
        """
        arrangement, none = self.config.concepts, Merge(1)
        targets = self.config.select_targets(self.case)
        splits = self.split(targets, self.config.decoys_per_target())
        if arrangement == "joint":
            return [[pool_concepts(splits)]], [none], none
        if len(splits) == 1 or not self.config.needs_merge():
            return [splits], [none], none
        merge = self._merge(targets, splits)
        if arrangement == "composed":
            return [[split] for split in splits], [none] * len(splits), merge
        return [splits], [merge], merge

    def _merge(self, targets: Sequence[Concept], splits: Sequence[ConceptSplit]) -> Merge:
        """Build the merge at θ_0; layers without text input are recorded on the inner halves and
        the unrelated images.
        """
        options, size = self.config.merge, self.config.batch_size
        named = [(naming_prompts(self.model, c, options.prompts), c.words) for c in targets]
        batches: list[list[ModelInputs]] = []
        regular: list[ModelInputs] = []
        if options.scope != "kv":
            keep = Pool.encode(self.model, prior_images(self.case, "keep"), self.dtype)
            batches = [self._recorded(split.inner, size, split.name) for split in splits]
            regular = self._recorded(keep, size, "regular")
        return build_merge(
            self.model,
            named,
            self.case.regularizers,
            options,
            batches=batches,
            regular_batches=regular,
            seed=derive(self.seed, "mima", "merge"),
            dtype=self.dtype,
        )

    def _recorded(self, pool: Pool, size: int, label: str) -> list[ModelInputs]:
        own = pool.to(self.model.dtype)
        batches = [own.batch(size, self.seed, "merge", label, i) for i in range(4)]
        return [(batch.z, batch.text, batch.noise, batch.t) for batch in batches]


class ConceptObjective(Objective):
    """An objective over the losses of concepts under inner loops."""

    def __init__(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> None:
        self.setup, self.concepts, self.merge = setup, concepts, merge
        self.denoiser, self.unet, self.seed = setup.denoiser, setup.denoiser.model.unet, setup.seed
        self.team = team()
        self.outer_names = self.moves = scope_names(self.unet, setup.config.scope)

    def draw_batch(
        self,
        pool: Pool,
        concept: ConceptSplit,
        attacker: DrawnAttacker | None,
        step: int,
        label: str,
        number: int = 0,
    ) -> Batch:
        """Draw images with the captions that the attacker teaches, and asks by.

        Args:
            label: of the random numbers; "upper" and "lower" are the outer and the inner loop.
        """
        size = self.setup.config.batch_size * concept.concepts
        pool = pool if attacker is None else pool.template(attacker.template)
        return pool.batch(size, self.seed, concept.name, step, label, number)

    def draw_prior(self, size: int, *labels: object) -> Batch:
        assert self.setup.prior is not None
        return self.setup.prior.batch(size, self.seed, *labels)


def naming_prompts(model: DiffusionModel, concept: Concept, limit: int) -> list[str]:
    """Return at most ``limit`` captions of its own images, else prompts, in which the concept's
    words stand.

    Raises:
        UserError: there is none.
    """
    # the evaluation's prompts last
    texts = dict.fromkeys((*concept.own.prompts, *concept.prompts.get("name", ())))
    named = [text for text in texts if word_positions(model, text, concept.words)][:limit]
    if not named:
        reason = f"no prompt and no caption of {concept.name} has its words {concept.words!r}."
        raise UserError("scenario", concept.name, reason)
    return named
