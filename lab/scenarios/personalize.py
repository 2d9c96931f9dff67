"""Concepts that the model never saw, and somebody teaches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lab.core.data import Erasure
from lab.core.errors import UserError, nearest
from lab.minisd.world.vocabulary import HELD_OUT_OBJECTS, HELD_OUT_STYLES
from lab.scenarios.world_concepts import Roles, WorldConcepts

_HELD_OUT = (*HELD_OUT_OBJECTS, *HELD_OUT_STYLES)


@dataclass(kw_only=True)
class Personalize(WorldConcepts):
    """Personalisation (MIMA, arXiv 2412.15320): objects and styles held out of MiniSD's training.
    Nothing is erased.

    A concept is called by its name; identifiers such as a rare token are the attacker's choice.
    """

    def fits(self, key: str, role: str, name: str) -> None:
        if name not in _HELD_OUT:
            raise UserError(
                key,
                name,
                f"MiniSD was trained on it, so it is not new to it; {nearest(name, _HELD_OUT)}",
            )

    def erasures(self, roles: Roles) -> Iterator[Erasure]:
        return iter(())
