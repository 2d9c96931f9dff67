"""What the scorers of MiniSD learn from: recipe, pictures, labels, captions.

They learn from the same world as MiniSD, from other pictures of it, and from all objects and
styles, those that MiniSD never sees included. Pictures with two objects are left out: the second
would have no label.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from lab.core.config import Count, options
from lab.core.seeding import derive
from lab.minisd.train.loop import Schedule
from lab.minisd.world import captions
from lab.minisd.world.dice import Dice
from lab.minisd.world.scenes import BACKGROUNDS, compose
from lab.minisd.world.vocabulary import CATEGORIES, PHOTO
from lab.minisd.world.world import EVERYTHING, Sample, sample
from lab.scorers.detector import Head
from lab.scorers.networks import ClipWidths

WORLD = replace(EVERYTHING, two_share=0.0)
NAMES: dict[Head, tuple[str, ...]] = {"object": WORLD.objects, "style": WORLD.styles}
PARTS = ("train", "calibrate", "measure")
# 2 × 256 bytes, start, end, and at least one merge
Vocabulary = Annotated[int, Field(strict=True, ge=515)]
ShareBelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]


@options
class ScorerRecipe:
    """Everything but the seed that determines the scorers.

    Attributes:
        pictures: training pictures; ``calibrate`` and ``measure`` more, disjoint from these and
            from each other.
        empty: pictures of a scene without an object, never shown with a label of one.
        captions: captions drawn per picture.
        vocabulary: tokens of CLIP's tokenizer at most.
        smoothing: label smoothing of the detector.
        empty_share: share of a detector's batch that shows no object.
        width: of the detector (`lab.scorers.networks.DetectorNetwork`).
    """

    pictures: Count
    calibrate: Count
    measure: Count
    empty: Count
    captions: Count
    vocabulary: Vocabulary
    smoothing: ShareBelowOne
    empty_share: ShareBelowOne
    clip: Schedule
    detector: Schedule
    clip_widths: ClipWidths = field(default_factory=ClipWidths)
    width: Count = 32
    workers: Count = 1


@dataclass(frozen=True)
class Labelled:
    """Images uint8 [n, 3, 64, 64] and class indices [n] into `NAMES`; object −1: there is none."""

    images: Tensor
    object: Tensor
    style: Tensor

    @property
    def labels(self) -> dict[Head, Tensor]:
        return {"object": self.object, "style": self.style}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Labelled:
        return Labelled(self.images[index], self.object[index], self.style[index])


def seed_of(seed: int) -> int:
    """The scorers' seed of a recipe's seed: their pictures and weights share nothing with
    MiniSD's.
    """
    return derive(seed, "judges")  # the label of the shipped weights


def pictures(recipe: ScorerRecipe, seed: int, part: str) -> Sample:
    """The pictures of ``train``, ``calibrate`` or ``measure``: three stretches of one series,
    disjoint.
    """
    sizes = [recipe.pictures, recipe.calibrate, recipe.measure]
    place = PARTS.index(part)
    return sample(
        WORLD, seed_of(seed), sizes[place], start=sum(sizes[:place]), workers=recipe.workers
    )


def labelled(shown: Sample) -> Labelled:
    """Images and labels of a sample of `WORLD`."""
    objects = torch.tensor([NAMES["object"].index(p.objects[0]) for p in shown.pictures])
    styles = torch.tensor([NAMES["style"].index(p.style) for p in shown.pictures])
    return Labelled(shown.images, objects, styles)


def empty_scenes(seed: int, number_: int, part: str = "train") -> Labelled:
    """Scenes without an object, in every style: what a detector must see nothing in."""
    images, styles = [], []
    for i in range(number_):
        dice = Dice(seed_of(seed), "empty", part, i)
        style, background = dice.pick(NAMES["style"]), dice.pick(tuple(BACKGROUNDS))
        images.append(torch.from_numpy(compose((), (), background, style, dice)))
        styles.append(NAMES["style"].index(style))
    stack = torch.stack(images).permute(0, 3, 1, 2).contiguous()
    return Labelled(stack, torch.full((number_,), -1), torch.tensor(styles))


def texts(shown: Sample, each: int) -> list[list[str]]:
    """``each`` captions for every picture; the first is the picture's own."""
    found = []
    for p in shown.pictures:
        draw = partial(captions.draw, p.objects, p.style, p.background)
        found.append([p.text, *(draw(Dice(p.stream, "again", k)) for k in range(1, each))])
    return found


def class_prompts(head: Head, style: str | None = PHOTO) -> dict[str, list[str]]:
    """Prompts of every class, for zero-shot classification by an ensemble (arXiv 2103.00020
    §3.1.4).

    Args:
        head: ``object``: every object in ``style`` (None: in every style), by the artist's name;
            ``style``: class words ("an animal") in every style, by name and by description.
    """
    if head == "style":
        nouns = [captions.article(category) for category in CATEGORIES]
        ways: dict[str, tuple[captions.By, ...]] = {
            s: ("name", "description") for s in NAMES["style"]
        }
        ways[PHOTO] = ("name",)  # a photo has no artist
        return {
            s: [t for it in nouns for by in ways[s] for t in captions.prompts(it, s, by)]
            for s in ways
        }
    styles = NAMES["style"] if style is None else (style,)
    return {
        o: [t for s in styles for t in captions.prompts(captions.noun(o), s)]
        for o in NAMES["object"]
    }
