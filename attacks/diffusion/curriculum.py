"""A curriculum: one attacker after the other on the same copy, for example related pictures first,
then the target.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from attacks.diffusion.attack import ConceptAttack, ConceptBase, check_moving
from lab.core.data import Concept
from lab.core.errors import UserError, nearest
from lab.core.options import choice, number
from lab.core.types import Budget
from lab.models.diffusion import DiffusionModel

DATA = ("target", "prior")
_KEYS = ("data", "share", "attack")


@dataclass(frozen=True)
class Stage:
    """``attack`` on the concept's training pictures (``target``) or on its ``prior`` ones, for a
    share of the steps.
    """

    attack: ConceptAttack
    data: str = "target"
    share: float = 1.0


@dataclass(eq=False)
class Curriculum(ConceptBase):
    """Runs its stages one after the other; the trajectory and the schedule of rates go on over all
    of them.

    Every stage starts from what the stage before left, with an optimizer of its own; adapters are
    added to the weights in between. A token that a stage has learned is a word of the next one
    (``template=token`` with the same ``token``), all its vectors together.
    ``test_loss`` and samples speak of the target in the words of the stage that is running. Related
    data are the prior pictures, or the target under its description prompts
    (``template=description``).

    Args:
        stages: name → {``data``: target | prior, ``share``: of the steps, ``attack``: an attacker},
            in order.
        search: as in `ConceptBase`; options are named ``STAGE.share`` or ``STAGE.attack.OPTION``.

    Raises:
        UserError: no stage, an unknown key, or an attacker that cannot be a stage.
    """

    stages: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        key = f"{self.key}.stages"
        if not isinstance(self.stages, Mapping) or not self.stages:
            raise UserError(
                key, self.stages, "must name at least one stage with data, share and attack."
            )
        self.stages = {
            str(name): self._stage(f"{key}.{name}", given) for name, given in self.stages.items()
        }
        self._check_search()

    @staticmethod
    def _stage(key: str, given: object) -> Stage:
        if isinstance(given, Stage):
            return given
        if not isinstance(given, Mapping):
            raise UserError(key, given, "must be a group of data, share and attack.")
        for name in given:
            if name not in _KEYS:
                raise UserError(
                    f"{key}.{name}",
                    given[name],
                    f"there is no such key; {nearest(str(name), _KEYS)}",
                )
        attack = given.get("attack")
        if not isinstance(attack, ConceptAttack) or attack.search is not None:
            told = (
                "must be an attacker on text-to-image models other than a curriculum, "
                "without a search of its own."
            )
            raise UserError(f"{key}.attack", getattr(attack, "name", attack), told)
        data = choice(f"{key}.data", given.get("data", "target"), DATA)
        return Stage(attack, data, number(f"{key}.share", given.get("share", 1.0), above=0))

    def varied(self, setting: Mapping[str, Any]) -> Curriculum:
        stages: dict[str, Stage] = dict(self.stages)
        for option, value in setting.items():
            name, _, rest = option.partition(".")
            key = f"{self.key}.search.space.{option}"
            if name not in stages:
                raise UserError(
                    key, value, f"no option to search; a stage comes first: {nearest(name, stages)}"
                )
            if rest == "share":
                stages[name] = replace(stages[name], share=number(key, value, above=0))
            elif rest.startswith("attack."):
                changed = stages[name].attack.varied({rest.removeprefix("attack."): value})
                stages[name] = replace(stages[name], attack=changed)
            else:
                raise UserError(
                    key, value, f"no option to search; use {name}.share or {name}.attack.OPTION."
                )
        return replace(self, stages=stages, search=None)

    def check_task(self, task: Concept) -> None:
        for stage in self.stages.values():
            self._data(stage, task)
            replace(stage.attack, families=self.families).check_task(task)

    def check_unread(self) -> None:
        for stage in self.stages.values():
            stage.attack.check_unread()

    def dry_open(self, model: DiffusionModel, task: Concept) -> None:
        copy = model.copy()
        for attack in self._attacks():  # on one copy, as when they run: a token can be added once
            moving = attack.open(copy, task, 0)
            check_moving(attack.key, moving)
            moving.close()

    def _attacks(self) -> list[ConceptAttack]:
        """The stages' attackers; a token that an earlier one learns is spoken with all its
        vectors.
        """
        found, learned = [], dict[str, str]()
        for stage in self.stages.values():
            attack, words = stage.attack, stage.attack.learns()
            if words is not None:
                learned[attack.token] = words
            elif attack.template == "token" and attack.token in learned:
                attack = replace(attack, token=learned[attack.token])
            found.append(attack)
        return found

    def texts(self) -> dict[str, str]:
        found = super().texts()
        for stage in self.stages.values():
            found |= stage.attack.texts()
        return found

    def _data(self, stage: Stage, task: Concept) -> Concept:
        if stage.data == "target":
            return task
        if not len(task.prior):
            told = (
                f"concept {task.name} has no prior pictures; use target or give the scenario some."
            )
            raise UserError(f"{self.key}.stages", "prior", told)
        return replace(task, train=task.prior)

    def plan(self, task: Concept, budget: Budget) -> list[tuple[ConceptAttack, Concept, int]]:
        """Shares are of their sum; every stage gets at least one step where there are enough."""
        stages = list(self.stages.values())
        if len(stages) > budget.steps:
            raise UserError(
                "budget.horizon",
                budget.horizon,
                f"{self.key} has {len(stages)} stages; give it more steps.",
            )
        total = sum(stage.share for stage in stages)
        ends = [
            budget.steps * reached / total
            for reached in itertools.accumulate(s.share for s in stages)
        ]
        stops = [
            min(max(round(end), i + 1), budget.steps - len(stages) + i + 1)
            for i, end in enumerate(ends)
        ]
        stops = list(itertools.accumulate(stops, lambda before, stop: max(before + 1, stop)))
        parts = zip(self._attacks(), stages, stops, strict=True)
        return [(attack, self._data(stage, task), stop) for attack, stage, stop in parts]
