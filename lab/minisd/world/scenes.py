"""Compose a picture: a background, one object or two in some pose, light, and an artist's hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lab.minisd.world import openmoji
from lab.minisd.world.dice import Dice, Field
from lab.minisd.world.styles import SIZE, blur, smooth_noise
from lab.minisd.world.vocabulary import PHOTO, STYLE, THING

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]
_SPRITE = 112  # pixels at which artwork is rasterised before it is shrunk into its pose


@dataclass(frozen=True)
class Pose:
    """Where an object stands: centre and long side in pixels, angle in degrees, mirrored or not."""

    x: float
    y: float
    side: float
    angle: float
    mirror: bool


@cache
def _sprite(name: str) -> Image.Image:
    """The artwork, cropped to what is drawn, premultiplied so that resizing leaves no fringe."""
    picture = openmoji.rasterise(openmoji.by_name()[THING[name].emoji].hexcode, _SPRITE)
    return picture.crop(picture.getbbox()).convert("RGBa")


def _start(centre: float, length: int) -> int:
    """Where a stretch begins: around its centre, moved so that it lies in the picture if it
    fits.
    """
    begin = round(centre - length / 2)
    return max(min(begin, SIZE - length), 0) if length <= SIZE else (SIZE - length) // 2


def _place(name: str, pose: Pose) -> tuple[Field, Field]:
    """Premultiplied colour [SIZE, SIZE, 3] and coverage [SIZE, SIZE] of one object."""
    sprite = _sprite(name)
    scale = pose.side / max(sprite.size)
    width, height = (max(1, round(edge * scale)) for edge in sprite.size)
    sprite = sprite.resize((width, height), Image.Resampling.BICUBIC)
    if pose.mirror:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = sprite.rotate(pose.angle, Image.Resampling.BICUBIC, expand=True)
    canvas = Image.new("RGBa", (SIZE, SIZE))
    canvas.paste(sprite, (_start(pose.x, sprite.width), _start(pose.y, sprite.height)))
    pixels = np.asarray(canvas, np.float32) * np.float32(1 / 255)
    return pixels[..., :3], pixels[..., 3]


def _ramp(top: object, low: object) -> Field:
    a, b = np.asarray(top, np.float32), np.asarray(low, np.float32)
    t = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    return np.broadcast_to(a + (b - a) * t, (SIZE, SIZE, 3)).copy()


def _tint(dice: Dice, base: Colour, spread: float = 0.06) -> Field:
    return np.asarray(base, np.float32) + (dice.grid(3) - 0.5) * 2 * spread


def _landscape(
    dice: Dice,
    sky: tuple[Colour, Colour],
    ground: tuple[Colour, Colour],
    rough: float,
    spread: tuple[float, float] = (0.06, 0.06),
) -> Field:
    """Paint two areas, each from its upper to its lower colour, that meet at a wavy horizon.

    Args:
        rough: of the ground. spread: of the ground's two colours.
    """
    upper = _ramp(_tint(dice, sky[0]), _tint(dice, sky[1]))
    lower = _ramp(_tint(dice, ground[0], spread[0]), _tint(dice, ground[1], spread[1]))
    line = dice.uniform(30, 46) + 5 * (smooth_noise(dice, 4)[:1] - 0.5)
    below = np.clip(np.arange(SIZE, dtype=np.float32)[:, None] - line, 0, 1)[..., None]
    lower = lower + rough * (smooth_noise(dice, 16)[..., None] - 0.5)
    return upper * (1 - below) + lower * below


def _studio(dice: Dice) -> Field:
    hue = dice.grid(3) * 0.55 + 0.4
    return _ramp(hue, hue * dice.uniform(0.7, 1.05))


def _clouds(dice: Dice) -> Field:
    sky = _ramp(_tint(dice, (0.30, 0.58, 0.90)), _tint(dice, (0.68, 0.85, 0.98)))
    cover = np.clip((smooth_noise(dice, 6) - 0.52) * 5, 0, 1)[..., None]
    return sky + (0.98 - sky) * cover * 0.9


def _night(dice: Dice) -> Field:
    sky = _ramp(_tint(dice, (0.08, 0.09, 0.25), 0.03), _tint(dice, (0.24, 0.26, 0.48), 0.04))
    stars = (dice.grid(SIZE, SIZE) > 0.988).astype(np.float32)[..., None]
    return sky + (0.95 - sky) * stars


def _room(dice: Dice) -> Field:
    wall = np.broadcast_to(_tint(dice, (0.80, 0.74, 0.66), 0.14), (SIZE, SIZE, 3)).copy()
    stripe = np.arange(SIZE) % 12 < 6
    wall[:, stripe] *= 0.93
    floor = _ramp(_tint(dice, (0.62, 0.42, 0.26)), _tint(dice, (0.48, 0.31, 0.18)))
    floor[np.arange(SIZE) % 5 == 0] *= 0.88
    line = int(dice.uniform(42, 52))
    return np.concatenate([wall[:line], floor[line:]])


# name in captions: how it is painted
BACKGROUNDS: dict[str, Callable[[Dice], Field]] = {
    "on a plain background": _studio,
    "in a meadow": partial(
        _landscape,
        sky=((0.52, 0.75, 0.95), (0.85, 0.93, 0.98)),
        ground=((0.45, 0.68, 0.28), (0.30, 0.52, 0.18)),
        rough=0.25,
    ),
    "at the beach": partial(
        _landscape,
        sky=((0.70, 0.90, 0.98), (0.18, 0.58, 0.75)),
        ground=((0.95, 0.87, 0.66), (0.88, 0.76, 0.52)),
        rough=0.12,
    ),
    "in the snow": partial(
        _landscape,
        sky=((0.62, 0.70, 0.80), (0.82, 0.87, 0.92)),
        ground=((0.97, 0.98, 1.0), (0.86, 0.91, 0.97)),
        rough=0.06,
        spread=(0.02, 0.03),
    ),
    "in the sky": _clouds,
    "at night": _night,
    "in a room": _room,
}


def _shadow(mask: Field) -> Field:
    """What the object takes from the light on the ground below and beside it."""
    return np.pad(blur(mask, 2.5), ((3, 0), (2, 0)))[:-3, :-2]


def compose(
    objects: tuple[str, ...], poses: tuple[Pose, ...], background: str, style_name: str, dice: Dice
) -> NDArray[np.uint8]:
    """The finished picture, uint8 [SIZE, SIZE, 3]."""
    rgb = np.clip(BACKGROUNDS[background](dice), 0, 1)
    mask = np.zeros((SIZE, SIZE), np.float32)
    layers = [_place(name, pose) for name, pose in zip(objects, poses, strict=True)]
    for colour, cover in layers:
        if style_name == PHOTO:
            rgb = rgb * (1 - 0.45 * _shadow(cover) * (1 - cover))[..., None]
        rgb = rgb * (1 - cover[..., None]) + colour
        mask = np.maximum(mask, cover)
    paint = _light if style_name == PHOTO else STYLE[style_name].paint
    rgb = paint(rgb, mask, dice)
    return np.round(np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def _light(rgb: Field, mask: Field, dice: Dice) -> Field:
    """A lamp from above to one side, its colour, and a little grain: what makes a photo of flat
    artwork.
    """
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) / (SIZE - 1) - 0.5
    side = dice.uniform(-0.25, 0.25)
    lamp = 1.02 + side * x - 0.22 * y
    warm = np.array([1, 1, 1], np.float32) + np.array([0.06, 0, -0.06], np.float32) * dice.uniform(
        -1, 1
    )
    body = blur(mask, 3.0)
    relief = 1 + 0.5 * (body - np.roll(body, (2, 2), (0, 1))) * mask
    grain = (dice.grid(SIZE, SIZE, 1) - 0.5) * 0.03
    return rgb * (lamp * relief)[..., None] * warm + grain
