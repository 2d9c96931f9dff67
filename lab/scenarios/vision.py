"""Image classification: OpenMoji groups (D_P) against MNIST digits and subgroups of other groups
(D_H), from the package index alone, and any two image folders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field

from lab.core.config import Names, Text, config
from lab.core.data import Kind, Role, ScenarioData, Split, Task
from lab.core.errors import UserError, as_user_error, nearest
from lab.core.images import SUFFIXES, read_image, stack
from lab.core.seeding import generator, hold_out, shuffled
from lab.core.training import progress
from lab.core.types import Scenario
from lab.minisd.world.openmoji import CREDIT, Emoji, catalog, rasterise
from lab.models.vision import ImageSize
from lab.scenarios.mnist import CREDIT as MNIST_CREDIT
from lab.scenarios.mnist import digits, shuffled_digits
from lab.scenarios.tabular import TestShare, case_of_tasks

_HELD_OUT = 0.2  # share of each group's emoji that only test rows show
_DIGITS = "digits"
_FEWEST = 10  # emoji of a subgroup: two are held out
Files = Mapping[str, Sequence[Path]]


def classes(folder: Path, key: str) -> Files:
    """Return class name → image files, both sorted. Hidden folders and folders without an image are
    left out.

    Raises:
        UserError: no such folder, or fewer than two classes with images.
    """
    with as_user_error(key, folder, "cannot be read."):
        folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        images = {
            f.name: sorted(p for p in f.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            for f in folders
        }
    files = {name: paths for name, paths in images.items() if paths}
    if len(files) < 2:
        fix = (
            f"has images of {len(files)} classes, and a task needs two: expected "
            f"{folder.name}/CLASS/FILE ending in {', '.join(sorted(SUFFIXES))}."
        )
        raise UserError(key, folder, fix)
    return files


@config
class ImageFolders(Scenario):
    """Two classification tasks from two folders.

    A folder with the subfolders ``train`` and ``val`` (or ``test``) keeps that split; any other is
    split by seed. No more than ``train_rows`` and ``test_rows`` images are read, classes in turn,
    so that a folder as large as ImageNet is sampled and not loaded. Images are made upright, put
    over white, cropped to the centred square.

    Args:
        benign_path, harmful_path: folders, required.
        size: side of the images in pixels.
        train_rows, test_rows: at most this many rows per task.
        test_share: held-out share of each class where the folder has no split of its own.
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"deep"})
    benign_path: Annotated[Text, Field(min_length=1)]
    harmful_path: Annotated[Text, Field(min_length=1)]
    benign_name: Text = "benign"
    harmful_name: Text = "harmful"
    size: ImageSize = 224
    train_rows: Annotated[int, Field(strict=True, ge=4)] = 2000
    test_rows: Annotated[int, Field(strict=True, ge=2)] = 500
    test_share: TestShare = 0.2
    name: Text = "image_folders"

    def __post_init__(self) -> None:
        if self.benign_name == self.harmful_name:
            fix = "must differ from scenario.benign_name."
            raise UserError("scenario.harmful_name", self.harmful_name, fix)

    def load(self, seed: int) -> ScenarioData:
        benign, first = self._task("benign", self.benign_name, self.benign_path, seed)
        harmful, second = self._task("harmful", self.harmful_name, self.harmful_path, seed)
        return case_of_tasks(self.name, (benign, harmful), (first, second))

    def _task(self, role: Role, name: str, path: str, seed: int) -> tuple[Task, str]:
        """Return the task and a note on its images."""
        key = f"scenario.{role}_path"
        train, test = self._halves(Path(path).expanduser(), key, seed)
        labels = {label: index for index, label in enumerate(sorted(train))}
        splits = [
            self._read(files, labels, limit, seed, f"{role}/{half}", key)
            for files, limit, half in (
                (train, self.train_rows, "train"),
                (test, self.test_rows, "test"),
            )
        ]
        total, read = sum(map(len, [*train.values(), *test.values()])), sum(map(len, splits))
        note = f"{len(labels)} classes; {read} of {total} images were read."
        task = Task(name, role, "classification", splits[0], splits[1], len(labels))
        return task, f"The {role} task {name} has {note}"

    def _halves(self, folder: Path, key: str, seed: int) -> tuple[Files, Files]:
        held_out = next((folder / n for n in ("val", "test") if (folder / n).is_dir()), None)
        if (folder / "train").is_dir() and held_out is not None:
            train, test = classes(folder / "train", key), classes(held_out, key)
            if surplus := sorted(set(test) - set(train)):
                fix = f"has the class {surplus[0]}, which {folder / 'train'} lacks."
                raise UserError(key, held_out, fix)
            return {k: shuffled(v, seed, "files", key, k) for k, v in train.items()}, test
        halves = {}
        for label, files in classes(folder, key).items():
            if len(files) < 2:
                fix = f"has a single image in the class {label}; training and test need one each."
                raise UserError(key, folder, fix)
            halves[label] = hold_out(shuffled(files, seed, "files", key, label), self.test_share)
        return {k: train for k, (train, _) in halves.items()}, {
            k: test for k, (_, test) in halves.items()
        }

    def _read(
        self, files: Files, labels: dict[str, int], limit: int, seed: int, half: str, key: str
    ) -> Split:
        """Return up to ``limit`` images, the first of every class, then the second, …, in seeded
        order.
        """
        turns = [(n, labels[c], path) for c in files for n, path in enumerate(files[c])]
        chosen = sorted(turns, key=lambda t: t[:2])[:limit]
        chosen = shuffled(chosen, seed, self.name, half, "order")
        pixels = [read_image(t[2], self.size, key) for t in progress(chosen, f"reading {half}")]
        return Split(stack(pixels), torch.tensor([t[1] for t in chosen]))


@config
class OpenmojiMnist(Scenario):
    """D_P: to which Unicode group does the emoji belong? D_H: which digit is it, or to which
    subgroup of one group does the emoji belong?

    The seven groups of images in the catalog are the classes of D_P: animals and nature, food and
    drink, people, … An emoji is drawn on a two-colour gradient at a random place and scale,
    sometimes mirrored. Test rows show emoji that no training row shows, so accuracy measures the
    group and not the drawing. MNIST digits are enlarged to the same size and repeated over three
    channels; test digits are no training digits. A group that is a harmful task is left out of D_P;
    its subgroups with at least ten emoji are the classes of D_H, drawn in the same way.

    Args:
        harmful: one task or several: ``digits``, or the name of a group, e.g. ``animals-nature``.
        size: side of the images in pixels.
        train_rows, test_rows: rows per task; classes are balanced to one row.
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"deep"})
    size: ImageSize = 96
    train_rows: Annotated[int, Field(strict=True, ge=20)] = 2000  # so that every class has rows
    test_rows: Annotated[int, Field(strict=True, ge=20)] = 500
    harmful: Annotated[Names, Field(min_length=1)] = (_DIGITS,)
    name: Text = "openmoji_mnist"

    def __post_init__(self) -> None:
        choices = {_DIGITS, *(emoji.group for emoji in catalog())}
        for name in self.harmful:
            if name not in choices:
                raise UserError("scenario.harmful", name, nearest(name, choices))
        if len({*self.harmful}) < len(self.harmful):
            raise UserError("scenario.harmful", self.harmful, "names a task twice.")
        if _DIGITS in self.harmful and self.train_rows + self.test_rows > 5000:
            fix = f"there are 5,000 digits, and test_rows={self.test_rows}; lower one of both."
            raise UserError("scenario.train_rows", self.train_rows, fix)

    def load(self, seed: int) -> ScenarioData:
        groups = sorted({emoji.group for emoji in catalog()} - {*self.harmful})
        benign, notes = self._emoji_task("openmoji", "benign", groups, "group", seed)
        tasks = [benign]
        for harmful in self.harmful:
            if harmful == _DIGITS:
                train, test = self._digits(seed)
                tasks.append(Task("mnist", "harmful", "classification", train, test, classes=10))
                continue
            sizes = Counter(e.subgroup for e in catalog() if e.group == harmful)
            large = sorted(name for name, size in sizes.items() if size >= _FEWEST)
            task, more = self._emoji_task(harmful, "harmful", large, "subgroup", seed)
            tasks.append(task)
            notes += more
        credit = MNIST_CREDIT if _DIGITS in self.harmful else ScenarioData.credit
        return case_of_tasks(self.name, tasks, (*notes, CREDIT), credit)

    def _emoji_task(
        self, name: str, role: Role, classes: list[str], level: str, seed: int
    ) -> tuple[Task, tuple[str, ...]]:
        """Return a task whose ``classes`` are values of ``level`` in the catalog, and notes."""
        pools = _pools(classes, seed, level)
        rows = (self.train_rows, self.test_rows)
        shown, hidden = (self._objects(pools[h], rows[h], seed, name, h) for h in (0, 1))
        counts = [sum(map(len, pool)) for pool in pools]
        notes = (
            f"The {role} task has {len(classes)} classes: {', '.join(classes)}.",
            f"Training rows show {counts[0]} emoji, test rows {counts[1]} others.",
        )
        return Task(name, role, "classification", shown, hidden, classes=len(classes)), notes

    def _objects(
        self, pool: Sequence[Sequence[Emoji]], rows: int, seed: int, name: str, half: int
    ) -> Split:
        """Return rows of the task ``name`` in seeded order; they have classes in turn, the emoji of
        a class in turn.
        """
        drawn, labels = [], []
        order = shuffled(range(rows), seed, name, half, "order")
        for row in progress(order, "drawing OpenMoji"):
            turn, label = divmod(row, len(pool))
            emoji = pool[label][turn % len(pool[label])]
            drawn.append(draw(emoji, self.size, generator(seed, name, half, row)))
            labels.append(label)
        return Split(stack(drawn), torch.tensor(labels))

    def _digits(self, seed: int) -> list[Split]:
        order = list(chain(*zip(*shuffled_digits(seed), strict=True)))  # classes in turn
        parts = (order[: self.train_rows], order[self.train_rows :][: self.test_rows])
        return [self._enlarged(part, seed, half) for half, part in enumerate(parts)]

    def _enlarged(self, rows: Sequence[int], seed: int, half: int) -> Split:
        """Return digits at ``size`` over three channels, in seeded order."""
        pixels, labels = digits()
        index = shuffled(rows, seed, "mnist", half, "order")
        small = torch.from_numpy(pixels[index]).float()[:, None]
        large = torch.nn.functional.interpolate(small, size=(self.size,) * 2, mode="bilinear")
        x = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
        return Split(x, torch.from_numpy(labels[index]))


def _pools(
    classes: list[str], seed: int, level: str = "group"
) -> list[tuple[Sequence[Emoji], ...]]:
    """Return the emoji of each class in seeded order, for training and for test rows."""
    each = ([emoji for emoji in catalog() if getattr(emoji, level) == name] for name in classes)
    order = [shuffled(own, seed, "openmoji", getattr(own[0], level)) for own in each]
    return list(zip(*(hold_out(own, _HELD_OUT) for own in order), strict=True))


def draw(emoji: Emoji, size: int, random: torch.Generator) -> NDArray[np.uint8]:
    """Return the emoji on a gradient: [size, size, 3]. Scale 0.55 to 0.95, any place inside,
    mirrored half of the time.
    """
    colours = torch.rand(2, 3, generator=random).numpy() * 255.0
    scale, left, top, mirror, angle = torch.rand(5, generator=random).tolist()
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    ramp = np.clip(x * np.cos(2 * np.pi * angle) + y * np.sin(2 * np.pi * angle) + 0.5, 0.0, 1.0)[
        ..., None
    ]
    canvas = Image.fromarray((colours[0] * (1 - ramp) + colours[1] * ramp).round().astype(np.uint8))
    side = round(size * (0.55 + 0.4 * scale))
    image = rasterise(emoji.hexcode, size).resize((side, side), Image.Resampling.BILINEAR)
    if mirror < 0.5:
        image = ImageOps.mirror(image)
    canvas.paste(image, (round(left * (size - side)), round(top * (size - side))), image)
    return np.asarray(canvas)
