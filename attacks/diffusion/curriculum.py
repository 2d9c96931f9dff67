"""A curriculum: one attacker after the other on the same copy, for example related images first,
then the target.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, InstanceOf, ValidationError
from typing_extensions import Self

from attacks.diffusion.attack import NOT_OWN_WEIGHTS, ConceptAttack, ConceptBase, Phase
from lab.core.config import Positive, config, options, user_error
from lab.core.data import Concept
from lab.core.errors import UserError, nearest
from lab.core.types import Budget
from lab.models.diffusion import DiffusionModel


@options
class CurriculumStage:
    """``attack`` on the concept's training images (``target``) or on its ``prior`` ones, for a
    ``share`` of the steps.
    """

    attack: InstanceOf[ConceptAttack]
    data: Literal["target", "prior"] = "target"
    share: Positive = 1.0

    def __post_init__(self) -> None:
        if self.attack.search is not None:
            raise ValueError("a stage has no search of its own; search the curriculum instead")
        if not self.attack.trains_own_weights:
            raise ValueError(f"attack cannot be a stage: {NOT_OWN_WEIGHTS}")

    def concept(self, task: Concept) -> Concept:
        """Return ``task`` with the images that the stage trains on."""
        return task if self.data == "target" else replace(task, train=task.prior)


@config
class Curriculum(ConceptBase):
    """Runs its stages one after the other; the trajectory and the schedule of rates go on over all
    of them.

    Every stage starts from what the stage before left, with an optimizer of its own; adapters are
    added to the weights in between. A token that a stage has learned is a word of the next one
    (``template=token`` with the same ``token``), all its vectors together.
    ``test_loss`` and samples name the target in the words of the stage that is running. Related
    data are the prior images, or the target under its description prompts
    (``template=description``).

    Args:
        stages: name → {``data``: target | prior, ``share``: of the steps, ``attack``: an attacker},
            in order.
        search: as in `ConceptBase`; options are named ``STAGE.share`` or ``STAGE.attack.OPTION``.
    """

    stages: Annotated[dict[str, CurriculumStage], Field(min_length=1)]

    def fingerprint(self) -> str:
        return "".join(stage.attack.fingerprint() for stage in self.stages.values())

    def varied(self, setting: Mapping[str, Any]) -> Self:
        stages, space = dict(self.stages), f"{self.key}.search.space"
        for option, value in setting.items():
            name, _, rest = option.partition(".")
            if name not in stages:
                reason = f"a stage comes first; {nearest(name, stages)}"
                raise UserError(f"{space}.{option}", value, reason)
            stage, inner = stages[name], rest.removeprefix("attack.")
            try:
                change = (
                    {rest: value}
                    if inner == rest
                    else {"attack": stage.attack.varied({inner: value})}
                )
                stages[name] = replace(stage, **change)
            except ValidationError as error:
                raise user_error(error, f"{space}.{name}", CurriculumStage) from None
        return replace(self, stages=stages, search=None)

    def images_per_step(self) -> int:
        return max(stage.attack.batch_size for stage in self.stages.values())

    def check_budget(self, budget: Budget) -> None:
        super().check_budget(budget)
        if budget.unit == "images" and len({s.attack.batch_size for s in self.stages.values()}) > 1:
            fix = "needs stages of one batch_size, as budget.unit=images counts images."
            raise UserError(f"{self.key}.stages", list(self.stages), fix)

    def check_task(self, task: Concept) -> None:
        for name, stage in self.stages.items():
            if stage.data == "prior" and not len(task.prior):
                reason = f"concept {task.name} has no prior images; use target or give it some."
                raise UserError(f"{self.key}.stages.{name}.data", "prior", reason)
            replace(stage.attack, families=self.families).check_task(stage.concept(task))

    def dry_open(self, model: DiffusionModel, task: Concept) -> None:
        copy = model.copy()
        for attack in self._attacks():  # on one copy, as when they run: a token can be added once
            attack.open(copy, task, 0).check(attack.key).close()

    def _attacks(self) -> Iterator[ConceptAttack]:
        """Yield the attackers; they use a token that an earlier one learns with all its vectors."""
        learned: dict[str, str] = {}
        for attack in (stage.attack for stage in self.stages.values()):
            words = attack.learned_words()
            if words is not None:
                learned[attack.token] = words
            elif attack.template == "token" and attack.token in learned:
                attack = replace(attack, token=learned[attack.token])
            yield attack

    def texts(self) -> dict[str, str]:
        texts = super().texts()
        for stage in self.stages.values():
            texts |= stage.attack.texts()
        return texts

    def plan(self, task: Concept, budget: Budget) -> list[Phase]:
        """Shares are of their sum; every stage gets at least one step where there are enough."""
        stages, steps = list(self.stages.values()), budget.steps
        if len(stages) > steps:
            reason = f"{self.key} has {len(stages)} stages; give it more steps."
            raise UserError("budget.horizon", budget.horizon, reason)
        total = sum(stage.share for stage in stages)
        ends = [steps * sum_ / total for sum_ in itertools.accumulate(s.share for s in stages)]
        stops = [
            min(max(round(end), i), steps - len(stages) + i) for i, end in enumerate(ends, start=1)
        ]
        stops = list(itertools.accumulate(stops, lambda before, stop: max(before + 1, stop)))
        parts = zip(self._attacks(), stages, stops, strict=True)
        return [Phase(attack, stage.concept(task), stop) for attack, stage, stop in parts]
