"""From the project's pictures to what a scorer takes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, uint8

from lab.core.errors import UserError


def check(images: Tensor) -> Tensor:
    """``images`` when they are uint8 [n, 3, h, w], n ≥ 1.

    Raises:
        UserError: other shapes or types (float pictures would silently be taken for black ones), or
            no picture.
    """
    if images.dtype != uint8 or images.ndim != 4 or images.shape[1] != 3:
        found = f"{images.dtype} {list(images.shape)}"
        raise UserError("images", found, "scorers take uint8 pictures [n, 3, h, w].")
    if not len(images):
        raise UserError("images", list(images.shape), "there is no picture to scorer.")
    return images


def resized(images: Tensor, side: int) -> Tensor:
    """uint8 [n, 3, h, w] to float [n, 3, side, side] in [0, 1], bilinear with antialias."""
    x = images.float() / 255
    if x.shape[-2:] != (side, side):
        x = F.interpolate(
            x, size=(side, side), mode="bilinear", antialias=True, align_corners=False
        ).clamp(0, 1)
    return x
