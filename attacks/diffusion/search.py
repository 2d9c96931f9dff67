"""The one place where options of a diffusion attacker, its learning rate first, are searched.

Every model is searched by itself, with the same settings and equally many trials.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor

from attacks.diffusion.options import AttackOptions, TrainingOptions
from attacks.diffusion.trainer import run
from lab.core.config import Count, options
from lab.core.data import CaptionedImages, Concept
from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.core.types import Budget, Checkpoint, Trajectory
from lab.models.diffusion import DiffusionModel
from lab.scorers.features import FeatureScorer

HELD_OUT = 0.25  # share of the training images that trials are scored by
Setting = dict[str, Any]


@cache
def _network() -> FeatureScorer:
    return FeatureScorer(image_size=128)


def likeness(images: Tensor, pictures: CaptionedImages) -> float:
    """Compute the mean cosine similarity of the features of all generations and images, in [-1, 1].

    The network is EfficientNet-Lite0 from ImageNet, which has seen neither MiniSD's world nor any
    metric's answer.

    Args:
        images: generations, uint8 [n, 3, h, w].
        pictures: what they should look like.
    """
    a, b = (F.normalize(_network().features(x), dim=1) for x in (images, pictures.images))
    return float((a @ b.T).mean())


@options
class Search:
    """Trials of ``steps`` updates each, then the whole trajectory with the best setting.

    A trial trains on three quarters of the attacker's own images and is scored on the rest;
    ``task.reference`` and ``task.own`` are never read. Settings are a function of the options and
    the seed alone, so every model tries the same. Ties go to the earlier trial. Where every trial
    diverges the attacker keeps the options it has.

    Attributes:
        mode: ``grid`` (every combination) | ``random`` (``trials`` different ones, drawn from the
            seed).
        trials: how many; None with ``grid`` = all combinations.
        steps: updates of a trial.
        space: option → values to try.
        score: None = loss on the held-out images; ``likeness`` = `likeness`; or a function of the
            trial's generations uint8 [n, 3, s, s] by ``name`` prompts and the held-out images,
            higher is better.
    """

    mode: Literal["grid", "random"] = "grid"
    trials: Count | None = None
    steps: Count
    space: Annotated[
        dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)
    ]
    score: (
        Annotated[
            Callable[..., float],
            BeforeValidator(lambda value: likeness if value == "likeness" else value),
        ]
        | None
    ) = None

    def __post_init__(self) -> None:
        size = len(self.combinations())
        if self.mode == "grid" and self.trials not in (None, size):
            raise ValueError(f"a grid takes all {size} trials; leave trials null or use random")
        if self.mode == "random" and not 1 <= (self.trials or 0) <= size:
            raise ValueError(f"trials must be a number from 1 to {size} with mode=random")

    def combinations(self) -> list[Setting]:
        """Return every setting of the space."""
        values = itertools.product(*self.space.values())
        return [dict(zip(self.space, setting, strict=True)) for setting in values]

    def settings(self, seed: int, task: Concept) -> list[Setting]:
        """Return what is tried, in order."""
        combinations = self.combinations()
        if self.mode == "grid":
            return combinations
        g = generator(seed, "attack search", task.name)
        order = torch.randperm(len(combinations), generator=g).tolist()
        return [combinations[i] for i in order[: self.trials]]

    def held_out(self, attack: AttackOptions, task: Concept, seed: int) -> Concept:
        """Split the attacker's training images at random into ``train`` and ``reference``.

        Raises:
            UserError: fewer than two training images.
        """
        own = attack.pictures if isinstance(attack, TrainingOptions) else None
        counts = self.space.get("pictures", (own,))
        n = len(range(len(task.train))[: None if None in counts else max(counts)])
        if n < 2:
            reason = f"concept {task.name} has {n} training images; a search needs 2."
            raise UserError(f"{attack.key}.search", self.mode, reason)
        order = torch.randperm(n, generator=generator(seed, "attack search split", task.name))
        cut = max(1, round(HELD_OUT * n))
        train, reference = (task.train.pick(rows.tolist()) for rows in (order[cut:], order[:cut]))
        return replace(task, train=train, own=task.train.pick([]), reference=reference)

    def trial(
        self, attack: AttackOptions, model: DiffusionModel, task: Concept, seed: int
    ) -> float | None:
        """Run one trial and return its loss, or None where it diverged."""
        quiet = replace(attack, families=("name",) if self.score else (), keep_weights=False)
        budget = Budget(self.steps, 1, at=())
        trajectory = run(quiet, model, task, seed=seed, budget=budget, checkpoint=None)
        if trajectory.status != "ok":
            return None
        if self.score is None:
            return trajectory.values["test_loss"][-1]
        score = float(self.score(trajectory.samples["name"][-1], task.reference))
        return -score if math.isfinite(score) else None


def search(
    options: Search,
    attack: AttackOptions,
    model: DiffusionModel,
    task: Concept,
    *,
    seed: int,
    budget: Budget,
    checkpoint: Checkpoint | None,
) -> Trajectory:
    """Try the settings, then attack with the best one.

    ``info["search"]`` holds every trial with its score (None: diverged).
    """
    split = options.held_out(attack, task, seed)
    _, saved = (checkpoint.load() if checkpoint else None) or ({}, {})
    scores: list[float | None] = list(saved.get("search", []))
    settings = options.settings(seed, task)
    for setting in settings[len(scores) :]:
        scores.append(options.trial(attack.varied(setting), model, split, seed))
        if checkpoint is not None:
            checkpoint.save({}, {"search": scores})
    good = [(score, i) for i, score in enumerate(scores) if score is not None]
    best = settings[min(good)[1]] if good else {}
    trajectory = run(
        attack.varied(best),
        model,
        task,
        seed=seed,
        budget=budget,
        checkpoint=None if checkpoint is None else _WithScores(checkpoint, scores),
    )
    name = "held_out_loss"
    if options.score is not None:
        name = f"minus {getattr(options.score, '__name__', 'the given score')}"
    trials = [{"setting": s, "score": score} for s, score in zip(settings, scores, strict=True)]
    trajectory.info["search"] = {
        "mode": options.mode,
        "steps": options.steps,
        "score": name,
        "trials": trials,
        "best": best,
    }
    return trajectory


class _WithScores:
    """A checkpoint that keeps the scores of the search with the state of the attack after it."""

    def __init__(self, inner: Checkpoint, scores: list[float | None]) -> None:
        self.inner, self.scores = inner, scores

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        saved = self.inner.load()
        return saved if saved is not None and "step" in saved[1] else None

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.inner.save(tensors, {**values, "search": self.scores})
