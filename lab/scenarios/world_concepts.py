"""Cases made of the embedded world's objects and styles: `Relearn` and `Personalize`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from lab.core.config import AsList, Count, Index, Names, Text, config, options
from lab.core.data import (
    CaptionedImages,
    Concept,
    ConceptCase,
    Erasure,
    Kind,
    Role,
    Sampling,
    ScenarioData,
)
from lab.core.errors import UserError, nearest
from lab.core.hashing import fingerprint, stage_key
from lab.core.images import resize_bytes, stack
from lab.core.seeding import derive
from lab.core.types import Scenario
from lab.minisd.world import world
from lab.minisd.world.vocabulary import (
    HELD_OUT_OBJECTS,
    HELD_OUT_STYLES,
    OBJECTS,
    PHOTO,
    ROLES,
    STYLE,
    STYLE_NAMES,
    THING,
)
from lab.minisd.world.world import Picture, Subset
from lab.scenarios import concept_texts as words

Caption = Callable[[Picture], str]
Side = Annotated[int, Field(strict=True, ge=8, multiple_of=8)]
"""Side of all images in pixels; latents are 8 (or 4) times smaller."""
Families = Annotated[
    tuple[Literal["name", "description", "reworded", "unseen_pairs", "unrelated"], ...], AsList
]
_HELD_OUT = (*HELD_OUT_OBJECTS, *HELD_OUT_STYLES)
_PLAIN_SHARE = 0.4  # photos among the images to keep; the rest are in the styles that no role has
_SomeNames = Annotated[Names, Field(min_length=1)]


def empty(side: int) -> CaptionedImages:
    """Return no images."""
    return CaptionedImages(torch.zeros((0, 3, side, side), dtype=torch.uint8), ())


def hashed(
    cases: Iterable[ConceptCase], notes: Iterable[str], credit: str = ScenarioData.credit
) -> ScenarioData:
    """Return the cases with their hash over images, prompts and roles; every note once."""
    cases = tuple(cases)
    key = stage_key(cases=[fingerprint(case, derived=False) for case in cases])
    return ScenarioData(cases, tuple(dict.fromkeys(notes)), key, credit)


def case_name(targets: Iterable[str]) -> str:
    """Return the name of a case with these targets."""
    return "_".join(name.replace(" ", "-") for name in targets)


def rest(names: Sequence[str]) -> Subset:
    """Return what MiniSD knows without ``names``: photos and, where any are left, styles."""
    styles = tuple(s for s in STYLE_NAMES if s not in names)
    objects = tuple(o for o in OBJECTS if o not in names)
    return Subset(objects, (PHOTO, *styles), "seen", photo_share=_PLAIN_SHARE)


@options
class Roles:
    """The concepts of one case by role."""

    targets: _SomeNames
    others: _SomeNames
    rehearsal: Names = ()

    @property
    def reported(self) -> tuple[str, ...]:
        return (*self.targets, *self.others)

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.reported, *self.rehearsal)


class Studio:
    """Draws images of the world for one seed, each set once."""

    def __init__(self, seed: int, side: int) -> None:
        self.seed, self.side = seed, side
        self._known: dict[tuple[object, ...], CaptionedImages] = {}

    def render(self, shown: Sequence[Picture], caption: Caption) -> CaptionedImages:
        """Draw the images ``shown`` with captions."""
        images = resize_bytes(stack([world.render(p) for p in shown]), self.side, "bicubic")
        painted = all(p.style != PHOTO for p in shown)
        described = tuple(words.description(p) for p in shown) if painted else ()
        return CaptionedImages(images, tuple(caption(p) for p in shown), described)

    def draw(
        self, subset: Subset, total: int, caption: Caption, *labels: object
    ) -> CaptionedImages:
        """Draw the first ``total`` images of ``subset`` in the stream ``labels``."""
        key = (subset, total, caption, *labels)
        if key not in self._known:
            stream = derive(self.seed, "scenario", *labels)
            shown = [world.picture(subset, stream, i) for i in range(total)]
            self._known[key] = self.render(shown, caption) if shown else empty(self.side)
        return self._known[key]

    def surroundings(
        self, subset: Subset, keep: int, unrelated: int, captions: tuple[str, ...], taken: set[str]
    ) -> tuple[CaptionedImages, CaptionedImages]:
        """Draw images to keep and unrelated ones, whose prompts are new.

        Args:
            captions: of C_reg.
            taken: other prompts of the case.
        """
        captioned = self.draw(subset, keep, words.world_caption, "keep")
        stream = derive(self.seed, "scenario", "unrelated")
        new = words.fresh(subset, stream, unrelated, {*captioned.prompts, *captions, *taken})
        return captioned, self.render(new, words.world_caption)

    def concept(
        self, name: str, role: Role, sizes: Mapping[str, int], taken: Sequence[str], count: int
    ) -> Concept:
        """Draw a concept of the world, with ``count`` prompts of every family that it has.

        Args:
            sizes: images in own, train, reference and prior.
            taken: concepts of the case; none of them is in the prior images.
        """
        own, train, reference = (
            self.draw(world.concept(name), sizes[part], words.caption, name, part)
            for part in ("own", "train", "reference")
        )
        painted = name in STYLE
        make = words.style_prompts if painted else words.object_prompts
        return Concept(
            name,
            role,
            "style" if painted else "object",
            words=name,
            train=train,
            own=own,
            reference=reference,
            prior=self._prior(name, taken, sizes["prior"]),
            prompts=make(name, count, self.seed),
        )

    def _prior(self, name: str, taken: Sequence[str], total: int) -> CaptionedImages:
        """Draw, for a style, photos and other styles of the same objects; for an object, photos of
        others of its class.
        """
        left = rest(taken)
        if name in STYLE:
            subset = Subset(
                left.objects, left.styles, "seen", photo_share=_PLAIN_SHARE, two_share=0.0
            )
            return self.draw(subset, total, words.caption, "prior")
        same = tuple(o for o in left.objects if THING[o].category == THING[name].category)
        subset = Subset(same or left.objects, two_share=0.0)
        return self.draw(subset, total, words.class_caption, "prior")


@config
class WorldConcepts(Scenario):
    """One case per entry of the chosen list.

    Images of a concept depend on the seed, the concept and the part alone, so that cases, splits
    and scenarios share them. Parts (``own``, ``train``, ``reference``) come from streams of their
    own and are disjoint.

    Args:
        test, validation: lists of cases {targets, others, rehearsal}. What a test case reports has
            no role in a validation case, and neither has a concept for tests
            (`lab.minisd.world.vocabulary.ROLES`), so that no protection is tuned on it; it may be
            among what such a case keeps.
        split: ``test`` or ``validation``.
        cases: how many cases of the list, or ``all``.
        own, train, reference: images per concept for the immunizer, the attacker and the
            comparison.
        prior, keep, unrelated, regularizers: sizes, see `lab.core.data`.
        regularizer_templates: ``all`` or ``one``, the diversity of C_reg.
        families: of prompts, as far as a concept has them (`lab.core.data.Concept.prompts`);
            ``unrelated`` are the first ``sampling.count`` unrelated prompts that name an object.
        sampling: `lab.core.data.Sampling`.
        resolution: side in pixels; the world has 64, other sizes are scaled.

    Raises:
        UserError: unknown concepts (with the nearest names), concepts with two roles.
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: Text
    test: Annotated[tuple[Roles, ...], Field(min_length=1)]
    validation: Annotated[tuple[Roles, ...], Field(min_length=1)]
    split: Literal["test", "validation"] = "test"
    cases: Count | Literal["all"] = 1
    own: Count = 20
    train: Count = 20
    reference: Count = 32
    prior: Index = 32
    keep: Count = 96
    unrelated: Count = 32
    regularizers: Count = 200
    regularizer_templates: Literal["all", "one"] = "all"
    families: Families = ("name", "description", "reworded")
    sampling: Sampling = Sampling()
    resolution: Side = 64

    @abstractmethod
    def check_roles(self, key: str, roles: Roles) -> None:
        """Raise `UserError` for a concept that cannot have its role in this scenario."""

    def erasures(self, roles: Roles) -> Iterable[Erasure]:
        """Return what is erased before the case starts: nothing."""
        return ()

    def __post_init__(self) -> None:
        if "name" not in self.families:
            reason = "must hold name: every report starts from it."
            raise UserError("scenario.families", list(self.families), reason)
        reported = {name for roles in self.test for name in roles.reported}
        for i, roles in enumerate(self.test):
            self._check_names(f"scenario.test[{i}]", roles)
        for i, roles in enumerate(self.validation):
            key = f"scenario.validation[{i}]"
            self._check_names(key, roles)
            tested = {name for name in roles.all if ROLES.get(name) == "test"}
            if tuned := sorted((reported & {*roles.all}) | tested):
                reason = (
                    "is for tests (lab/minisd/world/vocabulary.py); nothing may be tuned on it."
                )
                raise UserError(key, tuned[0], reason)
        cases = self.test if self.split == "test" else self.validation
        if len({roles.targets for roles in cases}) < len(cases):
            raise UserError(f"scenario.{self.split}", cases, "two cases have the same targets.")
        if self.cases != "all" and self.cases > len(cases):
            reason = f"there are {len(cases)} {self.split} cases; write at most that, or all."
            raise UserError("scenario.cases", self.cases, reason)

    def _check_names(self, key: str, roles: Roles) -> None:
        for name in roles.all:
            world.concept(name, key)
            if roles.all.count(name) > 1:
                raise UserError(key, name, "has two roles in this case; give it one.")
        self.check_roles(key, roles)

    def chosen(self) -> tuple[Roles, ...]:
        """Return the cases that `load` builds."""
        cases = self.test if self.split == "test" else self.validation
        return cases[: None if self.cases == "all" else self.cases]

    def load(self, seed: int) -> ScenarioData:
        studio = Studio(seed, self.resolution)
        notes = list(self._notes())
        cases = (self._case(roles, studio) for roles in self.chosen())
        return hashed(cases, notes, credit=notes[0])

    def _case(self, roles: Roles, studio: Studio) -> ConceptCase:
        def draw(names: tuple[str, ...], role: Role) -> tuple[Concept, ...]:
            return tuple(self._concept(name, role, roles, studio) for name in names)

        targets, others = draw(roles.targets, "harmful"), draw(roles.others, "benign")
        rehearsal = draw(roles.rehearsal, "benign")
        left = rest(roles.all)
        captions = words.regularizers(
            left,
            derive(studio.seed, "scenario", "regularizers"),
            self.regularizers,
            self.regularizer_templates,
        )
        every = (*targets, *others, *rehearsal)
        images = [part for c in every for part in (c.own, c.train, c.reference, c.prior)]
        families = [lines for concept in every for lines in concept.prompts.values()]
        taken = set(chain(*families, *(part.prompts for part in images)))
        keep, unrelated = studio.surroundings(left, self.keep, self.unrelated, captions, taken)
        if "unrelated" in self.families:
            naming = [line for line in unrelated.prompts if any(o in line for o in left.objects)]
            lines = {"unrelated": tuple(naming[: self.sampling.count])}
            targets, others = (
                tuple(replace(c, prompts=c.prompts | lines) for c in concepts)
                for concepts in (targets, others)
            )
        return ConceptCase(
            case_name(roles.targets),
            targets,
            others,
            rehearsal,
            keep=keep,
            regularizers=captions,
            unrelated=unrelated,
            sampling=self.sampling,
            erased=tuple(self.erasures(roles)),
        )

    def _concept(self, name: str, role: Role, roles: Roles, studio: Studio) -> Concept:
        sizes = {part: getattr(self, part) for part in ("own", "train", "reference", "prior")}
        concept = studio.concept(name, role, sizes, roles.all, self.sampling.count)
        prompts = concept.prompts
        return replace(concept, prompts={f: prompts[f] for f in self.families if f in prompts})

    def _notes(self) -> Iterator[str]:
        yield f"Images of the embedded world. {world.CREDIT}"
        for roles in self.chosen():
            parts = {"Targets": roles.targets, "others": roles.others, "rehearsal": roles.rehearsal}
            roster = "; ".join(f"{k}: {', '.join(names) or 'none'}" for k, names in parts.items())
            yield f"Case {case_name(roles.targets)} ({self.split} concepts). {roster}."
        if self.resolution != 64:
            yield f"The world's images have 64 pixels and were scaled to {self.resolution}."


@config
class Personalize(WorldConcepts):
    """Personalisation (MIMA, arXiv 2412.15320): objects and styles held out of MiniSD's training.
    Nothing is erased.

    A concept is called by its name; identifiers such as a rare token are the attacker's choice.
    """

    def check_roles(self, key: str, roles: Roles) -> None:
        if known := [name for name in roles.all if name not in _HELD_OUT]:
            reason = f"MiniSD was trained on it, so it is not new; {nearest(known[0], _HELD_OUT)}"
            raise UserError(key, known[0], reason)


@config
class Relearn(WorldConcepts):
    """Re-learning after erasure (MIMA, arXiv 2412.15320; IMMA, arXiv 2311.18815).

    Every concept of a case that MiniSD was trained on is erased, benign ones included: an erased
    benign concept starts where the targets start, and only the immunization distinguishes them.
    Held-out concepts are learned for the first time. A style is erased to the photo of the same
    object, an object to "a thing".
    """

    def check_roles(self, key: str, roles: Roles) -> None:
        if new := [name for name in roles.targets if name in _HELD_OUT]:
            reason = "MiniSD never saw it, so it cannot be learned again; use scenario=personalize."
            raise UserError(key, new[0], reason)

    def erasures(self, roles: Roles) -> Iterator[Erasure]:
        preserve = words.preserved(
            rest(roles.all).objects, [s for s in STYLE_NAMES if s not in roles.all]
        )
        for name in roles.all:
            if name in STYLE_NAMES:
                yield words.style_erasure(name, preserve)
            elif name not in _HELD_OUT:
                yield words.object_erasure(name, preserve)
