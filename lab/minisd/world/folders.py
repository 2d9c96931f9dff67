"""Concept folders: images and a ``metadata.csv`` beside them, the format of Hugging Face's
``imagefolder``.

``metadata.csv`` has the columns ``file_name`` and ``text`` and any others (``object``, ``style``,
…).
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from lab.core.errors import UserError, as_user_error, nearest
from lab.core.hashing import whole_folder
from lab.core.images import SUFFIXES, expand_path, read_image, stack

METADATA = "metadata.csv"


@dataclass(frozen=True)
class ConceptFolder:
    """What a folder holds: images uint8 [n, 3, size, size] and one row of metadata each."""

    images: Tensor
    rows: tuple[dict[str, str], ...]

    @property
    def texts(self) -> list[str]:
        return [row["text"] for row in self.rows]


def write(folder: str | Path, images: Tensor, rows: Sequence[Mapping[str, str]]) -> Path:
    """Write ``images`` uint8 [n, 3, h, w] as PNG with ``metadata.csv``.

    The folder appears complete or not at all. The same input gives the same bytes.

    Raises:
        UserError: the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("folder", folder, "exists and is not empty; choose another one")
    columns = dict.fromkeys(["file_name", "text", *(key for row in rows for key in row)])
    with (
        whole_folder(folder) as partial,
        (partial / METADATA).open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        table.writeheader()
        for i, (image, row) in enumerate(zip(images, rows, strict=True)):
            name = f"{i:05d}.png"
            pixels = image.permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(partial / name, compress_level=4)
            table.writerow({**row, "file_name": name})
    return folder


def read(
    folder: str | Path,
    size: int,
    *,
    select: Mapping[str, str] | None = None,
    key: str = "concept.path",
) -> ConceptFolder:
    """Read a concept folder; every image is turned upright, laid on white, cropped to its centre
    square and scaled.

    Without ``metadata.csv`` (or without its ``text``) captions are made from the folder's name,
    with a warning.

    Args:
        size: side of the images in pixels.
        select: only rows with these values, for example ``{"object": "fox", "style": "mosaic"}``.
        key: the config key that errors name.

    Raises:
        UserError: no such folder, no image in it, a path that leaves it, an image that cannot be
            read or is too large, broken metadata, an unknown ``select`` (with the nearest values).
    """
    folder = expand_path(key, folder)
    if not folder.is_dir():
        raise UserError(key, folder, "this folder does not exist; set the key to one with images")
    rows = _rows(folder, key)
    for column, value in (select or {}).items():
        values = {row.get(column, "") for row in rows} - {""}
        if value not in values:
            hint = nearest(value, values) if values else "its metadata has no such column"
            raise UserError(key, folder, f"no image with {column}={value}; {hint}")
        rows = [row for row in rows if row.get(column) == value]
    images = [read_image(folder / row["file_name"], size, key, draft=False) for row in rows]
    return ConceptFolder(stack(images), tuple(rows))


def _rows(folder: Path, key: str) -> list[dict[str, str]]:
    """Return the table of a folder, or one made of its file names, with a text in every row."""
    name = folder.resolve().name.replace("_", " ").replace("-", " ").strip()
    files = (p for p in folder.iterdir() if not p.name.startswith("."))
    present = sorted(p.name for p in files if p.suffix.lower() in SUFFIXES)
    rows = [{"file_name": file, "text": "", "object": name} for file in present]
    if (folder / METADATA).exists():
        rows = _table(folder, key)
    if not rows:
        raise UserError(key, folder, "holds no image (PNG, JPEG, WebP, BMP, GIF, TIFF)")
    for row in rows:
        if not row.get("text", "").strip():
            row["text"] = row.get("prompt", "").strip()
    silent = [row for row in rows if not row["text"]]
    for row in silent:
        row["text"] = f"a photo of {name}"
    if silent:
        reason = f"have no text in a {METADATA}: their caption is 'a photo of {name}'"
        warnings.warn(f"{len(silent)} images of {folder} {reason}", stacklevel=3)
    surplus = set(present) - {os.path.normpath(row["file_name"]) for row in rows}
    if surplus:
        reason = f"are not listed in {METADATA} and are left out"
        warnings.warn(f"{len(surplus)} images of {folder} {reason}", stacklevel=3)
    return rows


def _table(folder: Path, key: str) -> list[dict[str, str]]:
    """Return the rows of ``metadata.csv``; every file lies in the folder, links followed."""
    path, home = folder / METADATA, folder.resolve()
    fix = "cannot be read as a CSV file in UTF-8 with the columns file_name and text"
    with as_user_error(key, path, fix), path.open(newline="", encoding="utf-8-sig") as file:
        rows = []
        for number, row in enumerate(csv.DictReader(file, strict=True), 1):
            if None in row or not row["file_name"]:
                raise UserError(key, path, f"row {number} does not fit the header")
            if not (folder / row["file_name"]).resolve().is_relative_to(home):
                fix = f"leaves the folder {folder}; copy the image into it and mend {METADATA}"
                raise UserError(key, row["file_name"], fix)
            rows.append({column: value or "" for column, value in row.items()})
    return rows
