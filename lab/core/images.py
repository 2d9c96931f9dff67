"""Read image files as tensors, resize them, and write images as one labelled grid.

The same tensor gives the same PNG, byte for byte (one version of Pillow).
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from lab.core.errors import as_user_error
from lab.core.types import ImageGrid

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # EPS and the like would start programs
MAX_PIXELS = 100_000_000  # 10,000 × 10,000; a larger image is taken for a decompression bomb


def to_rgb(image: Image.Image) -> Image.Image:
    """Return upright RGB, transparency over white; greys of 16 bits and of floats (up to 1 or
    their maximum) become 8 bits. A damaged EXIF block is ignored.
    """
    with suppress(Exception):  # turned before its EXIF block is written again
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535.0 if image.mode.startswith("I") else max(float(grey.max(initial=0.0)), 1.0)
        image = Image.fromarray(np.clip(grey / top * 255.0, 0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(path: Path, size: int, key: str, *, draft: bool = True) -> NDArray[np.uint8]:
    """Return the centre square of one image file, scaled, as [size, size, 3].

    Args:
        draft: decode a JPEG at about twice ``size``, which is faster and changes its pixels a bit.

    Raises:
        UserError: the file cannot be read, or would unpack to more than `MAX_PIXELS` pixels.
    """
    fix = "cannot be read as an image; scale down, repair or remove it."
    with as_user_error(key, path, fix), warnings.catch_warnings():
        # the limit below is stricter or equal
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS:,} pixels")
            if draft:
                image.draft("RGB", (2 * size, 2 * size))
            square = ImageOps.fit(to_rgb(image), (size, size), method=Image.Resampling.BICUBIC)
            return np.asarray(square)


def stack(images: list[NDArray[np.uint8]]) -> Tensor:
    """Return [size, size, 3] arrays as one tensor [n, 3, size, size]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def resize(images: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Return images [n, c, h, w], float in [0, 1], as [n, c, side, side], with antialiasing."""
    size = (side, side)
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode=mode, antialias=True).clamp(0.0, 1.0)


def resize_bytes(images: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Return images uint8 [n, 3, s, s] as uint8 [n, 3, side, side], with antialiasing."""
    if images.shape[-1] == side:
        return images
    scaled = F.interpolate(images.float(), (side, side), mode=mode, antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def expand_path(key: str, value: object) -> Path:
    """Return ``value`` as a path; ``~`` and ``~user`` become the home folder.

    Raises:
        UserError: a user that this machine does not have.
    """
    with as_user_error(key, value, "names a home folder that this machine does not have."):
        return Path(str(value)).expanduser()


GAP = 2  # pixels between cells
PAD = 6  # pixels around everything
INK, PAPER = (27, 31, 36), (255, 255, 255)
LETTER = 8  # pixels, the mean width of a letter
ROW_LABEL = 12  # letters in a line of a row's label


def png(content: ImageGrid) -> bytes:
    """Return a grid of images as PNG without metadata, see `grid`."""
    out = io.BytesIO()
    grid(content.images, content.rows, content.columns).save(out, format="PNG")
    return out.getvalue()


def grid(images: Tensor, rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Draw rows of enlarged images with labels at the left and above, on white.

    Args:
        images: uint8 [rows, columns, 3, s, s]; pixels are repeated, never smoothed,
            to cells of about 128 pixels.
    """
    scale = max(round(128 / images.shape[-1]), 1)
    cells = images.cpu().repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    cell = cells.shape[-1]
    padded = F.pad(cells, (0, GAP, 0, GAP), value=255).permute(0, 3, 1, 4, 2)
    pixels = padded.reshape(len(rows) * (cell + GAP), len(columns) * (cell + GAP), 3)
    import matplotlib

    # Pillow's own font has neither × nor Greek letters
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(file, 14)
    left = [textwrap.fill(text.replace("_", " "), ROW_LABEL) for text in rows]
    above = [textwrap.fill(text.replace("_", " "), max(cell // LETTER, 1)) for text in columns]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [[draw.multiline_textbbox((0, 0), t, font) for t in texts] for texts in (left, above)]
    x0 = PAD + (round(max(box[2] for box in boxes[0])) + PAD if any(left) else 0)
    y0 = PAD + (round(max(box[3] for box in boxes[1])) + PAD if any(above) else 0)
    size = (x0 + pixels.shape[1] - GAP + PAD, y0 + pixels.shape[0] - GAP + PAD)
    out = Image.new("RGB", size, PAPER)
    out.paste(
        Image.fromarray(pixels.numpy()).crop((0, 0, size[0] - x0 - PAD, size[1] - y0 - PAD)),
        (x0, y0),
    )
    draw = ImageDraw.Draw(out)
    for i, text in enumerate(left):
        draw.multiline_text((PAD, y0 + i * (cell + GAP) + cell // 2), text, INK, font, "lm")
    for j, text in enumerate(above):
        x = x0 + j * (cell + GAP) + cell // 2
        draw.multiline_text((x, y0 - PAD), text, INK, font, "md", align="center")
    return out
