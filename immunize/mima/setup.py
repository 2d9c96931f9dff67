"""What one immunization works on: encoded pictures, the U-Net that moves, and which concepts are
trained together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from immunize.merge.closed_form import Merge
from immunize.merge.inputs import Batch as Recorded
from immunize.merge.rows import build_merge, word_positions
from immunize.mima.losses import Denoiser, Params
from immunize.mima.options import MergeGroup
from immunize.mima.sampling import (
    ConceptSplit,
    Decoys,
    Pool,
    enough,
    halves,
    pooled,
    prior_pictures,
)
from lab.core.data import Concept, ConceptCase
from lab.core.errors import UserError
from lab.core.seeding import derive
from lab.models.diffusion import DiffusionModel

ARRANGEMENTS = ("merged", "joint", "composed", "single")


def selected(case: ConceptCase, arrangement: str, target: int) -> tuple[Concept, ...]:
    """The targets that are immunized against.

    Raises:
        UserError: none, no such number, or one with fewer than two pictures.
    """
    if not case.targets:
        raise UserError("scenario", case.name, "has no target concept to immunize against.")
    found = case.targets
    if arrangement == "single":
        if target >= len(case.targets):
            told = f"case {case.name} has {len(case.targets)} target(s), numbered from 0."
            raise UserError("immunize.target", target, told)
        found = (case.targets[target],)
    for concept in found:
        enough(concept)
    return found


def concept_halves(
    model: DiffusionModel,
    concepts: Sequence[Concept],
    seed: int,
    dtype: torch.dtype,
    decoys: Decoys | None = None,
    templates: Sequence[str] = (),
) -> list[ConceptSplit]:
    return [halves(model, concept, seed, dtype, decoys, templates) for concept in concepts]


def naming_prompts(model: DiffusionModel, concept: Concept, limit: int) -> list[str]:
    """At most ``limit`` captions of its own pictures, else prompts, in which the concept's words
    stand.

    Raises:
        UserError: there is none.
    """
    given = dict.fromkeys(
        (*concept.own.prompts, *concept.prompts.get("name", ()))
    )  # evaluation's prompts last
    found = [prompt for prompt in given if word_positions(model, prompt, concept.words)][:limit]
    if not found:
        told = (
            f"no prompt and no caption of concept {concept.name} has its words {concept.words!r}."
        )
        raise UserError("scenario", concept.name, told)
    return found


@dataclass(frozen=True)
class Setup:
    """Attributes:
    model: θ_0, untouched; encodes pictures and captions. denoiser: θ, and a copy of the model that
        follows it.
    start: θ_0 in θ's precision. prior: encoded, or None.
    """

    model: DiffusionModel
    case: ConceptCase
    seed: int
    denoiser: Denoiser
    start: Params
    prior: Pool | None

    @staticmethod
    def build(
        model: DiffusionModel, case: ConceptCase, seed: int, precision: str, prior: str | None
    ) -> Setup:
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        work = model.copy()
        compute = torch.bfloat16 if precision == "bfloat16" else dtype
        nn.Module.to(work.unet, compute)
        work.requires_grad_(False)
        theta: Params = dict(work.unet.named_parameters())
        if compute != dtype:
            theta = {
                name: w.detach().to(dtype, copy=True) for name, w in model.unet.named_parameters()
            }
        start = {name: w.detach().clone() for name, w in theta.items()}
        pool = None if prior is None else Pool.encode(model, prior_pictures(case, prior), dtype)
        return Setup(model, case, seed, Denoiser(work, theta), start, pool)

    @property
    def dtype(self) -> torch.dtype:
        """Of θ and of everything that is encoded."""
        return next(iter(self.start.values())).dtype

    def restart(self) -> Params:
        """θ at θ_0 again."""
        theta = self.denoiser.theta
        with torch.no_grad():
            for name, w in theta.items():
                w.copy_(self.start[name])
        self.denoiser.sync(tuple(theta))
        return theta

    def sound(self, concepts: Sequence[ConceptSplit]) -> bool:
        """Whether θ has a finite loss on every concept."""
        with torch.no_grad():
            batches = [half.upper.batch(4, self.seed, half.name, "sound") for half in concepts]
            losses = [self.denoiser.loss(batch, self.denoiser.theta) for batch in batches]
        return all(bool(torch.isfinite(loss)) for loss in losses)

    def part(self, like: Params) -> Params:
        """θ_0 of the names of ``like``."""
        return {name: self.start[name] for name in like}

    def rehearsal(self, templates: Sequence[str]) -> list[ConceptSplit]:
        return concept_halves(
            self.model, self.case.rehearsal, self.seed, self.dtype, templates=templates
        )

    def arrange(
        self, chosen: list[ConceptSplit], arrangement: str, options: MergeGroup | None, size: int
    ) -> tuple[list[list[ConceptSplit]], list[Merge], Merge]:
        """Trainings as lists of concepts, the merge inside each, and the merge of their results;
        without ``options`` nothing is merged.
        """
        none = Merge(1)
        if arrangement == "joint":
            return [[pooled(chosen)]], [none], none
        if len(chosen) == 1 or options is None:
            return [chosen], [none], none
        merge = self._merge(chosen, options, size)
        if arrangement == "composed":
            return [[one] for one in chosen], [none] * len(chosen), merge
        return [chosen], [merge], merge

    def _merge(self, chosen: list[ConceptSplit], group: MergeGroup, size: int) -> Merge:
        """The merge at θ_0; layers without text input are recorded on the lower halves and the
        unrelated pictures.
        """
        concepts = {c.name: c for c in self.case.targets}
        named = [
            (naming_prompts(self.model, concepts[h.name], group.prompts), concepts[h.name].words)
            for h in chosen
        ]
        batches: list[list[Recorded]] = []
        regular: list[Recorded] = []
        if group.options.scope != "kv":
            keep = Pool.encode(self.model, prior_pictures(self.case, "keep"), self.dtype)
            batches = [self._recorded(half.lower, size, half.name) for half in chosen]
            regular = self._recorded(keep, size, "regular")
        seeded = replace(group.options, seed=derive(self.seed, "mima", "merge"))
        return build_merge(
            self.model,
            named,
            self.case.regularizers,
            seeded,
            batches=batches,
            regular_batches=regular,
        )

    def _recorded(self, pool: Pool, size: int, label: str) -> list[Recorded]:
        own = pool.to(self.model.dtype)
        found = [own.batch(size, self.seed, "merge", label, i) for i in range(4)]
        return [(batch.z, batch.text, batch.noise, batch.t) for batch in found]
