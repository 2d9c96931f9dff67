"""The baseline model: no immunization."""

from __future__ import annotations

from typing import ClassVar

from lab.core.config import Text, config
from lab.core.data import Kind
from lab.core.types import AnyCase, Checkpoint, Immunizer, Log, Model


@config
class NoImmunization(Immunizer):
    """Returns an equal copy of the model, so that the baseline is a method like any other."""

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep", "diffusion"})

    name: Text = "none"

    def __call__(
        self, model: Model, case: AnyCase, *, seed: int, checkpoint: Checkpoint | None, log: Log
    ) -> Model:
        return model.copy()
