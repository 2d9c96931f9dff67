"""The control arm: no immunization."""

from __future__ import annotations

import copy
from typing import ClassVar

from lab.types import CONTROL, Case, Checkpoint, FeatureModel, Kind, Log


class NoImmunization:
    """Returns an equal copy of the model, so that the control arm is an immunizer like any other."""

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep"})

    def __init__(self, name: str = CONTROL) -> None:
        self.name = name

    def __call__(
        self, model: FeatureModel, case: Case, *, seed: int, checkpoint: Checkpoint | None, log: Log
    ) -> FeatureModel:
        return copy.deepcopy(model)
