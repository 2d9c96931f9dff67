"""Image grids: right pixels at the right places, the same bytes again."""

import io

import torch
from PIL import Image

from lab.core.images import GAP, grid, png
from lab.core.types import ImageGrid


def colours(rows=2, columns=3, size=4):
    """Every cell in one colour of its own."""
    images = torch.zeros(rows, columns, 3, size, size, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            images[i, j] = torch.tensor([40 * i + 10, 40 * j + 10, 200], dtype=torch.uint8)[
                :, None, None
            ]
    return images


def test_cells_lie_in_order_and_are_scaled():
    out = grid(colours(), ["", ""], ["", "", ""])
    pad = (out.width - 3 * 128 - 2 * GAP) // 2
    assert out.height == 2 * 128 + GAP + 2 * pad
    for i in range(2):
        for j in range(3):
            x, y = pad + j * (128 + GAP), pad + i * (128 + GAP)
            assert out.getpixel((x + 12, y + 12)) == (40 * i + 10, 40 * j + 10, 200)


def test_equal_grids_give_equal_bytes_and_read_back():
    data = png(ImageGrid(colours(size=64), ("a", "b"), ("0", "1", "2"), "caption"))
    assert data == png(ImageGrid(colours(size=64), ("a", "b"), ("0", "1", "2"), "other words"))
    assert Image.open(io.BytesIO(data)).width > 3 * 128  # cells of about 128 pixels
