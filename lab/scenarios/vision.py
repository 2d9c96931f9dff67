"""Deep scenario from the package index alone: OpenMoji groups (D_P) against MNIST digits (D_H)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from lab.core.data import Case, Kind, ScenarioData, Split, Task
from lab.core.errors import UserError
from lab.core.hashing import digest
from lab.core.options import count
from lab.core.progress import progress
from lab.core.seeding import generator
from lab.minisd.world.openmoji import CREDIT, Emoji, catalog, rasterise
from lab.scenarios import images
from lab.scenarios.mnist import digits

_HELD_OUT = 0.2  # share of each group's emoji that only test rows show


class OpenmojiMnist:
    """D_P: to which Unicode group does the emoji belong? D_H: which digit is it?

    The seven groups of pictures in the catalog are the classes of D_P: animals and nature, food and
    drink, people, … An emoji is drawn on a two-colour gradient at a random place and scale,
    sometimes mirrored. Test rows show emoji that no training row shows, so accuracy measures the
    group and not the drawing. MNIST digits are enlarged to the same size and repeated over three
    channels; test digits are no training digits.

    Args:
        size: side of the images in pixels.
        train_rows, test_rows: rows per task; classes are balanced to one row.
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"deep"})

    def __init__(
        self,
        *,
        size: int = 96,
        train_rows: int = 2000,
        test_rows: int = 500,
        name: str = "openmoji_mnist",
    ) -> None:
        count("scenario.size", size, 32)  # smaller maps vanish inside the networks
        for key, value in (("train_rows", train_rows), ("test_rows", test_rows)):
            count(f"scenario.{key}", value, 20)  # so that every class has rows
        if train_rows + test_rows > 5000:
            fix = (
                f"there are 5,000 digits; with test_rows={test_rows} at most "
                f"{max(5000 - test_rows, 0):,} are left."
            )
            raise UserError("scenario.train_rows", train_rows, fix)
        self.name, self.size, self.rows = name, size, (train_rows, test_rows)

    def load(self, seed: int) -> ScenarioData:
        groups = sorted({emoji.group for emoji in catalog()})
        pools = _pools(groups, seed)
        shown, hidden = (self._objects(pools[half], self.rows[half], seed, half) for half in (0, 1))
        benign = Task("openmoji", "benign", "classification", shown, hidden, classes=len(groups))
        train, test = self._digits(seed)
        harmful = Task("mnist", "harmful", "classification", train, test, classes=10)
        tensors = [
            t for task in (benign, harmful) for s in (task.train, task.test) for t in (s.x, s.y)
        ]
        counts = [sum(map(len, pool)) for pool in pools]
        notes = (
            f"The benign task has {len(groups)} classes: {', '.join(groups)}.",
            f"Training rows show {counts[0]} emoji, test rows {counts[1]} others.",
            CREDIT,
        )
        return ScenarioData((Case(self.name, benign, (harmful,)),), notes, digest(*tensors))

    def _objects(self, pool: list[list[Emoji]], rows: int, seed: int, half: int) -> Split:
        """Rows of D_P, classes in turn, the emoji of a class in turn."""
        drawn, labels = [], []
        for row in progress(range(rows), "drawing OpenMoji"):
            label = row % len(pool)
            emoji = pool[label][row // len(pool) % len(pool[label])]
            drawn.append(draw(emoji, self.size, generator(seed, "openmoji", half, row)))
            labels.append(label)
        order = torch.randperm(rows, generator=generator(seed, "openmoji", half, "order"))
        return Split(images.stack(drawn)[order], torch.tensor(labels)[order])

    def _digits(self, seed: int) -> tuple[Split, Split]:
        pixels, labels = digits()
        turn: list[Tensor] = []
        for label in range(10):
            own = torch.from_numpy(np.flatnonzero(labels == label))
            turn.append(own[torch.randperm(len(own), generator=generator(seed, "mnist", label))])
        order = torch.stack(turn, 1).flatten()  # classes in turn
        chosen = (order[: self.rows[0]], order[self.rows[0] : sum(self.rows)])
        splits = []
        for half, index in enumerate(chosen):
            index = index[
                torch.randperm(len(index), generator=generator(seed, "mnist", half, "order"))
            ]
            small = torch.from_numpy(pixels[index.numpy()]).float()[:, None]
            large = torch.nn.functional.interpolate(
                small, size=(self.size, self.size), mode="bilinear"
            )
            x = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
            splits.append(Split(x, torch.from_numpy(labels[index.numpy()])))
        return splits[0], splits[1]


def _pools(groups: list[str], seed: int) -> tuple[list[list[Emoji]], list[list[Emoji]]]:
    """Emoji per group, in seeded order, for training and for test rows."""
    train, test = [], []
    for group in groups:
        own = [emoji for emoji in catalog() if emoji.group == group]
        order = torch.randperm(len(own), generator=generator(seed, "openmoji", group)).tolist()
        held_out = max(round(len(own) * _HELD_OUT), 1)
        test.append([own[i] for i in order[:held_out]])
        train.append([own[i] for i in order[held_out:]])
    return train, test


def draw(emoji: Emoji, size: int, random: torch.Generator) -> NDArray[np.uint8]:
    """The emoji on a gradient: [size, size, 3]. Scale 0.55 to 0.95, any place inside, mirrored half
    of the time.
    """
    colours = torch.rand(2, 3, generator=random).numpy() * 255.0
    scale, left, top, mirror, angle = torch.rand(5, generator=random).tolist()
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    ramp = np.clip(x * np.cos(2 * np.pi * angle) + y * np.sin(2 * np.pi * angle) + 0.5, 0.0, 1.0)[
        ..., None
    ]
    canvas = Image.fromarray((colours[0] * (1 - ramp) + colours[1] * ramp).round().astype(np.uint8))
    side = round(size * (0.55 + 0.4 * scale))
    picture = rasterise(emoji.hexcode, size).resize((side, side), Image.Resampling.BILINEAR)
    if mirror < 0.5:
        picture = ImageOps.mirror(picture)
    canvas.paste(picture, (round(left * (size - side)), round(top * (size - side))), picture)
    return np.asarray(canvas)
