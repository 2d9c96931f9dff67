"""The outer loop that all immunizers of text-to-image models share.

In the order of a run: the options and `ConceptImmunizer.__call__`, what it works on (`Setup`), what
a method descends over the parameters of Π_u (`Objective`), and the loop that descends it
(`OuterLoop`). A method differs in its objective only. Randomness is a function of (seed, step), so
a resumed run continues bit for bit.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from immunize.gradients import Params, Weights, checkpointed, is_finite
from immunize.merge.build import (
    MergeOptions,
    ModelInputs,
    Scope,
    build_merge,
    group_of,
    record_inputs,
    scope_names,
)
from immunize.merge.closed_form import Merge
from immunize.mima.inner_loop import AttackerOptions, DrawnAttacker
from immunize.mima.sampling import (
    Batch,
    ConceptSplit,
    Pool,
    cast,
    check_size,
    pool_concepts,
    prior_images,
    split_concept,
)
from lab.core.condition import leading_directions
from lab.core.config import Count, Flag, Index, NonNegative, Positive, PositiveShare, Text, config
from lab.core.data import Concept, ConceptCase, Kind, Sampling
from lab.core.distributed import team
from lab.core.errors import Diverged, UserError
from lab.core.seeding import derive
from lab.core.training import part_of, restore_slots, schedule_factor, slots, train
from lab.core.types import Checkpoint, Immunizer, Log
from lab.models.diffusion import DiffusionModel, word_positions

logger = logging.getLogger(__name__)
_FINITE = ("gradient_norm", "outer_loss", "prior_loss", "benign_loss")  # what a run must not lose


@config
class OuterLoopOptions:
    """The outer loop.

    Args:
        steps: number of updates. lr: β, their size. lr_schedule: ``constant`` or ``cosine`` to 0.
        optimizer: ``adamw`` or ``sgd``. weight_decay: of ``adamw``.
        clip: largest norm of the gradient, null for no bound.
        null_space: share e of the energy of what unrelated images feed into a layer of the given
            model; the updates of the outer loop leave the directions that hold it alone: ΔW ← ΔW (I
            − U Uᵀ), U the leading eigenvectors of E[hhᵀ] with a share e of its trace (projected
            updates, arXiv 2604.21041; theirs are gradients). Vectors move freely. null: nothing is
            projected.
        checkpoint_every: steps between saved states.
    """

    steps: Count = 100
    lr: Positive = 1e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: NonNegative = 0.0
    clip: Positive | None = None
    null_space: PositiveShare | None = None
    checkpoint_every: Count = 20


@config
class ConceptImmunizer(OuterLoopOptions, AttackerOptions, Immunizer):
    """What every concept immunizer shares.

    Args:
        concepts: ``merged``: all targets, adapted one by one and merged at every step; ``joint``:
            pooled into one concept, no merge; ``composed``: each immunized alone, the results
            merged once; ``single``: one target.
        target: its number in the case, for ``single``. One concept needs no merge, whichever way it
            is chosen.
        scope: Π_u, see `immunize.merge.build.scope_names`.
        batch_size, prior_batch_size: images of a concept and of the prior per step.
        cap: largest loss of a concept that is still pushed up, null for none.
        w_prior: weight of the prior's loss, which stays small. prior: ``keep`` (the case's
            unrelated images), ``class`` (images of the targets' classes), ``both``.
        merge: see `immunize.merge.build.MergeOptions`.
        precision: ``float32``, or ``bfloat16`` with float32 masters of the weights.
        gradient_checkpointing: recompute activations; slower, for real sizes.
        interpolation: s in θ0 + s (θ − θ0), the weights that are returned, between the given model
            (0) and the trained one (1); WiSE-FT, arXiv 2109.01903, eq. 1.
        others: see `OuterLoopOptions` and `immunize.mima.inner_loop.AttackerOptions`.
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
        if self.concepts == "composed" and self.null_space is not None:
            raise ValueError("null_space must be null with concepts=composed: its merge is free")
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

    def decoys_per_target(self) -> Sampling | None:
        """Return what is generated for every target, see `immunize.mima.sampling.ConceptSplit`."""
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
        fixed = setup.kept_directions() if self.null_space is not None else {}
        if fixed:
            report["kept_rank"] = sum(u.shape[1] / len(u) for u in fixed.values()) / len(fixed)

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
            fixed=fixed,
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
        state[name] = torch.lerp(state[name], weight.detach().to(state[name]), interpolation)
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

    def split(self, concepts: Sequence[Concept], decoys: Sampling | None) -> list[ConceptSplit]:
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

    def kept_directions(self) -> Params:
        """Return name → U [d, r] of every matrix and kernel of Π_u, see `OuterLoopOptions`."""
        share, model, theta = self.config.null_space, self.model, self.denoiser.theta
        assert share is not None
        every = scope_names(model.unet, self.config.scope)
        names = [name for name in every if theta[name].dim() >= 2]
        keep = Pool.encode(model, prior_images(self.case, "keep"), self.dtype)
        batches = self._recorded(keep, self.config.batch_size, "null space")
        inputs = record_inputs(model, names, batches, 1024, self.seed, "null space")
        directions = {group: leading_directions(rows, share) for group, rows in inputs.items()}
        return {name: directions[group_of(name)].to(theta[name]) for name in names}

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


class Objective(ABC):
    """What the outer loop descends: losses of concepts under inner loops.

    Attributes:
        outer_names: Π_u.
        moves: all names that a step may change; the objective itself changes the rest.
    """

    outer_names: tuple[str, ...]
    moves: tuple[str, ...]
    config: ConceptImmunizer

    def __init__(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> None:
        self.config, self.setup, self.concepts, self.merge = setup.config, setup, concepts, merge
        self.denoiser, self.unet, self.seed = setup.denoiser, setup.denoiser.model.unet, setup.seed
        self.team = team()
        self.outer_names = self.moves = scope_names(self.unet, self.config.scope)

    @abstractmethod
    def gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        """Return ∂J/∂θ for the names of Π_u (J is minimised) and what to log.

        Raises:
            FloatingPointError, Diverged: a loop left the finite numbers.
        """

    def state(self) -> Params:
        """Return the tensors that a resumed run needs besides θ and the step; with several
        processes called on all of them.
        """
        return {}

    @torch.no_grad()
    def has_finite_losses(self) -> bool:
        """Tell whether θ has a finite loss on every concept."""
        batches = [c.outer.batch(4, self.seed, c.name, "sound") for c in self.concepts]
        return is_finite(self.denoiser.loss(batch, self.denoiser.theta) for batch in batches)

    def load(self, state: Params) -> None:  # noqa: B027 - nothing to continue without a state
        """Continue from what `state` returned."""

    def draw_batch(
        self,
        pool: Pool,
        concept: ConceptSplit,
        attacker: DrawnAttacker | None,
        step: int,
        label: str,
        number: int = 0,
    ) -> Batch:
        """Draw images with the captions that the attacker trains on.

        Args:
            label: of the random numbers; "upper" and "lower" are the outer and the inner loop.
        """
        size = self.config.batch_size * concept.concepts
        pool = pool if attacker is None else pool.template(attacker.template)
        return pool.batch(size, self.seed, concept.name, step, label, number)

    def draw_prior(self, size: int, *labels: object) -> Batch:
        assert self.setup.prior is not None
        return self.setup.prior.batch(size, self.seed, *labels)


class OuterLoop:
    """A `lab.core.training.Trainee` of one or several runs, one after the other, of ``steps`` each.

    A run moves the entries ``objective.moves`` of ``theta`` in place. Where the numbers leave the
    finite range it goes back to its last good weights, at which every loss and gradient was finite
    last, logs ``diverged`` = 1 and takes no further steps.

    Args:
        theta: all parameters by name, float32 or float64.
        begin: puts θ back to its start and returns the objective of the run with this number.
        fixed: name → directions [d, r] that no update changes.

    Attributes:
        done: what each run that is over ended with.
    """

    def __init__(
        self,
        options: OuterLoopOptions,
        theta: Params,
        begin: Callable[[int], Objective],
        *,
        runs: int = 1,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.options, self.theta, self.begin, self.fixed = options, theta, begin, fixed or {}
        self.runs, self.team = runs, team()
        self.done: list[Params] = []

    def _begin(self, run: int) -> None:
        self.run, self.objective = run, self.begin(run)
        self.has_ended = False
        self.good: Params = {}
        moving, o = [self.theta[name] for name in self.objective.outer_names], self.options
        self.optimizer: torch.optim.Optimizer
        if o.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(moving, lr=o.lr)
        else:
            self.optimizer = torch.optim.AdamW(moving, lr=o.lr, weight_decay=o.weight_decay)

    def step(self, step: int) -> dict[str, float] | None:
        """Do update number ``step`` of all runs together.

        Raises:
            Diverged: not even the first step of a run was finite.
        """
        run, own_step = divmod(step, self.options.steps)
        if own_step == 0:
            self._begin(run)
        row = None if self.has_ended else self._attempt(own_step)
        if own_step == self.options.steps - 1:
            # no gradient has seen the last weights
            finite = is_finite(self._copy().values()) and self.objective.has_finite_losses()
            if row is not None and not finite:
                row |= self._go_back("the losses after the last step are not finite")
            self.team.assert_equal(self._copy())
            self.done.append(self._copy())
        return row if row is None or self.runs == 1 else {**row, "concept": float(run)}

    def _attempt(self, step: int) -> dict[str, float]:
        """Update θ, or go back to the last good weights where that is not possible."""
        before = self._copy()
        try:
            gradient, values = self.objective.gradient(self.theta, step)
            # one device synchronisation for all tensors
            norm = float(torch.stack([g.double().norm() for g in gradient.values()]).norm())
            values = {**values, "gradient_norm": norm}
            wrong = {k: values[k] for k in _FINITE if not math.isfinite(values.get(k, 0.0))}
            if wrong:
                raise FloatingPointError(", ".join(f"{k} is {v}" for k, v in wrong.items()))
        except (FloatingPointError, Diverged) as error:
            if self.good:
                logger.warning("step %d ends the run, last good weights are kept: %s", step, error)
            return self._go_back(error)
        self.good = before if step else {}  # the first are not trained
        clip = self.options.clip
        factor = clip / norm if clip is not None and norm > clip else 1.0
        for name in self.objective.outer_names:
            self.theta[name].grad = gradient[name] * factor
        decay = schedule_factor(self.options.lr_schedule, step, self.options.steps)
        self.optimizer.param_groups[0]["lr"] = self.options.lr * decay
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, u in self.fixed.items():
                change = (self.theta[name] - before[name]).flatten(1)
                self.theta[name].sub_((change @ u @ u.T).view_as(self.theta[name]))
        return values

    def _go_back(self, reason: object) -> dict[str, float]:
        if not self.good:
            message = f"the weights left the finite numbers before a second step: {reason}"
            raise Diverged(message, 0) from None
        self._put(self.good)
        self.has_ended = True
        return {"diverged": 1.0}

    def _copy(self) -> Params:
        return {name: self.theta[name].detach().clone() for name in self.objective.moves}

    @torch.no_grad()
    def _put(self, weights: Params) -> None:
        for name, value in weights.items():
            self.theta[name].copy_(value)

    # state

    def state(self) -> tuple[Params, dict[str, Any]]:
        parts = {
            "theta": self._copy(),
            "good": self.good,
            "objective": self.objective.state(),
            "optimizer": slots(self.optimizer),
        }
        parts |= {f"done{i}": weights for i, weights in enumerate(self.done)}
        tensors = {f"{part}/{k}": v for part, some in parts.items() for k, v in some.items()}
        return tensors, {"run": self.run, "done": len(self.done), "has_ended": self.has_ended}

    def restore(self, tensors: Params, values: dict[str, Any]) -> None:
        self._begin(values["run"])
        self.has_ended = values["has_ended"]
        self._put(part_of(tensors, "theta/"))
        good = part_of(tensors, "good/")
        self.good = {name: x.to(self.theta[name].device) for name, x in good.items()}
        self.objective.load(part_of(tensors, "objective/"))
        restore_slots(self.optimizer, part_of(tensors, "optimizer/"))
        parts = (part_of(tensors, f"done{i}/") for i in range(values["done"]))
        self.done = [{k: x.to(self.theta[k].device) for k, x in part.items()} for part in parts]
