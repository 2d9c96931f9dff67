"""Image files of any kind as upright RGB, and as uint8 tensors."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from lab.core.errors import UserError, as_user_error

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # EPS and the like would start programs
MAX_PIXELS = 100_000_000  # 10,000 × 10,000; a larger image is taken for a decompression bomb
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    OverflowError,
    TypeError,
    KeyError,
    struct.error,
)  # Pillow raises
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; a damaged EXIF block is ignored.

    `PIL.ImageOps.exif_transpose` would have to write the block again, and fails.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGED:
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return upright RGB, transparency over white; greys of 16 bits and of floats (up to 1 or
    their maximum) become 8 bits.
    """
    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535.0 if image.mode.startswith("I") else max(float(grey.max(initial=0.0)), 1.0)
        image = Image.fromarray(np.clip(grey / top * 255.0, 0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop(image: Image.Image, size: int) -> Image.Image:
    """Return the centred square of ``image``, scaled to ``size`` pixels."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


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
            return np.asarray(crop(to_rgb(image), size))


def stack(images: list[NDArray[np.uint8]]) -> Tensor:
    """Return [size, size, 3] arrays as one tensor [n, 3, size, size]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def expand_path(key: str, value: object) -> Path:
    """Return ``value`` as a path; ``~`` and ``~user`` become the home folder.

    Raises:
        UserError: a user that this machine does not have.
    """
    try:
        return Path(str(value)).expanduser()
    except RuntimeError as error:
        raise UserError(
            key, value, "starts with ~ and a name, and this machine has no such user."
        ) from error
