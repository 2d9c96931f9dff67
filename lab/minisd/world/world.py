"""The world: pictures of real artwork, drawn without end from a seed.

Artwork: OpenMoji (https://openmoji.org), CC BY-SA 4.0; pictures made from it carry the same licence
(`CREDIT`).

A picture is fixed by (subset, seed, index) alone: the same bytes in any order, in any number of
processes. Pictures of a subset run through a shuffled deck of all its object × style pairs, so that
even twenty pictures of a style show twenty different objects.

    images = sample(TRAINING, seed=0, count=20_000, workers=2)
    unicorns = sample(concept("unicorn"), seed=7, count=20)
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.core.errors import UserError, nearest
from lab.core.seeding import derive, generator
from lab.core.training import progress
from lab.minisd.world import captions, folders
from lab.minisd.world.dice import Dice
from lab.minisd.world.openmoji import CREDIT
from lab.minisd.world.scenes import BACKGROUNDS, SIZE, Pose, compose
from lab.minisd.world.vocabulary import (
    HELD_OUT_PAIRS,
    OBJECTS,
    PHOTO,
    STYLE_NAMES,
    STYLES,
    THINGS,
    style,
    thing,
)

__all__ = [
    "CREDIT",
    "EVERYTHING",
    "TRAINING",
    "UNSEEN_PAIRS",
    "Picture",
    "Sample",
    "Subset",
    "concept",
    "picture",
]
__all__ += ["render", "sample"]

_CHUNK = 250  # pictures per job of a worker
_DAYLIGHT = tuple(b for b in BACKGROUNDS if b != "at night")  # artists need contours that stand out


@dataclass(frozen=True)
class Subset:
    """Which pictures may be drawn.

    Attributes:
        objects: names of `lab.minisd.world.vocabulary.THINGS`.
        styles: names of styles; `PHOTO` among them for pictures that no artist touched.
        pairs: object × style pairs that MiniSD's training holds back are left out (``seen``), the
            only ones (``unseen``), or not minded (``all``). Photos are never held back.
        photo_share: share of photos where the subset has photos and styles, rounded to whole cards
            of the deck.
        two_share: share of pictures with two objects.

    Raises:
        UserError: an unknown name (with the nearest ones), a share outside [0, 1), or nothing left
            to draw.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...] = (PHOTO,)
    pairs: Literal["all", "seen", "unseen"] = "all"
    photo_share: float = 0.3
    two_share: float = 0.12

    def __post_init__(self) -> None:
        for name in self.objects:
            thing(name, "world.objects")
        for name in self.styles:
            if name != PHOTO:
                style(name, "world.styles")
        for key in ("photo_share", "two_share"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"world.{key}", getattr(self, key), "must be ≥ 0 and < 1")
        if self.pairs not in ("all", "seen", "unseen"):
            raise UserError("world.pairs", self.pairs, "choose one of all, seen, unseen")
        if not self.deck():
            raise UserError(
                "world",
                f"{self.objects} × {self.styles}",
                f"no picture with pairs={self.pairs} is left",
            )

    def allows(self, name: str, style_name: str) -> bool:
        """Whether the pair may be drawn."""
        held = (name, style_name) in HELD_OUT_PAIRS
        return self.pairs == "all" or held == (self.pairs == "unseen")

    @lru_cache(maxsize=64)  # noqa: B019 (a subset is a frozen value: equal ones share the entry)
    def deck(self) -> tuple[tuple[str, str], ...]:
        """All (object, style) cards of one round; photos come several times where `photo_share`
        asks for it.
        """
        painted = [s for s in self.styles if s != PHOTO]
        cards = [(o, s) for o in self.objects for s in painted if self.allows(o, s)]
        if PHOTO in self.styles and self.pairs != "unseen":
            odds = self.photo_share / (1 - self.photo_share)
            repeat = (
                max(1, round(odds * len(cards) / len(self.objects)))
                if cards and self.objects
                else 1
            )
            cards += [(o, PHOTO) for o in self.objects] * repeat
        return tuple(cards)


TRAINING = Subset(OBJECTS, (PHOTO, *STYLE_NAMES), pairs="seen")
UNSEEN_PAIRS = Subset(OBJECTS, STYLE_NAMES, pairs="unseen", two_share=0.0)
EVERYTHING = Subset(tuple(t.name for t in THINGS), (PHOTO, *(s.name for s in STYLES)))


def concept(name: str, key: str = "concept") -> Subset:
    """What somebody who wants to teach ``name`` would collect: photos of an object, or objects by
    an artist.

    Raises:
        UserError: neither an object nor a style; the message lists the nearest names.
    """
    things, artists = [t.name for t in THINGS], [s.name for s in STYLES]
    if name in things:
        return Subset((name,), two_share=0.0)
    if name in artists:
        return Subset(OBJECTS, (name,), pairs="seen", two_share=0.0)
    raise UserError(key, name, f"no such object or style; {nearest(name, things + artists)}")


@dataclass(frozen=True)
class Picture:
    """Everything that a picture shows, before a pixel is drawn. ``stream`` seeds its pixels."""

    objects: tuple[str, ...]
    style: str
    background: str
    text: str
    poses: tuple[Pose, ...]
    stream: int

    def row(self) -> dict[str, str]:
        """Its line of ``metadata.csv`` (without ``file_name``)."""
        return {
            "text": self.text,
            "object": self.objects[0],
            "style": self.style,
            "category": thing(self.objects[0]).category,
            "second": self.objects[1] if len(self.objects) > 1 else "",
            "background": self.background,
        }


@lru_cache(maxsize=64)
def _shuffled(subset: Subset, stream: int, turn: int) -> tuple[tuple[str, str], ...]:
    deck = subset.deck()
    order = torch.randperm(len(deck), generator=generator(stream, "deck", turn)).tolist()
    return tuple(deck[i] for i in order)


@lru_cache(maxsize=64)
def _stream(subset: Subset, seed: int) -> int:
    return derive(seed, "world", subset)


def _poses(count: int, dice: Dice) -> tuple[Pose, ...]:
    angle = partial(dice.uniform, -20, 20)
    if count == 1:
        return (
            Pose(
                dice.uniform(24, 40),
                dice.uniform(24, 40),
                dice.uniform(38, 58),
                angle(),
                dice.chance(0.5),
            ),
        )
    left = Pose(
        dice.uniform(16, 20), dice.uniform(24, 40), dice.uniform(27, 33), angle(), dice.chance(0.5)
    )
    right = Pose(
        dice.uniform(44, 48), dice.uniform(24, 40), dice.uniform(27, 33), angle(), dice.chance(0.5)
    )
    return (left, right)


def picture(subset: Subset, seed: int, index: int) -> Picture:
    """Picture number ``index`` of the endless series ``(subset, seed)``; microseconds, no
    pixels.
    """
    stream = _stream(subset, seed)
    cards = len(subset.deck())
    name, style_name = _shuffled(subset, stream, index // cards)[index % cards]
    own = derive(stream, index)
    dice = Dice(own, "scene")
    objects: tuple[str, ...] = (name,)
    if dice.chance(subset.two_share):
        others = [o for o in subset.objects if subset.allows(o, style_name) or style_name == PHOTO]
        objects = (name, name if dice.chance(0.5) else dice.pick(others))
    background = dice.pick(tuple(BACKGROUNDS) if style_name == PHOTO else _DAYLIGHT)
    text = captions.draw(objects, style_name, background, dice)
    return Picture(objects, style_name, background, text, _poses(len(objects), dice), own)


def render(shown: Picture) -> NDArray[np.uint8]:
    """The pixels of a picture, uint8 [64, 64, 3]."""
    return compose(
        shown.objects, shown.poses, shown.background, shown.style, Dice(shown.stream, "pixels")
    )


@dataclass(frozen=True)
class Sample:
    """Images uint8 [n, 3, 64, 64] and what each of them shows."""

    images: Tensor
    pictures: tuple[Picture, ...]

    @property
    def texts(self) -> list[str]:
        return [p.text for p in self.pictures]

    def write(self, folder: str | Path) -> Path:
        """An ordinary image folder with ``metadata.csv`` and the artwork's credit
        (`lab.minisd.world.folders.write`).
        """
        return folders.write(folder, self.images, [p.row() for p in self.pictures], credit=CREDIT)


def _chunk(subset: Subset, seed: int, bounds: tuple[int, int]) -> NDArray[np.uint8]:
    return np.stack([render(picture(subset, seed, i)) for i in range(*bounds)])


def _chunks(
    subset: Subset, seed: int, jobs: list[tuple[int, int]], workers: int
) -> Iterator[NDArray[np.uint8]]:
    job = partial(_chunk, subset, seed)
    if workers == 1 or len(jobs) == 1:
        yield from map(job, jobs)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # fork is not safe once torch has started its threads
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        yield from pool.map(job, jobs)


def sample(subset: Subset, seed: int, count: int, *, start: int = 0, workers: int = 1) -> Sample:
    """Pictures ``start`` … ``start + count`` of a subset, the same bytes for any ``workers``.

    About 2 ms a picture and process. ``workers`` > 1 pays from a few thousand pictures on: each
    starts a Python of its own, and a script that asks for it needs an ``if __name__ == "__main__"``
    guard.

    Raises:
        UserError: ``count`` or ``workers`` below 1, ``start`` below 0.
    """
    for key, value, least in (("count", count, 1), ("workers", workers, 1), ("start", start, 0)):
        if value < least:
            raise UserError(f"world.{key}", value, f"must be ≥ {least}")
    jobs = [(i, min(i + _CHUNK, start + count)) for i in range(start, start + count, _CHUNK)]
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    done = 0
    for part in progress(_chunks(subset, seed, jobs, workers), "pictures", len(jobs)):
        images[done : done + len(part)] = part
        done += len(part)
    shown = tuple(picture(subset, seed, i) for i in range(start, start + count))
    return Sample(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), shown)
