"""Images as uint8 tensors [n, 3, size, size], from files or from memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from lab.core.errors import UserError
from lab.core.image_files import DAMAGED, to_rgb

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MAX_PIXELS = 100_000_000  # 10,000 × 10,000; a larger picture is taken for a decompression bomb


def crop(image: Image.Image, size: int) -> Image.Image:
    """The centred square of ``image``, scaled to ``size`` pixels."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def read(path: Path, size: int, key: str) -> NDArray[np.uint8]:
    """One image file as [size, size, 3].

    Raises:
        UserError: the file cannot be read, or would unpack to more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # the limit below is stricter or equal
            with Image.open(path) as image:
                pixels = image.width * image.height
                if pixels > MAX_PIXELS:
                    raise UserError(
                        key,
                        path,
                        f"has {pixels:,} pixels, more than {MAX_PIXELS:,}: scale it down first.",
                    )
                image.draft("RGB", (2 * size, 2 * size))
                return np.asarray(crop(to_rgb(image), size))
    except Image.DecompressionBombError as error:
        raise UserError(
            key, path, f"has more than {MAX_PIXELS:,} pixels: scale it down first."
        ) from error
    except DAMAGED as error:
        raise UserError(
            key, path, f"is no readable image ({error}); repair or remove the file."
        ) from error


def stack(images: list[NDArray[np.uint8]]) -> Tensor:
    """[size, size, 3] arrays to one tensor [n, 3, size, size]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
