"""The one place where an attacker's learning rate, or any other option, is searched.

An attacker of a feature extractor searches the decimal exponent of its rate (`RateSearch`), an
attacker of a text-to-image model tries settings of its options (`Search`). Every model is searched
by itself, with equally many trials.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor

from lab.core.config import Count, options
from lab.core.data import CaptionedImages
from lab.core.seeding import generator
from lab.core.types import Checkpoint

Setting = dict[str, Any]
Trials = list[float | None]  # of the trials so far, lower is better; None: diverged


def run_trials(
    count: int,
    trial: Callable[[Trials], float | None],
    checkpoint: Checkpoint | None,
) -> tuple[Trials, Checkpoint | None]:
    """Run trials one after the other; those whose scores are in the checkpoint are not repeated.

    Args:
        trial: scores the next setting; receives the scores of the earlier ones.

    Returns:
        all scores, and the checkpoint of the attack that comes next, which keeps them.
    """
    _, saved = (checkpoint.load() if checkpoint else None) or ({}, {})
    scores: Trials = list(saved.get("search", []))
    while len(scores) < count:
        scores.append(trial(scores))
        if checkpoint is not None:
            checkpoint.save({}, {"search": scores})
    return scores, None if checkpoint is None else _WithScores(checkpoint, scores)


class _WithScores:
    """A checkpoint that keeps the scores of the search with the state of the attack after it."""

    def __init__(self, inner: Checkpoint, scores: Trials) -> None:
        self.inner, self.scores = inner, scores

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        saved = self.inner.load()
        return saved if saved is not None and "step" in saved[1] else None

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.inner.save(tensors, {**values, "search": self.scores})


class RateSearch:
    """Pattern search on the decimal exponent of the learning rate.

    A decade up and down from the centre, one neighbour further while the best one lies at the edge,
    then half as wide a step around the best one. A fixed grid of as many points would depend on the
    scale of the features, which an immunizer is free to change.

    Args:
        scores: of the trials so far, in the order in which it proposed them.

    Attributes:
        losses: exponent → loss of the trial; inf where it diverged.
        width: distance to the neighbours that are tried.
    """

    def __init__(self, scores: Trials) -> None:
        self.losses: dict[float, float] = {}
        self.width = 1.0
        for score in scores:
            self.losses[self.propose()] = math.inf if score is None else score

    @property
    def best(self) -> float:
        """The exponent with the lowest loss, the smaller one of equals."""
        return min(self.losses, key=lambda e: (self.losses[e], e), default=0.0)

    def propose(self) -> float:
        """Return the exponent to try next."""
        while True:
            neighbours = (self.best, self.best + self.width, self.best - self.width)
            for exponent in neighbours:
                if exponent not in self.losses:
                    return exponent
            self.width /= 2


@cache
def _network() -> Any:
    from lab.scorers.features import FeatureScorer

    return FeatureScorer(image_size=128)


def likeness(images: Tensor, wanted: CaptionedImages) -> float:
    """Compute the mean cosine similarity of the features of all generations and images, in [-1, 1].

    The network is EfficientNet-Lite0 from ImageNet, which has seen neither MiniSD's world nor any
    metric's answer.

    Args:
        images: generations, uint8 [n, 3, h, w].
        wanted: what they should look like.
    """
    a, b = (F.normalize(_network().features(x), dim=1) for x in (images, wanted.images))
    return float((a @ b.T).mean())


@options
class Search:
    """Trials of ``steps`` updates each, then the whole trajectory with the best setting. Without
    ``steps`` every setting is an attack of its own, run to the end, and the strongest counts.

    A trial trains on three quarters of the attacker's own images and is scored on the rest;
    ``task.reference`` and ``task.own`` are never read. Settings are a function of the options and
    the seed alone, so every model tries the same. Ties go to the earlier trial. Where every trial
    diverges the attacker keeps the options it has.

    Attributes:
        mode: ``grid`` (every combination) | ``random`` (``trials`` different ones, drawn from the
            seed).
        trials: how many; None with ``grid`` = all combinations.
        steps: updates of a trial; None: every setting is a whole attack.
        space: option → values to try.
        score: None = loss on the held-out images; ``likeness`` = `likeness`; or a function of the
            trial's generations uint8 [n, 3, s, s] by ``name`` prompts and the held-out images,
            higher is better.
    """

    mode: Literal["grid", "random"] = "grid"
    trials: Count | None = None
    steps: Count | None = None
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
        if self.steps is None and self.score is not None:
            raise ValueError("without steps every setting counts and nothing is scored")

    def combinations(self) -> list[Setting]:
        """Return every setting of the space."""
        values = itertools.product(*self.space.values())
        return [dict(zip(self.space, setting, strict=True)) for setting in values]

    def settings(self, seed: int, concept: str) -> list[Setting]:
        """Return what is tried, in order."""
        combinations = self.combinations()
        if self.mode == "grid":
            return combinations
        g = generator(seed, "attack search", concept)
        order = torch.randperm(len(combinations), generator=g).tolist()
        return [combinations[i] for i in order[: self.trials]]
