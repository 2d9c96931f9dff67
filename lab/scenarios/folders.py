"""Any two image folders: DIR/CLASS/*.jpg, or DIR/train/CLASS and DIR/val/CLASS (or test)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from lab.core.data import Case, Kind, Role, ScenarioData, Split, Task
from lab.core.errors import UserError
from lab.core.hashing import digest
from lab.core.options import count, local, number
from lab.core.progress import progress
from lab.core.seeding import generator
from lab.scenarios import images

_WANTED_ROWS = 2000  # 20 groups × 100 samples (KAPPA, arXiv 2505.23760 §5.2)
Files = dict[str, list[Path]]


def classes(folder: Path, key: str) -> Files:
    """Class name → image files, both sorted. Hidden folders and folders without an image are left
    out.

    Raises:
        UserError: no such folder, no image in it, or a single class.
    """
    if not folder.is_dir():
        raise UserError(
            key,
            folder,
            "there is no such folder; give one that holds a subfolder of images per class.",
        )
    found: Files = {}
    try:
        for entry in sorted(
            p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")
        ):
            files = sorted(
                f for f in entry.rglob("*") if f.suffix.lower() in images.SUFFIXES and f.is_file()
            )
            if files:
                found[entry.name] = files
    except PermissionError as error:
        raise UserError(key, folder, f"cannot be read ({error}).") from error
    if not found:
        endings = ", ".join(sorted(images.SUFFIXES))
        raise UserError(
            key, folder, f"holds no images; expected {folder.name}/CLASS/FILE ending in {endings}."
        )
    if len(found) < 2:
        raise UserError(
            key, folder, f"holds the single class {next(iter(found))}; a task needs at least two."
        )
    return found


class ImageFolders:
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

    def __init__(
        self,
        *,
        benign_path: str | None,
        harmful_path: str | None,
        benign_name: str = "benign",
        harmful_name: str = "harmful",
        size: int = 224,
        train_rows: int = 2000,
        test_rows: int = 500,
        test_share: float = 0.2,
        name: str = "image_folders",
    ) -> None:
        for role, path, what in (
            ("benign", benign_path, benign_name),
            ("harmful", harmful_path, harmful_name),
        ):
            if path is None or path == "":
                fix = (
                    f"set it to the folder with the {what} images: one subfolder per class "
                    "(or train/ and val/)."
                )
                raise UserError(f"scenario.{role}_path", path, fix)
        for key, value, least in (
            ("size", size, 32),
            ("train_rows", train_rows, 4),
            ("test_rows", test_rows, 2),
        ):
            count(f"scenario.{key}", value, least)
        number("scenario.test_share", test_share, above=0, below=1)
        if benign_name == harmful_name:
            raise UserError(
                "scenario.harmful_name", harmful_name, "must differ from scenario.benign_name."
            )
        self.paths = (
            local("scenario.benign_path", benign_path),
            local("scenario.harmful_path", harmful_path),
        )
        self.names = (str(benign_name), str(harmful_name))
        self.name, self.size, self.rows, self.test_share = (
            name,
            size,
            (train_rows, test_rows),
            test_share,
        )

    def load(self, seed: int) -> ScenarioData:
        notes: list[str] = []
        benign = self._task("benign", seed, notes)
        harmful = self._task("harmful", seed, notes)
        tensors = [
            t for task in (benign, harmful) for s in (task.train, task.test) for t in (s.x, s.y)
        ]
        return ScenarioData((Case(self.name, benign, (harmful,)),), tuple(notes), digest(*tensors))

    def _task(self, role: Role, seed: int, notes: list[str]) -> Task:
        position = 0 if role == "benign" else 1
        folder, name, key = self.paths[position], self.names[position], f"scenario.{role}_path"
        train, test = self._halves(folder, key, seed)
        labels = {label: index for index, label in enumerate(sorted(train))}
        splits = [
            self._read(files, labels, limit, seed, f"{role}/{half}", key)
            for files, limit, half in zip((train, test), self.rows, ("train", "test"), strict=True)
        ]
        total, read = sum(map(len, [*train.values(), *test.values()])), sum(map(len, splits))
        notes.append(
            f"The {role} task {name} has {len(labels)} classes; {read} of {total} images were read."
        )
        if min(self.rows) < len(labels):
            many = f"Some of the {len(labels)} classes of the {role} task"
            notes.append(f"{many} have no row: raise train_rows and test_rows.")
        if len(splits[0]) < _WANTED_ROWS:
            notes.append(
                f"The {role} task has {len(splits[0])} training rows, fewer than the "
                f"{_WANTED_ROWS} that 20 disjoint "
                "groups of 100 samples need: groups will overlap or be smaller."
            )
        return Task(name, role, "classification", splits[0], splits[1], classes=len(labels))

    def _halves(self, folder: Path, key: str, seed: int) -> tuple[Files, Files]:
        held_out = next((folder / n for n in ("val", "test") if (folder / n).is_dir()), None)
        if (folder / "train").is_dir() and held_out is not None:
            train, test = classes(folder / "train", key), classes(held_out, key)
            surplus = sorted(set(test) - set(train))
            if surplus:
                raise UserError(
                    key, held_out, f"has the class {surplus[0]}, which {folder / 'train'} lacks."
                )
            return {k: _shuffled(v, seed, key, k) for k, v in train.items()}, test
        train, test = {}, {}
        for label, files in classes(folder, key).items():
            files = _shuffled(files, seed, key, label)
            if len(files) < 2:
                fix = (
                    f"has a single image in the class {label}; training and test rows need "
                    "one each."
                )
                raise UserError(key, folder, fix)
            held_out_files = min(max(round(len(files) * self.test_share), 1), len(files) - 1)
            test[label], train[label] = files[:held_out_files], files[held_out_files:]
        return train, test

    def _read(
        self, files: Files, labels: dict[str, int], limit: int, seed: int, half: str, key: str
    ) -> Split:
        """Up to ``limit`` images, the first of every class, then the second, …; then in seeded
        order.
        """
        turns = [(n, labels[c], path) for c in files for n, path in enumerate(files[c])]
        chosen = sorted(turns, key=lambda t: t[:2])[:limit]
        pixels = [
            images.read(path, self.size, key) for _, _, path in progress(chosen, f"reading {half}")
        ]
        order = torch.randperm(len(chosen), generator=generator(seed, self.name, half, "order"))
        return Split(
            images.stack(pixels)[order], torch.tensor([label for _, label, _ in chosen])[order]
        )


def _shuffled(files: list[Path], seed: int, *labels: object) -> list[Path]:
    order = torch.randperm(len(files), generator=generator(seed, "files", *labels))
    return [files[i] for i in order.tolist()]
