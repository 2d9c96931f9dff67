"""Cases made of the embedded world's objects and styles: what `relearn` and `personalize` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

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
from lab.core.errors import UserError
from lab.core.options import choice, count, names
from lab.core.seeding import derive
from lab.core.types import Scenario
from lab.minisd.world import world
from lab.minisd.world.vocabulary import OBJECTS, PHOTO, STYLE_NAMES, STYLES, members, thing
from lab.minisd.world.world import Picture, Subset
from lab.scenarios import concept_texts as words
from lab.scenarios import concepts

Caption = Callable[[Picture], str]
_STYLES = frozenset(s.name for s in STYLES)
_PLAIN_SHARE = 0.4  # photos among the pictures to keep; the rest are in the styles that no role has


@dataclass(frozen=True)
class Roles:
    """Which concepts play which role in one case."""

    targets: tuple[str, ...]
    others: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()

    @property
    def reported(self) -> tuple[str, ...]:
        return (*self.targets, *self.others)

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.reported, *self.rehearsal)

    @property
    def case(self) -> str:
        return "_".join(name.replace(" ", "-") for name in self.targets)

    @property
    def rest(self) -> Subset:
        """Everything that MiniSD knows and no role has: photos and, where any are left, styles."""
        left = tuple(s for s in STYLE_NAMES if s not in self.all)
        return Subset(
            tuple(o for o in OBJECTS if o not in self.all),
            (PHOTO, *left),
            "seen",
            photo_share=_PLAIN_SHARE,
        )


class Studio:
    """Draws pictures of the world for one seed, each set once."""

    def __init__(self, seed: int, side: int) -> None:
        self.seed, self.side = seed, side
        self._known: dict[tuple[object, ...], CaptionedImages] = {}

    def render(self, shown: Sequence[Picture], caption: Caption) -> CaptionedImages:
        pixels = (
            torch.from_numpy(np.stack([world.render(p) for p in shown]))
            .permute(0, 3, 1, 2)
            .contiguous()
        )
        described = tuple(words.description(p) for p in shown if p.style != PHOTO)
        images, prompts = concepts.resize(pixels, self.side), tuple(caption(p) for p in shown)
        return CaptionedImages(images, prompts, described if len(described) == len(shown) else ())

    def draw(
        self, subset: Subset, total: int, caption: Caption, *labels: object
    ) -> CaptionedImages:
        """The first ``total`` pictures of ``subset`` in the stream ``labels``: parts with other
        labels differ.
        """
        key = (subset, total, caption, *labels)
        if key not in self._known:
            stream = derive(self.seed, "scenario", *labels)
            shown = [world.picture(subset, stream, i) for i in range(total)]
            self._known[key] = self.render(shown, caption) if shown else concepts.empty(self.side)
        return self._known[key]


@dataclass(kw_only=True)
class WorldConcepts(Scenario):
    """One case per entry of the chosen list. Implements `lab.core.types.Scenario`.

    Pictures of a concept depend on the seed, the concept and the part alone, so that cases, splits
    and scenarios share them. Parts (``own``, ``train``, ``reference``) come from streams of their
    own and are disjoint.

    Args:
        test, validation: lists of cases {targets, others, rehearsal}. What a test case reports has
            no role in a validation case, so that no protection is tuned on it; it may be among what
            such a case keeps.
        split: ``test`` or ``validation``.
        cases: how many cases of the list, or ``all``.
        own, train, reference: pictures per concept for the immunizer, the attacker and the
            comparison.
        prior, keep, unrelated, regularizers: sizes, see `lab.core.types`.
        regularizer_templates: ``all`` or ``one``, the diversity of C_reg.
        families: of prompts (`lab.scenarios.concepts.FAMILIES`), as far as a concept has them.
        sampling: `lab.core.data.Sampling`.
        resolution: side in pixels; the world has 64, other sizes are scaled.

    Raises:
        UserError: unknown concepts (with the nearest names), concepts with two roles, options out
            of range.
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: str
    test: Any
    validation: Any
    split: str = "test"
    cases: Any = 1
    own: int = 20
    train: int = 20
    reference: int = 32
    prior: int = 32
    keep: int = 96
    unrelated: int = 32
    regularizers: int = 200
    regularizer_templates: str = "all"
    families: Any = ("name", "description", "reworded")
    sampling: Any = field(default_factory=Sampling)
    resolution: int = 64

    def __post_init__(self) -> None:
        choice("scenario.split", self.split, ("test", "validation"))
        for key in ("own", "train", "reference", "keep", "unrelated", "regularizers"):
            count(f"scenario.{key}", getattr(self, key), 1)
        count("scenario.prior", self.prior, 0)
        choice("scenario.regularizer_templates", self.regularizer_templates, ("all", "one"))
        self.families = names("scenario.families", concepts.plain(self.families))
        for family in self.families:
            choice("scenario.families", family, concepts.FAMILIES)
        if "name" not in self.families:
            raise UserError(
                "scenario.families",
                list(self.families),
                "must hold name: every report starts from it.",
            )
        self._sampling = concepts.sampling(self.sampling)
        concepts.resolution(self.resolution)
        self._roles = {
            split: self._parse(split, getattr(self, split)) for split in ("test", "validation")
        }
        self._check_splits()
        available = self._roles[self.split]
        if self.cases != "all" and count("scenario.cases", self.cases, 1) > len(available):
            fix = (
                f"there are {len(available)} {self.split} cases; write a number up to that, or all."
            )
            raise UserError("scenario.cases", self.cases, fix)

    # ---- roles

    def _parse(self, split: str, given: object) -> tuple[Roles, ...]:
        key, given = f"scenario.{split}", concepts.plain(given)
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise UserError(
                key,
                given,
                "must be a list of cases, e.g. [{targets: [mosaic], others: [halftone]}].",
            )
        found = tuple(self._roles_of(f"{key}[{i}]", entry) for i, entry in enumerate(given))
        twice = next(
            (r.case for i, r in enumerate(found) if r.case in [q.case for q in found[:i]]), None
        )
        if twice is not None:
            raise UserError(
                key, twice, "two cases have the same targets; cases are called by their targets."
            )
        return found

    def _roles_of(self, key: str, entry: object) -> Roles:
        given = concepts.entries(key, entry, ("targets", "others", "rehearsal"))
        parts = {
            role: names(f"{key}.{role}", given.get(role) or [])
            for role in ("targets", "others", "rehearsal")
        }
        for role in ("targets", "others"):
            if not parts[role]:
                raise UserError(f"{key}.{role}", given.get(role), "must name at least one concept.")
        roles = Roles(**parts)
        for role, members_ in parts.items():
            for name in members_:
                world.concept(name, f"{key}.{role}")
                if roles.all.count(name) > 1:
                    raise UserError(
                        f"{key}.{role}", name, "has two roles in this case; give it one."
                    )
                self.fits(f"{key}.{role}", role, name)
        return roles

    def fits(self, key: str, role: str, name: str) -> None:
        """Raises `lab.core.errors.UserError` for a concept that cannot have this role in this
        scenario.
        """
        raise NotImplementedError  # abstract: `relearn` and `personalize` have their own

    def _check_splits(self) -> None:
        reported = {name for roles in self._roles["test"] for name in roles.reported}
        for i, roles in enumerate(self._roles["validation"]):
            for name in roles.all:
                if name in reported:
                    fix = (
                        "is reported by a test case; what is tuned on it would no longer be a test."
                    )
                    raise UserError(f"scenario.validation[{i}]", name, fix)

    def chosen(self) -> tuple[Roles, ...]:
        """The cases that `load` builds."""
        available = self._roles[self.split]
        return available if self.cases == "all" else available[: self.cases]

    # ---- data

    def load(self, seed: int) -> ScenarioData:
        studio = Studio(seed, self.resolution)
        notes = self._notes()
        cases = (self._case(roles, studio) for roles in self.chosen())
        return concepts.loaded(cases, notes, credit=notes[0])

    def _case(self, roles: Roles, studio: Studio) -> ConceptCase:
        def made(which: tuple[str, ...], role: Role) -> tuple[Concept, ...]:
            return tuple(self._concept(name, role, roles, studio) for name in which)

        targets, others = made(roles.targets, "harmful"), made(roles.others, "benign")
        rehearsal = made(roles.rehearsal, "benign")
        keep = studio.draw(roles.rest, self.keep, words.world_caption, "keep")
        seed = derive(studio.seed, "scenario", "regularizers")
        registered = words.regularizers(
            roles.rest, seed, self.regularizers, self.regularizer_templates
        )
        taken = {*keep.prompts, *registered}
        for concept in (*targets, *others, *rehearsal):
            for part in (concept.own, concept.train, concept.reference, concept.prior):
                taken.update(part.prompts)
            taken.update(*concept.prompts.values())
        strange = words.fresh(
            roles.rest, derive(studio.seed, "scenario", "unrelated"), self.unrelated, taken
        )
        return ConceptCase(
            roles.case,
            targets,
            others,
            rehearsal,
            keep=keep,
            regularizers=registered,
            unrelated=studio.render(strange, words.world_caption),
            sampling=self._sampling,
            erased=tuple(self.erasures(roles)),
        )

    def erasures(self, roles: Roles) -> Iterator[Erasure]:
        """What is erased before the case starts."""
        raise NotImplementedError  # abstract: `relearn` and `personalize` have their own

    def _concept(self, name: str, role: Role, roles: Roles, studio: Studio) -> Concept:
        painted = name in _STYLES
        own, train, reference = (
            studio.draw(world.concept(name), getattr(self, part), words.caption, name, part)
            for part in ("own", "train", "reference")
        )
        make = words.style_prompts if painted else words.object_prompts
        asked: Mapping[str, tuple[str, ...]] = make(name, self._sampling.count, studio.seed)
        return Concept(
            name,
            role,
            "style" if painted else "object",
            words=name,
            train=train,
            own=own,
            reference=reference,
            prior=self._prior(name, roles, studio),
            prompts={family: asked[family] for family in self.families if family in asked},
        )

    def _prior(self, name: str, roles: Roles, studio: Studio) -> CaptionedImages:
        """For a style: photos and other styles of the same objects. For an object: photos of others
        of its class.
        """
        rest = roles.rest
        if name in _STYLES:
            subset = Subset(
                rest.objects, rest.styles, "seen", photo_share=_PLAIN_SHARE, two_share=0.0
            )
            return studio.draw(subset, self.prior, words.caption, "prior")
        same = tuple(o for o in members(thing(name).category) if o not in roles.all) or rest.objects
        return studio.draw(Subset(same, two_share=0.0), self.prior, words.class_caption, "prior")

    def _notes(self) -> list[str]:
        notes = [f"Pictures of the embedded world. {world.CREDIT}"]
        for roles in self.chosen():
            roster = "; ".join(
                f"{role}: {', '.join(getattr(roles, role)) or 'none'}"
                for role in Roles.__annotations__
            )
            notes.append(
                f"Case {roles.case} ({self.split} concepts). {roster[0].upper()}{roster[1:]}."
            )
            bare = [name for name in roles.all if name not in _STYLES]
            if bare and "description" in self.families:
                listed = ", ".join(bare)
                notes.append(
                    f"No prompts by description for {listed}: the world describes no object "
                    "without its name."
                )
        if self.resolution != 64:
            notes.append(
                f"The world's pictures have 64 pixels and were scaled to {self.resolution}."
            )
        return notes
