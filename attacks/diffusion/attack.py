"""Base classes of attackers on a text-to-image model: options, checks, and the attack itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from pydantic import ValidationError
from typing_extensions import Self

from attacks.diffusion.options import AttackOptions, Moving, TrainingOptions
from attacks.diffusion.search import Search, search
from attacks.diffusion.trainer import run
from lab.core.config import config, user_error
from lab.core.data import Concept, ConceptCase
from lab.core.errors import UserError
from lab.core.types import Budget, Checkpoint, Trajectory
from lab.models.diffusion import DiffusionModel


@config
class ConceptBase(AttackOptions):
    """An attacker on a text-to-image model. Implements `lab.core.types.Attacker`.

    Args:
        search: None, or a budgeted search for the best options (`attacks.diffusion.search`).

    The other options are those of `AttackOptions`.
    """

    search: Search | None = None

    def __post_init__(self) -> None:
        """Check that the attacker takes every value of the search's space."""
        for option, values in self.search.space.items() if self.search else ():
            for value in values:
                self.varied({option: value})

    def check(self, cases: tuple[ConceptCase, ...]) -> None:
        """Check every concept with every setting that a search may try, before anything runs."""
        tried = [{}, *(self.search.combinations() if self.search else ())]
        for task in (task for case in cases for task in case.tasks):
            for setting in tried:
                self.varied(setting).check_task(task)
            if self.search is not None:
                self.search.held_out(self, task, 0)

    def __call__(
        self,
        model: DiffusionModel,
        task: Concept,
        *,
        seed: int,
        budget: Budget,
        checkpoint: Checkpoint | None,
    ) -> Trajectory:
        """See `lab.core.types.Attacker`; ``samples`` holds the generations of every snapshot.

        Raises:
            UserError: a concept that cannot be trained on.
            Diverged: the loss is not finite before the first update.
        """
        self.check_task(task)
        if self.search is None:
            return run(self, model, task, seed=seed, budget=budget, checkpoint=checkpoint)
        return search(
            self.search, self, model, task, seed=seed, budget=budget, checkpoint=checkpoint
        )


@config
class ConceptAttack(TrainingOptions, ConceptBase):
    """Fine-tunes a copy of a text-to-image model; a subclass says what moves (`open`).

    Options are those of `TrainingOptions` and `ConceptBase`.
    """

    def varied(self, setting: Mapping[str, Any]) -> Self:
        key = f"{self.key}.search.space"
        for option in setting.keys() & {field.name for field in fields(ConceptBase)}:
            raise UserError(f"{key}.{option}", setting[option], "cannot be searched.")
        try:
            return replace(self, **setting, search=None)
        except ValidationError as error:
            raise user_error(error, key, type(self)) from None


def open_unet(model: DiffusionModel) -> Moving:
    """Let all of the U-Net move.

    Weights: ``unet.NAME``, complete; ``info`` carries the config they load with.
    """
    return Moving(
        {f"unet.{name}": parameter for name, parameter in model.unet.named_parameters()},
        "unet",
        lambda: {f"unet.{k}": v for k, v in model.unet.state_dict().items()},
        info={"unet_config": json.loads(model.unet.to_json_string())},
    )
