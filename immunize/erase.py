"""Erasure as a step of a chain of immunizers: a provider erases once more, after immunization."""

from __future__ import annotations

from typing import ClassVar

from lab.core.config import Text, config
from lab.core.data import ConceptCase, Kind
from lab.core.types import Checkpoint, Eraser, Immunizer, Log
from lab.models.diffusion import DiffusionModel


@config
class EraseAgain(Immunizer):
    """Erases the concepts of the case from the weights that it is given.

    Args:
        eraser: what erases.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    eraser: Eraser
    name: Text = "erase_again"

    def texts(self) -> dict[str, str]:
        return self.eraser.texts()

    def fingerprint(self) -> str:
        return self.eraser.fingerprint()

    def check(self, cases: tuple[ConceptCase, ...]) -> None:
        self.eraser.check(cases)

    def __call__(
        self,
        model: DiffusionModel,
        case: ConceptCase,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        log: Log,
    ) -> DiffusionModel:
        erased: DiffusionModel = self.eraser(model, case, seed=seed)
        return erased
