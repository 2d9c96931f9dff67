"""What a scenario loads: tasks, images, concepts and cases. Nothing in this file computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from lab.core.config import SETTINGS, Count, NonNegative, OptionalPrompt

Role = Literal["benign", "harmful"]
Kind = Literal["linear", "deep", "diffusion"]


@dataclass(frozen=True)
class Split:
    """Inputs ``x`` [n, ...] (float features or uint8 images [n, 3, s, s]) and targets ``y`` [n].

    ``y`` is float64 for regression and int64 class indices for classification.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return int(self.x.shape[0])


@dataclass(frozen=True)
class Task:
    """One thing that somebody may want to fit on top of a model."""

    name: str
    role: Role
    kind: Literal["regression", "classification"]
    train: Split
    test: Split
    classes: int = 1  # outputs of the probe: 1 for regression, number of classes otherwise


@dataclass(frozen=True)
class Case:
    """One immunization problem: a benign task to keep easy, harmful tasks to make hard."""

    name: str
    benign: Task
    harmful: tuple[Task, ...]

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (self.benign, *self.harmful)

    def for_immunizer(self) -> Case:
        """Return the case as immunizers see it: without the rows that metrics test on."""
        benign, *harmful = (
            replace(task, test=Split(task.test.x[:0], task.test.y[:0])) for task in self.tasks
        )
        return replace(self, benign=benign, harmful=tuple(harmful))

    def task(self, name: str) -> Task:
        return next(t for t in self.tasks if t.name == name)


@dataclass(frozen=True)
class CaptionedImages:
    """Images uint8 [n, 3, s, s] with one caption each.

    ``described``: captions that say what a concept looks like and not its name, one each, where the
    scenario knows them. They follow from the images: `lab.core.data.ScenarioData.data_hash`
    leaves them out.
    """

    images: Tensor
    prompts: tuple[str, ...]
    described: tuple[str, ...] = field(default=(), metadata={"derived": True})

    def __len__(self) -> int:
        return len(self.prompts)

    def pick(self, rows: Sequence[int]) -> CaptionedImages:
        """Return the images ``rows`` with their captions."""
        described = tuple(self.described[i] for i in rows) if self.described else ()
        return CaptionedImages(
            self.images[list(rows)], tuple(self.prompts[i] for i in rows), described
        )


@dataclass(frozen=True)
class Concept:
    """One thing that somebody may want to teach a text-to-image model; a `Task` of that branch.

    Attributes:
        name: unique within the case, for example "mosaic"; also the name a detector knows it by.
        role: ``harmful`` for a target of the immunization, ``benign`` for one that must stay
            learnable.
        kind: ``style`` or ``object``.
        words: the words of a prompt that name it (their token rows are C_n of the merge).
        train: what the attacker has.
        own: what the immunizer has of it; disjoint from ``train``.
        reference: what generations are compared with; disjoint from both.
        prior: images of its class without the concept (prior preservation); may be empty.
        prompts: family → prompts that generations are made from. Always ``name``; where the
            scenario knows them ``description`` (never the concept's name), ``reworded``
            (templates unknown to the immunizer) and ``unrelated`` (about other things, which show
            whether an attacked model is still usable).
    """

    name: str
    role: Role
    kind: Literal["object", "style"]
    words: str
    train: CaptionedImages
    own: CaptionedImages
    reference: CaptionedImages
    prior: CaptionedImages
    prompts: dict[str, tuple[str, ...]]


@checked(config=SETTINGS, frozen=True)
class Sampling:
    """How images are generated, equally for every model: ``steps`` of the ``sampler``,
    ``guidance`` scale, ``count`` per point.

    ``last_guidance``: scale at the last step, to which ``guidance`` changes linearly; None is
        constant.
    ``sampler``: ``ddim`` (η = 0, arXiv 2010.02502) or ``dpm`` (DPM-Solver++ of order 2, multistep,
        arXiv 2211.01095).
    ``precision``: of the denoiser's products; ``weights`` is that of the model, ``bfloat16`` is
        torch's autocast.
    """

    sampler: Literal["ddim", "dpm"] = "ddim"
    steps: Count = 20
    guidance: NonNegative = 4.0
    last_guidance: NonNegative | None = None
    count: Count = 32
    negative: OptionalPrompt = ""
    precision: Literal["weights", "bfloat16"] = "weights"

    def scales(self, steps: int) -> list[float]:
        """Return the guidance scale of every step."""
        last = self.guidance if self.last_guidance is None else self.last_guidance
        return np.linspace(self.guidance, last, steps).tolist()

    @property
    def guided(self) -> bool:
        """Whether any step predicts without the prompt, too; a scale of 1 means none."""
        return any(scale != 1 for scale in self.scales(2))


@dataclass(frozen=True)
class ConceptCase:
    """One immunization problem of a text-to-image model; a `Case` of that branch.

    Attributes:
        targets: concepts to protect against (role ``harmful``).
        others: concepts that must stay as easy to learn (role ``benign``); reported, never trained
            on.
        rehearsal: benign concepts that the immunizer may practise on; never reported.
        keep: images with captions of unrelated things, for the immunizer's preservation terms.
        regularizers: captions of C_reg (`immunize.merge.closed_form`).
        unrelated: prompts of unrelated things, for utility; disjoint from ``keep`` and
            ``regularizers``.
        erased: names of concepts that ``erase`` removes before anything else, with ``anchors`` and
            ``preserve`` handled by the eraser.
    """

    name: str
    targets: tuple[Concept, ...]
    others: tuple[Concept, ...]
    rehearsal: tuple[Concept, ...]
    keep: CaptionedImages
    regularizers: tuple[str, ...]
    unrelated: CaptionedImages
    sampling: Sampling
    erased: tuple[Erasure, ...] = ()

    @property
    def tasks(self) -> tuple[Concept, ...]:
        return (*self.targets, *self.others)

    def for_immunizer(self) -> ConceptCase:
        """Return the case as immunizers see it: without benign concepts, and without the images and
        the prompts of targets and of unrelated things that attacks and metrics use.
        """
        nothing, targets = self.keep.pick(()), []
        for target in self.targets:
            known = {k: v for k, v in target.prompts.items() if k in ("name", "description")}
            targets.append(replace(target, train=nothing, reference=nothing, prompts=known))
        return replace(self, targets=tuple(targets), others=(), unrelated=nothing)

    def task(self, name: str) -> Concept:
        return next(t for t in self.tasks if t.name == name)


@dataclass(frozen=True)
class Erasure:
    """A concept that is taken out of the model before the experiment starts.

    Attributes:
        name: of the concept.
        prompts: texts that name it; ``words`` is where the concept starts in each of them.
        anchors: what each prompt shall mean instead (same length).
        preserve: texts whose meaning must stay.
    """

    name: str
    words: str
    prompts: tuple[str, ...]
    anchors: tuple[str, ...]
    preserve: tuple[str, ...]


@dataclass(frozen=True)
class ScenarioData:
    """What a scenario loads for one seed.

    ``notes`` are full sentences about rows and columns that were dropped or imputed and the rank
    that remains; ``data_hash`` is a SHA-256 over the data of every case; ``credit`` says who
    made the data and under what terms.
    """

    cases: tuple[Case, ...] | tuple[ConceptCase, ...]
    notes: tuple[str, ...] = ()
    data_hash: str = ""
    credit: str = "Images or tables named in the record; their terms are their owner's to state."
