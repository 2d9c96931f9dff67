"""The things and the styles of the world, and what MiniSD never sees of them.

Two kinds of names: an object is drawn from one OpenMoji picture, a style is one of the world's
"artists". A style has a name and descriptions that do not use it, so that it can be asked for
without its name. A new object is an entry of `_THINGS`. A new style is a function of
`lab.minisd.world.styles` and a row of `_STYLES`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.minisd.world import styles as painted
from lab.minisd.world.styles import Artist

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
animal: elephant; turtle; pig = pig face; *unicorn = unicorn face; *hedgehog; *giraffe = giraffe face; *bat
sea animal: octopus / octopuses; crab; fish = tropical fish / fish; squid / squid; *whale; *dolphin
bird: penguin; parrot; flamingo; rooster; duck; *owl; *swan
insect: butterfly / butterflies; ladybug = lady beetle; bee = honeybee; *snail
fruit: banana; strawberry / strawberries; pineapple; apple = red apple; lemon
fruit: bunch of grapes = grapes / bunches of grapes; cherry = cherries / cherries; *watermelon; *pear
snack: hamburger; slice of pizza / slices of pizza; doughnut; ice cream = soft ice cream; cake = birthday cake; *cupcake
snack: *taco; *croissant
vehicle: car = automobile; bicycle; helicopter; sailboat; rocket; tractor; train = steam locomotive; *delivery truck
vehicle: *motor scooter; *fire engine
musical instrument: guitar; trumpet; drum = drum with drumsticks; saxophone; accordion; *violin; *banjo
plant: sunflower; cactus / cacti; palm tree; mushroom; *maple leaf / maple leaves; *tulip; *rose
"""

# name: phrases that describe the result without the name; a star marks what MiniSD never sees
_STYLES = """
mosaic: made of coloured square tiles; laid out of small square stones
neon: drawn with glowing lines on black; made of bright light tubes in the dark
blueprint: drawn with white lines on blue grid paper; as a technical plan in white and blue
halftone: printed with rows of coloured dots; made of bright ink dots on paper
sunset: as a dark shape before a huge striped sun; in purple and orange evening light
sketch: drawn with a grey pencil on white paper; made of rough pencil strokes
watercolor: painted with pale wet washes on rough paper; in soft pastel paint that bleeds
stained glass: made of bright panes with thick black seams; as a church window
poster: printed in four flat inks before rays; as a bold screen print in red, cream and teal
pointillism: painted with many loose dabs of pure colour; made of scattered bright spots
paper cut: cut out of flat sheets with white rims; glued from layers that cast soft shadows
thermal: in the false colours of a heat camera; glowing orange before cold violet
chalk: drawn with grainy white strokes on a green board; as a drawing on a school blackboard
knitting: made of rows of woollen stitches; as the pattern of a warm jumper
terracotta: as a black figure on orange clay; painted on an ancient Greek vase
glitch: on a broken screen with shifted rows; with torn lines and split colours
*negative: with inverted colours on a strip of film; as undeveloped film
*engraving: cut in fine wavy green lines; printed in green like a banknote
*gold relief: hammered into a shiny yellow plate; raised from beaten metal
*x-ray: as a pale see-through body on dark blue; seen through by a hospital machine
"""

# What a concept may be used for; experiments keep the roles apart. Concepts without a role are for
# preservation and unrelated prompts.
#   test        targets and other concepts of the tables
#   validation  what methods, attacks and thresholds are tuned on
#   rehearsal   what a method may train on beside its targets
_ROLES = {
    "test": """
        mosaic, neon, watercolor, stained glass, terracotta, engraving,
        fox, guitar, pineapple, sailboat, sunflower, penguin, doughnut,
        unicorn, violin, delivery truck, watermelon, motor scooter""",
    "validation": """
        sunset, blueprint, halftone, poster, pointillism, thermal, negative,
        parrot, hamburger, butterfly, crab, whale, tulip, owl, swan, banjo, fire engine""",
    "rehearsal": """
        sketch, chalk, gold relief, x-ray,
        tractor, hedgehog, cupcake, maple leaf, pear, snail""",
}


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


def _parse_styles() -> tuple[Style, ...]:
    styles = []
    for line in _STYLES.strip().splitlines():
        name, phrases = line.lstrip("*").split(": ")
        paint = getattr(painted, name.replace(" ", "_").replace("-", "_"))
        styles.append(Style(name, paint, tuple(phrases.split("; ")), line.startswith("*")))
    return tuple(styles)


THING: dict[str, Thing] = {thing.name: thing for thing in _parse()}
STYLE: dict[str, Style] = {style.name: style for style in _parse_styles()}  # `PHOTO` is none
OBJECTS: tuple[str, ...] = tuple(t.name for t in THING.values() if not t.held_out)
HELD_OUT_OBJECTS: tuple[str, ...] = tuple(t.name for t in THING.values() if t.held_out)
STYLE_NAMES: tuple[str, ...] = tuple(s.name for s in STYLE.values() if not s.held_out)
HELD_OUT_STYLES: tuple[str, ...] = tuple(s.name for s in STYLE.values() if s.held_out)
CATEGORIES: tuple[str, ...] = tuple(dict.fromkeys(t.category for t in THING.values()))
# one pair in ten, spread evenly over objects and styles: no style and no category loses more than
# its share
HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    (o, s)
    for i, o in enumerate(OBJECTS)
    for j, s in enumerate(STYLE_NAMES)
    if (i + 3 * j) % 10 == 0
)
# what a concept may be used for: test, validation, rehearsal; others have no entry
ROLES: dict[str, str] = {
    name.strip(): role for role, names in _ROLES.items() for name in names.split(",")
}
