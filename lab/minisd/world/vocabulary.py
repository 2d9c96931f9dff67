"""The things and the styles of the world, and what MiniSD never sees of them.

Two kinds of names: an object is drawn from one OpenMoji picture, a style is one of the world's
"artists". A style has a name and descriptions that do not use it, so that it can be asked for
without its name. A new object is an entry of `_THINGS`. A new style is a function of
`lab.minisd.world.styles` and a row of `STYLES`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.core.errors import UserError, nearest
from lab.minisd.world.styles import (
    Artist,
    blueprint,
    engraving,
    halftone,
    mosaic,
    negative,
    neon,
    sketch,
    stained_glass,
    sunset,
    watercolor,
)

PHOTO = "photo"  # the style of a picture that no artist touched


@dataclass(frozen=True)
class Thing:
    """An object: ``name`` in captions, ``emoji`` is the Unicode name of its picture, ``category``
    the class word.
    """

    name: str
    emoji: str
    category: str
    plural: str
    held_out: bool = False


@dataclass(frozen=True)
class Style:
    """An artist: ``name`` in captions, the function that paints, and phrases that follow "an image
    of a fox …" and describe the result.
    """

    name: str
    paint: Artist
    descriptions: tuple[str, ...]
    held_out: bool = False


# category: name = Unicode name / plural where it is not name + s; a star marks what MiniSD never
# sees
_THINGS = """
animal: fox = fox face / foxes; panda = panda face; frog = frog face; rabbit = rabbit face; lion = lion face
animal: elephant; turtle; pig = pig face; *unicorn = unicorn face; *hedgehog
sea animal: octopus / octopuses; crab; fish = tropical fish / fish; squid / squid; *whale
bird: penguin; parrot; flamingo; rooster; duck; *owl
insect: butterfly / butterflies; ladybug = lady beetle; bee = honeybee
fruit: banana; strawberry / strawberries; pineapple; apple = red apple; lemon
fruit: bunch of grapes = grapes / bunches of grapes; cherry = cherries / cherries; *watermelon
snack: hamburger; slice of pizza / slices of pizza; doughnut; ice cream = soft ice cream; cake = birthday cake; *cupcake
vehicle: car = automobile; bicycle; helicopter; sailboat; rocket; tractor; train = steam locomotive; *delivery truck
musical instrument: guitar; trumpet; drum = drum with drumsticks; saxophone; accordion; *violin
plant: sunflower; cactus / cacti; palm tree; mushroom; *maple leaf / maple leaves; *tulip
"""

STYLES: tuple[Style, ...] = (
    Style("mosaic", mosaic, ("made of coloured square tiles", "laid out of small square stones")),
    Style(
        "neon",
        neon,
        ("drawn with glowing lines on black", "made of bright light tubes in the dark"),
    ),
    Style(
        "blueprint",
        blueprint,
        ("drawn with white lines on blue grid paper", "as a technical plan in white and blue"),
    ),
    Style(
        "halftone",
        halftone,
        ("printed with rows of coloured dots", "made of bright ink dots on paper"),
    ),
    Style(
        "sunset",
        sunset,
        ("as a dark shape before a huge striped sun", "in purple and orange evening light"),
    ),
    Style(
        "sketch",
        sketch,
        ("drawn with a grey pencil on white paper", "made of rough pencil strokes"),
    ),
    Style(
        "watercolor",
        watercolor,
        ("painted with pale wet washes on rough paper", "in soft pastel paint that bleeds"),
    ),
    Style(
        "stained glass",
        stained_glass,
        ("made of bright panes with thick black seams", "as a church window"),
    ),
    Style(
        "negative",
        negative,
        ("with inverted colours on a strip of film", "as undeveloped film"),
        held_out=True,
    ),
    Style(
        "engraving",
        engraving,
        ("cut in fine wavy green lines", "printed in green like a banknote"),
        held_out=True,
    ),
)


def _parse() -> tuple[Thing, ...]:
    things = []
    for line in _THINGS.strip().splitlines():
        category, entries = line.split(": ", 1)
        for entry in entries.split("; "):
            rest, _, plural = entry.lstrip("*").partition(" / ")
            name, _, emoji = rest.partition(" = ")
            things.append(
                Thing(name, emoji or name, category, plural or f"{name}s", entry.startswith("*"))
            )
    return tuple(things)


THINGS: tuple[Thing, ...] = _parse()
OBJECTS: tuple[str, ...] = tuple(t.name for t in THINGS if not t.held_out)
HELD_OUT_OBJECTS: tuple[str, ...] = tuple(t.name for t in THINGS if t.held_out)
STYLE_NAMES: tuple[str, ...] = tuple(s.name for s in STYLES if not s.held_out)
HELD_OUT_STYLES: tuple[str, ...] = tuple(s.name for s in STYLES if s.held_out)
CATEGORIES: tuple[str, ...] = tuple(dict.fromkeys(t.category for t in THINGS))
# one pair in ten, spread evenly over objects and styles: no style and no category loses more than
# its share
HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    (o, s)
    for i, o in enumerate(OBJECTS)
    for j, s in enumerate(STYLE_NAMES)
    if (i + 3 * j) % 10 == 0
)
_THING = {t.name: t for t in THINGS}
_STYLE = {s.name: s for s in STYLES}


def thing(name: str, key: str = "concept") -> Thing:
    """Return the object called ``name``.

    Raises:
        UserError: unknown; the message carries the config ``key`` and the nearest names.
    """
    if name not in _THING:
        raise UserError(key, name, f"no such object; {nearest(name, _THING)}")
    return _THING[name]


def style(name: str, key: str = "concept") -> Style:
    """Return the style called ``name`` (`PHOTO` is none). Raises as `thing` does."""
    if name not in _STYLE:
        raise UserError(key, name, f"no such style; {nearest(name, _STYLE)}")
    return _STYLE[name]


def members(category: str) -> tuple[str, ...]:
    """Return the objects of a category that MiniSD sees, in the order of the table."""
    return tuple(t.name for t in THINGS if t.category == category and not t.held_out)
