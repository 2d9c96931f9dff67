"""Concept folders: images and a ``metadata.csv`` beside them, the format of Hugging Face's
``imagefolder``.

``metadata.csv`` has the columns ``file_name`` and ``text`` and any others (``object``, ``style``,
…). The world writes such folders and a user's own concepts are read from them by the same code.
"""

from __future__ import annotations

import csv
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lab.core.errors import UserError, nearest
from lab.core.images import DAMAGED, expand_path, to_rgb

METADATA = "metadata.csv"
# per image; more is refused before it is decoded (a small file can unpack to gigabytes)
MAX_PIXELS = 64_000_000
_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
)  # EPS and the like would start other programs
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class ConceptFolder:
    """What a folder holds: images uint8 [n, 3, size, size] and one row of metadata each."""

    path: Path
    images: Tensor
    rows: tuple[dict[str, str], ...]

    @property
    def texts(self) -> list[str]:
        return [row["text"] for row in self.rows]


def write(
    folder: str | Path, images: Tensor, rows: Sequence[Mapping[str, str]], *, credit: str = ""
) -> Path:
    """Write ``images`` uint8 [n, 3, h, w] as PNG with ``metadata.csv``; ``credit`` goes to
    ``CREDIT.txt``.

    The folder appears complete or not at all. The same input gives the same bytes.

    Raises:
        UserError: the folder exists and is not empty, or there is nothing to write.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("folder", folder, "exists and is not empty; choose another one")
    if not len(rows) or len(rows) != len(images):
        raise UserError(
            "folder",
            folder,
            f"needs one row per image and at least one: {len(images)}, {len(rows)} rows",
        )
    columns = dict.fromkeys(["file_name", "text", *(key for row in rows for key in row)])
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with (partial / METADATA).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
            table.writeheader()
            for i, row in enumerate(rows):
                name = f"{i:05d}.png"
                pixels = images[i].permute(1, 2, 0).contiguous().numpy()
                Image.fromarray(pixels).save(partial / name, compress_level=4)
                table.writerow({**row, "file_name": name})
        if credit:
            (partial / "CREDIT.txt").write_text(credit + "\n", encoding="utf-8")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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
        size: side of the images in pixels, a multiple of 8.
        select: only rows with these values, for example ``{"object": "fox", "style": "mosaic"}``.
        key: the config key that errors name.

    Raises:
        UserError: no such folder, no image in it, a path that leaves it, an image that cannot be
            read or is too large, broken metadata, an unknown ``select`` (with the nearest values),
            a size that no model takes.
    """
    folder = expand_path(key, folder)
    if not isinstance(size, int) or size < 8 or size % 8:
        raise UserError(
            "resolution", size, "must be a multiple of 8, as latents are 8 (or 4) times smaller"
        )
    if not folder.is_dir():
        raise UserError(key, folder, "no such folder; give a folder with images and a metadata.csv")
    rows = _rows(folder, key)
    for column, value in (select or {}).items():
        values = {row.get(column, "") for row in rows} - {""}
        if value not in values:
            hint = nearest(value, values) if values else "its metadata has no such column"
            raise UserError(key, folder, f"no image with {column}={value}; {hint}")
        rows = [row for row in rows if row.get(column) == value]
    images = torch.stack(
        [load(_inside(folder, row["file_name"], key), size, key=key) for row in rows]
    )
    return ConceptFolder(folder, images, tuple(rows))


def load(path: Path, size: int, *, key: str = "concept.path") -> Tensor:
    """One image as uint8 [3, size, size]; raises as `read` does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # our own limit is lower
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(
                        key,
                        path,
                        f"{image.width} × {image.height} pixels; scale it below 64 megapixels",
                    )
                square = ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC)
    except Image.DecompressionBombError as error:
        raise UserError(
            key, path, "unpacks to too many pixels; scale it below 64 megapixels"
        ) from error
    except FileNotFoundError as error:
        raise UserError(key, path, f"is listed in {METADATA} and does not exist") from error
    except (*DAMAGED, MemoryError) as error:
        raise UserError(
            key, path, "cannot be read as an image; replace it with a PNG, JPEG or WebP file"
        ) from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _inside(folder: Path, name: str, key: str) -> Path:
    """``folder / name``, which must lie in the folder once every link is followed."""
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(key, name, f"is no file name; mend {METADATA}") from error
    if not inside or Path(name).is_absolute():
        raise UserError(
            key, name, f"leaves the folder {folder}; copy the image into it and mend {METADATA}"
        )
    return path


def _rows(folder: Path, key: str) -> list[dict[str, str]]:
    name = folder.resolve().name.replace("_", " ").replace("-", " ").strip()
    present = sorted(
        p.name
        for p in folder.iterdir()
        if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")
    )
    if not (folder / METADATA).exists():
        if not present:
            raise UserError(key, folder, "holds no image (PNG, JPEG, WebP, BMP, GIF, TIFF)")
        warnings.warn(
            f"{folder} has no {METADATA}: every caption is 'a photo of {name}'", stacklevel=3
        )
        return [
            {"file_name": file, "text": f"a photo of {name}", "object": name} for file in present
        ]
    rows = _table(folder, key)
    if not rows:
        raise UserError(key, folder / METADATA, "lists no image")
    silent = [row for row in rows if not row.get("text", "").strip()]
    for row in silent:
        row["text"] = f"a photo of {name}"
    if silent:
        warnings.warn(
            f"{len(silent)} images of {folder} have no text: their caption is 'a photo of {name}'",
            stacklevel=3,
        )
    surplus = set(present) - {os.path.normpath(row["file_name"]) for row in rows}
    if surplus:
        warnings.warn(
            f"{len(surplus)} images of {folder} are not listed in {METADATA} and are left out",
            stacklevel=3,
        )
    return rows


def _table(folder: Path, key: str) -> list[dict[str, str]]:
    path = folder / METADATA
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if "file_name" not in (reader.fieldnames or ()):
                raise UserError(key, path, "needs a header with the columns file_name and text")
            rows = []
            for row in reader:
                if None in row or not row["file_name"]:
                    raise UserError(key, path, f"line {reader.line_num} does not fit the header")
                rows.append({column: value or "" for column, value in row.items()})
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(key, path, f"cannot be read as a CSV file in UTF-8 ({error})") from error
