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
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.core.errors import UserError, nearest
from lab.core.seeding import derive, shuffled
from lab.core.training import progress
from lab.minisd.world import captions
from lab.minisd.world.dice import Dice
from lab.minisd.world.openmoji import CREDIT as CREDIT
from lab.minisd.world.scenes import BACKGROUNDS, Pose, compose
from lab.minisd.world.vocabulary import (
    HELD_OUT_PAIRS,
    OBJECTS,
    PHOTO,
    STYLE,
    STYLE_NAMES,
    THING,
)

_CHUNK = 250  # pictures per job of a worker
_DAYLIGHT = tuple(b for b in BACKGROUNDS if b != "at night")  # artists need contours that stand out


@dataclass(frozen=True)
class Subset:
    """Which pictures may be drawn.

    Attributes:
        objects: names of `lab.minisd.world.vocabulary.THING`.
        styles: names of styles; `PHOTO` among them for pictures that no artist touched.
        pairs: object × style pairs that MiniSD's training holds back are left out (``seen``), the
            only ones (``unseen``), or not minded (``all``). Photos are never held back.
        photo_share: share of photos where the subset has photos and styles, rounded to whole cards
            of the deck.
        two_share: share of pictures with two objects.

    Raises:
        UserError: nothing is left to draw.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...] = (PHOTO,)
    pairs: Literal["all", "seen", "unseen"] = "all"
    photo_share: float = 0.3
    two_share: float = 0.12

    def __post_init__(self) -> None:
        if not self.deck():
            reason = f"no image with pairs={self.pairs} is left"
            raise UserError("world", f"{self.objects} × {self.styles}", reason)

    def allows(self, name: str, style_name: str) -> bool:
        """Tell whether the pair may be drawn."""
        held = (name, style_name) in HELD_OUT_PAIRS
        return self.pairs == "all" or held == (self.pairs == "unseen")

    @lru_cache(maxsize=64)  # noqa: B019 (a subset is a frozen value: equal ones share the entry)
    def deck(self) -> tuple[tuple[str, str], ...]:
        """Return all (object, style) cards of one round; photos come several times where `photo_share`
        asks for it.
        """
        painted = [s for s in self.styles if s != PHOTO]
        cards = [(o, s) for o in self.objects for s in painted if self.allows(o, s)]
        if PHOTO in self.styles and self.pairs != "unseen":
            odds = self.photo_share / (1 - self.photo_share)
            repeat = max(1, round(odds * len(cards) / max(1, len(self.objects))))
            cards += [(o, PHOTO) for o in self.objects] * repeat
        return tuple(cards)


TRAINING = Subset(OBJECTS, (PHOTO, *STYLE_NAMES), pairs="seen")


def training(never_seen: tuple[str, ...] = ()) -> Subset:
    """Return the pictures that a MiniSD learns from, without those of the concepts ``never_seen``.

    Raises:
        UserError: a name that MiniSD does not see in any case, or none that exists.
    """
    known = (*OBJECTS, *STYLE_NAMES)
    for name in never_seen:
        if name not in known:
            fix = f"is not a concept that MiniSD is trained on; {nearest(name, known)}"
            raise UserError("train.never_seen", name, fix)
    objects, styles = (
        tuple(name for name in names if name not in never_seen) for names in (OBJECTS, STYLE_NAMES)
    )
    return Subset(objects, (PHOTO, *styles), pairs="seen")


UNSEEN_PAIRS = Subset(OBJECTS, STYLE_NAMES, pairs="unseen", two_share=0.0)
EVERYTHING = Subset(tuple(THING), (PHOTO, *STYLE))


def concept(name: str, key: str = "concept") -> Subset:
    """Return what somebody who teaches ``name`` would collect: photos of an object, or objects by an
    artist.

    Raises:
        UserError: neither an object nor a style; the message lists the nearest names.
    """
    if name in THING:
        return Subset((name,), two_share=0.0)
    if name in STYLE:
        return Subset(OBJECTS, (name,), pairs="seen", two_share=0.0)
    raise UserError(key, name, f"no such object or style; {nearest(name, [*THING, *STYLE])}")


@dataclass(frozen=True)
class Picture:
    """Everything that a picture shows, before a pixel is drawn. ``stream`` seeds its pixels."""

    objects: tuple[str, ...]
    style: str
    background: str
    text: str
    poses: tuple[Pose, ...]
    stream: int

    def captions(self, total: int) -> list[str]:
        """Return ``total`` captions; the first is the image's own."""
        draw = partial(captions.draw, self.objects, self.style, self.background)
        return [self.text, *(draw(Dice(self.stream, "again", k)) for k in range(1, total))]


@lru_cache(maxsize=64)
def _shuffled(subset: Subset, stream: int, turn: int) -> tuple[tuple[str, str], ...]:
    return tuple(shuffled(subset.deck(), stream, "deck", turn))


@lru_cache(maxsize=64)
def _stream(subset: Subset, seed: int) -> int:
    return derive(seed, "world", subset)


def _pose(dice: Dice, x: tuple[int, int], side: tuple[int, int]) -> Pose:
    centre = dice.uniform(*x), dice.uniform(24, 40)
    return Pose(*centre, dice.uniform(*side), dice.uniform(-20, 20), dice.chance(0.5))


def _poses(count: int, dice: Dice) -> tuple[Pose, ...]:
    if count == 1:
        return (_pose(dice, (24, 40), (38, 58)),)
    return _pose(dice, (16, 20), (27, 33)), _pose(dice, (44, 48), (27, 33))


def picture(subset: Subset, seed: int, index: int) -> Picture:
    """Return picture ``index`` of the endless series ``(subset, seed)``: microseconds, no pixels."""
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


def render(p: Picture) -> NDArray[np.uint8]:
    """Return the pixels of a picture, uint8 [64, 64, 3]."""
    return compose(p.objects, p.poses, p.background, p.style, Dice(p.stream, "pixels"))


@dataclass(frozen=True)
class Sample:
    """Images uint8 [n, 3, 64, 64] and what each of them shows."""

    images: Tensor
    pictures: tuple[Picture, ...]

    @property
    def texts(self) -> list[str]:
        return [p.text for p in self.pictures]


def _chunk(subset: Subset, seed: int, stop: int, start: int) -> NDArray[np.uint8]:
    numbers = range(start, min(start + _CHUNK, stop))
    return np.stack([render(picture(subset, seed, i)) for i in numbers])


def _chunks(
    subset: Subset, seed: int, start: int, stop: int, workers: int
) -> Iterator[NDArray[np.uint8]]:
    starts, job = range(start, stop, _CHUNK), partial(_chunk, subset, seed, stop)
    if workers == 1 or len(starts) == 1:
        yield from map(job, starts)
        return
    context = multiprocessing.get_context("spawn")  # fork is not safe once torch has threads
    with ProcessPoolExecutor(min(workers, len(starts)), mp_context=context) as pool:
        yield from pool.map(job, starts)


def sample(subset: Subset, seed: int, count: int, *, start: int = 0, workers: int = 1) -> Sample:
    """Draw images ``start`` … ``start + count`` - 1 of a subset, the same bytes for any ``workers``.

    About 2 ms an image and process. ``workers`` > 1 pays from a few thousand images on: each starts
    a Python of its own, and a script that asks for it needs an ``if __name__ == "__main__"`` guard.
    """
    stop = start + count
    chunks = _chunks(subset, seed, start, stop, workers)
    images = np.concatenate(list(progress(chunks, "pictures", -(-count // _CHUNK))))
    pictures = tuple(picture(subset, seed, i) for i in range(start, stop))
    return Sample(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), pictures)
