"""Image files of any kind as upright RGB."""

from __future__ import annotations

import struct

import numpy as np
from PIL import ExifTags, Image

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
    """``image`` turned as its EXIF orientation says. A damaged EXIF block says nothing, and is no
    reason to refuse the picture (`PIL.ImageOps.exif_transpose` would have to write the block again,
    and fails).
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGED:
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright, transparency over white; greys of 16 bits and of floats (up to 1 or their
    maximum) to 8.
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
