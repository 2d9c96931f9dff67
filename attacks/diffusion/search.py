"""The attacker's search for its best options, on each model by itself and with equal trials in
every model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from attacks.diffusion.attack import ConceptBase
from attacks.diffusion.trainer import run
from lab.core.data import CaptionedImages, Concept
from lab.core.errors import UserError, nearest
from lab.core.options import choice, count
from lab.core.seeding import generator
from lab.core.types import Budget, Checkpoint, Trajectory
from lab.models.diffusion import DiffusionModel

MODES = ("grid", "random")
HELD_OUT = 0.25  # share of the training pictures that trials are scored by
Score = Callable[[Tensor, CaptionedImages], float]


@dataclass(frozen=True)
class Search:
    """Trials of ``steps`` updates each, then the whole trajectory with the best setting.

    A trial trains on three quarters of the attacker's own pictures and is scored on the rest;
    ``task.reference`` and ``task.own`` are never read. Settings are a function of the options and
    the seed alone, so every model tries the same. Ties go to the earlier trial. Where every trial
    diverges the attacker keeps the options it has.

    Attributes:
        mode: ``grid`` (every combination) | ``random`` (``trials`` different ones, drawn from the
            seed).
        trials: how many; None with ``grid`` = all combinations.
        steps: updates of a trial.
        space: option → values to try.
        score: None = loss on the held-out pictures; ``likeness`` in a config =
            `attacks.diffusion.similarity`; or a function of the trial's generations uint8 [n, 3, s,
            s] by ``name`` prompts and the held-out pictures whose value is the better the higher.
    """

    mode: str
    trials: int
    steps: int
    space: dict[str, tuple[Any, ...]]
    score: Score | None = None
    key: str = "attacks.search"  # for messages

    @classmethod
    def parse(cls, owner: str, given: object) -> Search:
        """From the option ``search`` of the attacker with config key ``owner``.

        Raises:
            UserError: an unknown key, an empty space, or trials that the space does not have.
        """
        if isinstance(given, Search):
            return given
        key = f"{owner}.search"
        if not isinstance(given, Mapping):
            raise UserError(
                key, given, "must be null or a group: mode, trials, steps, space, score."
            )
        known = [f.name for f in fields(cls) if f.name != "key"]
        for name in given:
            if name not in known:
                raise UserError(
                    f"{key}.{name}",
                    given[name],
                    f"there is no such key; {nearest(str(name), known)}",
                )
        mode = choice(f"{key}.mode", given.get("mode", "grid"), MODES)
        steps = count(f"{key}.steps", given.get("steps"))
        listed = given.get("space")
        if not isinstance(listed, Mapping) or not listed:
            raise UserError(
                f"{key}.space",
                listed,
                "must name options and values to try, e.g. {lr: [1e-3, 4e-3]}.",
            )
        space: dict[str, tuple[Any, ...]] = {}
        for option, values in listed.items():
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise UserError(f"{key}.space.{option}", values, "must be a list of values to try.")
            space[str(option)] = tuple(values)
        size, trials = math.prod(map(len, space.values())), given.get("trials")
        trials = (
            size if trials is None and mode == "grid" else count(f"{key}.trials", trials, 1, size)
        )
        if mode == "grid" and trials != size:
            told = f"a grid takes all {size} combinations; leave it null, or set mode=random."
            raise UserError(f"{key}.trials", trials, told)
        score = given.get("score")
        if score == "likeness":
            from attacks.diffusion.similarity import likeness as score
        elif score is not None and not callable(score):
            told = (
                "must be null (held-out loss), likeness, or a function of pictures "
                "(_target_, _partial_: true)."
            )
            raise UserError(f"{key}.score", score, told)
        return cls(mode, trials, steps, space, score, key)

    def settings(self, seed: int, task: Concept) -> list[dict[str, Any]]:
        """What is tried, in order."""
        every = self._every()
        if self.mode == "grid":
            return every
        order = torch.randperm(
            len(every), generator=generator(seed, "attack search", task.name)
        ).tolist()
        return [every[i] for i in order[: self.trials]]

    def _every(self) -> list[dict[str, Any]]:
        return [
            dict(zip(self.space, values, strict=True))
            for values in itertools.product(*self.space.values())
        ]

    def check(self, attack: ConceptBase, task: Concept) -> None:
        """Before anything runs: the concept has what every setting asks for, and pictures to hold
        out.

        Raises:
            UserError: see `attacks.diffusion.data.check_data` and `held_out`.
        """
        held_out(task, 0, self.key, self._most(attack))
        for setting in self._every():  # of which a random search draws others for each seed
            try:
                attack.varied(setting).check_task(task)
            except UserError as error:
                option = error.key.rpartition(".")[2]
                if option not in setting:
                    raise
                raise UserError(f"{self.key}.space.{option}", setting[option], error.fix) from error

    def _most(self, attack: ConceptBase) -> int | None:
        """How many training pictures the attacker has in any trial; None = all."""
        counts = self.space.get("pictures", (getattr(attack, "pictures", None),))
        return None if None in counts else max(counts)

    def _scorer(
        self, attack: ConceptBase, model: DiffusionModel, task: Concept, seed: int
    ) -> float | None:
        """A figure that is the better the lower, or None where the trial diverged."""
        families = () if self.score is None else ("name",)
        quiet = replace(attack, families=families, keep_weights=False)
        trial = run(
            quiet, model, task, seed=seed, budget=Budget(self.steps, 1, at=()), checkpoint=None
        )
        if trial.status != "ok":
            return None
        if self.score is None:
            return trial.values["test_loss"][-1]
        found = -float(self.score(trial.samples["name"][-1], task.reference))
        return found if math.isfinite(found) else None

    def __call__(
        self,
        attack: ConceptBase,
        model: DiffusionModel,
        task: Concept,
        *,
        seed: int,
        budget: Budget,
        checkpoint: Checkpoint | None,
    ) -> Trajectory:
        """See `lab.core.types.Attacker`. ``info["search"]`` holds every trial with its score (None:
        diverged).
        """
        tried = held_out(task, seed, self.key, self._most(attack))
        _, saved = (checkpoint.load() if checkpoint else None) or ({}, {})
        scores: list[float | None] = list(saved.get("search", []))
        settings = self.settings(seed, task)
        for setting in settings[len(scores) :]:
            scores.append(self._scorer(attack.varied(setting), model, tried, seed))
            if checkpoint is not None:
                checkpoint.save({}, {"search": scores})
        good = [i for i, score in enumerate(scores) if score is not None]
        best = settings[min(good, key=lambda i: (scores[i], i))] if good else {}
        beside = None if checkpoint is None else _Beside(checkpoint, scores)
        found = run(attack.varied(best), model, task, seed=seed, budget=budget, checkpoint=beside)
        rows = [{"setting": s, "score": score} for s, score in zip(settings, scores, strict=True)]
        named = getattr(self.score, "__name__", "the given score")
        scored = "held_out_loss" if self.score is None else f"minus {named}"
        found.info["search"] = {
            "mode": self.mode,
            "steps": self.steps,
            "score": scored,
            "trials": rows,
            "best": best,
        }
        return found


class _Beside:
    """A checkpoint whose values keep the search's scores beside those of the run."""

    def __init__(self, inner: Checkpoint, scores: list[float | None]) -> None:
        self.inner, self.scores = inner, scores

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.inner.load()

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.inner.save(tensors, {**values, "search": self.scores})


def held_out(
    task: Concept, seed: int, key: str = "attacks.search", most: int | None = None
) -> Concept:
    """``task`` whose training pictures, the first ``most`` of them, are split at random into
    ``train`` and, in place of its own, ``reference``.

    Raises:
        UserError: fewer than two training pictures.
    """
    n = len(task.train) if most is None else min(most, len(task.train))
    if n < 2:
        told = (
            f"the attacker has {n} training picture of {task.name}; a search needs 2, or "
            "set it to null."
        )
        raise UserError(key, task.name, told)
    order = torch.randperm(n, generator=generator(seed, "attack search split", task.name))
    cut = max(1, round(HELD_OUT * n))
    train, own, reference = (
        task.train.pick(rows.tolist()) for rows in (order[cut:], order[:0], order[:cut])
    )
    return replace(task, train=train, own=own, reference=reference)
