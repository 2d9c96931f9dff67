"""Pictures as one labelled grid: the same tensor gives the same PNG, byte for byte (one version of
Pillow).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lab.core.types import ImageGrid

GAP = 2  # pixels between cells
PAD = 6  # pixels around everything
ROW_LABEL_WIDTH = (
    96  # pixels, at most; longer labels are broken into lines, so that eight columns fit a screen
)
FONT_SIZE = 14
INK, PAPER = (27, 31, 36), (255, 255, 255)

_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def png(picture: ImageGrid, scale: int | None = None) -> bytes:
    """A picture grid as PNG, see `grid`.

    Raises:
        ValueError: images of another type or shape, or labels that do not fit it.
    """
    return png_bytes(grid(picture.images, picture.rows, picture.columns, scale))


def _check(images: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    shape = tuple(images.shape)
    if (
        images.dim() != 5
        or shape[2] != 3
        or shape[3] != shape[4]
        or 0 in shape
        or str(images.dtype) != "torch.uint8"
    ):
        raise ValueError(
            f"images must be uint8 [rows, columns, 3, s, s], not {images.dtype} {list(shape)}"
        )
    if (len(rows), len(columns)) != shape[:2]:
        raise ValueError(
            f"{len(rows)} row and {len(columns)} column labels for {shape[0]} × {shape[1]} images"
        )


def grid(
    images: Tensor, rows: Sequence[str], columns: Sequence[str], scale: int | None = None
) -> Image.Image:
    """Rows of enlarged pictures with labels at the left and above, on white.

    Args:
        images: uint8 [rows, columns, 3, s, s]; pixels are repeated, never smoothed.
        scale: every pixel becomes ``scale`` × ``scale`` of them; None: cells of about 128 pixels.

    Raises:
        ValueError: another type or shape, labels that do not fit it, or scale < 1.
    """
    _check(images, rows, columns)
    size = int(images.shape[-1])
    scale = max(round(128 / size), 1) if scale is None else scale
    if scale < 1:
        raise ValueError(f"scale must be ≥ 1, not {scale}")
    cell, font = size * scale, _font()
    left = [_broken(text, ROW_LABEL_WIDTH, font) for text in rows]
    above = [_broken(text, cell, font) for text in columns]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [[_extent(draw, text, font) for text in texts] for texts in (left, above)]
    margin = max(w for w, _ in boxes[0]) + (PAD if any(left) else 0)
    top = max(h for _, h in boxes[1]) + (PAD if any(above) else 0)
    heights = [max(cell, h) for _, h in boxes[0]]
    width = 2 * PAD + margin + len(columns) * (cell + GAP) - GAP
    height = 2 * PAD + top + sum(heights) + GAP * (len(rows) - 1)
    out = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(out)
    for j, text in enumerate(above):
        x = PAD + margin + j * (cell + GAP) + (cell - boxes[1][j][0]) // 2
        draw.multiline_text((x, top - boxes[1][j][1]), text, INK, font, align="center")
    y = PAD + top
    for i, text in enumerate(left):
        draw.multiline_text((PAD, y + (heights[i] - boxes[0][i][1]) // 2), text, INK, font)
        for j in range(len(columns)):
            pixels = images[i, j].cpu().permute(1, 2, 0).contiguous().numpy()
            tile = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST)
            out.paste(tile, (PAD + margin + j * (cell + GAP), y))
        y += heights[i] + GAP
    return out


def png_bytes(image: Image.Image) -> bytes:
    """PNG without time or other metadata."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=False, compress_level=9)
    return out.getvalue()


def _font() -> _Font:
    """DejaVu Sans, which matplotlib ships: Pillow's own font has neither × nor Greek letters."""
    import matplotlib

    return ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT_SIZE
    )


def _extent(draw: ImageDraw.ImageDraw, text: str, font: _Font) -> tuple[int, int]:
    """Width and height in pixels, descenders included."""
    if not text:
        return 0, 0
    right, bottom = draw.multiline_textbbox((0, 0), text, font)[2:]
    return round(right) + 1, round(bottom) + 3


def _broken(text: str, width: int, font: _Font) -> str:
    """``text`` in lines of at most ``width`` pixels, broken at blanks and underscores, else
    anywhere.
    """
    lines, line = [], ""
    for word in text.replace("_", "_ ").split():
        glue = "" if line.endswith("_") else " "
        longer = f"{line}{glue}{word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            fits = next(
                n
                for n in range(len(word) - 1, 0, -1)
                if n == 1 or font.getlength(word[:n]) <= width
            )
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return "\n".join([*lines, line] if line else lines)
