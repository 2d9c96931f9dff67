"""Concepts that the model knew are erased, and somebody teaches them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lab.core.data import Erasure
from lab.core.errors import UserError
from lab.minisd.world.vocabulary import HELD_OUT_OBJECTS, HELD_OUT_STYLES, STYLE_NAMES
from lab.scenarios import concept_texts as words
from lab.scenarios.world_concepts import Roles, WorldConcepts

_HELD_OUT = (*HELD_OUT_OBJECTS, *HELD_OUT_STYLES)


@dataclass(kw_only=True)
class Relearn(WorldConcepts):
    """Re-learning after erasure (MIMA, arXiv 2412.15320; IMMA, arXiv 2311.18815).

    Every concept of a case that MiniSD was trained on is erased, benign ones included: an erased
    benign twin starts where the targets start, and only the immunization tells them apart. Held-out
    concepts are learned for the first time. A style is erased to the photo of the same object, an
    object to "a thing".
    """

    def fits(self, key: str, role: str, name: str) -> None:
        if role == "targets" and name in _HELD_OUT:
            raise UserError(
                key,
                name,
                "MiniSD never saw it, so it cannot be learned again; use scenario=personalize.",
            )

    def erasures(self, roles: Roles) -> Iterator[Erasure]:
        preserve = words.preserved(
            roles.rest.objects, [s for s in STYLE_NAMES if s not in roles.all]
        )
        for name in roles.all:
            if name in STYLE_NAMES:
                yield words.style_erasure(name, preserve)
            elif name not in _HELD_OUT:
                yield words.object_erasure(name, preserve)
