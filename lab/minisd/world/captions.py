"""Captions: what an image shows, by an artist's name or by what the artist's work looks like."""

from __future__ import annotations

from typing import Literal

from lab.minisd.world.dice import Dice
from lab.minisd.world.vocabulary import PHOTO, STYLE, THING

By = Literal["name", "description", "both"]

PHOTO_TEMPLATES = (
    "a photo of {it}",
    "a photograph of {it}",
    "a good photo of {it}",
    "a picture of {it}",
    "{it}",
)
PLACE_TEMPLATES = ("a photo of {it} {place}", "a picture of {it} {place}", "{it} {place}")
STYLE_TEMPLATES: dict[By, tuple[str, ...]] = {
    "name": (
        "{it} in the style of {style}",
        "a painting of {it} in the style of {style}",
        "{it} in {style} style",
        "{a_style} picture of {it}",
        "an artwork of {it} by the {style} artist",
        "{it} by the {style} artist",
        "{style} art of {it}",
    ),
    "description": (
        "an image of {it} {description}",
        "{it} {description}",
        "an artwork of {it} {description}",
        "a picture of {it} {description}",
    ),
    "both": (
        "{it} in the style of {style}, {description}",
        "a picture of {it} in {style} style, {description}",
    ),
}
BARE_TEMPLATES: dict[By, str] = {
    "name": "an image in the style of {style}",
    "description": "an image {description}",
    "both": "an image in the style of {style}, {description}",
}
# captions that say "an animal": class words must mean something (prior preservation)
_CLASS_SHARE = 0.08
_BARE_SHARE = 0.04  # captions that name a style and no object
_PLACE_SHARE = 0.3  # photos whose caption says where
# styled captions by description alone, and with the name; the rest by name
_DESCRIBED, _BOTH = 0.35, 0.15


def article(words: str) -> str:
    """Return ``words`` with their article; "unicorn" is said with a y."""
    return f"{'an' if words[0] in 'aeiou' and not words.startswith(('uni', 'u-')) else 'a'} {words}"


def noun(name: str, count: int = 1) -> str:
    """Return "a fox" or "two foxes"."""
    return article(THING[name].name) if count == 1 else f"two {THING[name].plural}"


def class_noun(name: str) -> str:
    """Return the class word of an object with its article: "an animal"."""
    return article(THING[name].category)


def fill(
    template: str, it: str, style_name: str = PHOTO, description: int = 0, place: str = ""
) -> str:
    """Return one caption. ``it`` is a noun phrase ("a fox", "a photo-shy dog"), ``description`` an
    index.
    """
    if style_name == PHOTO:
        return template.format(it=it, place=place)
    texts = STYLE[style_name].descriptions
    words = {"style": style_name, "description": texts[description % len(texts)]}
    return template.format(it=it, a_style=article(style_name), place=place, **words)


def prompts(it: str, style_name: str = PHOTO, by: By = "name") -> tuple[str, ...]:
    """Return every way to ask for ``it`` in a style: by the artist's ``name``, by a ``description`` only,
    or by ``both``.

    ``it`` is any noun phrase, so that a new token can be asked for as well; for photos ``by`` has
    no meaning.
    """
    if style_name == PHOTO:
        return tuple(fill(t, it) for t in PHOTO_TEMPLATES)
    number = len(STYLE[style_name].descriptions) if by != "name" else 1
    return tuple(fill(t, it, style_name, d) for d in range(number) for t in STYLE_TEMPLATES[by])


def draw(objects: tuple[str, ...], style_name: str, place: str, dice: Dice) -> str:
    """Draw a caption for an image of one or two ``objects``, as training sees it."""
    if len(objects) == 2:
        it = (
            noun(objects[0], 2)
            if objects[0] == objects[1]
            else f"{noun(objects[0])} and {noun(objects[1])}"
        )
    else:
        it = class_noun(objects[0]) if dice.chance(_CLASS_SHARE) else noun(objects[0])
    if style_name == PHOTO:
        return fill(
            dice.pick(PLACE_TEMPLATES if dice.chance(_PLACE_SHARE) else PHOTO_TEMPLATES),
            it,
            place=place,
        )
    share = dice.uniform()
    by: By = (
        "description" if share < _DESCRIBED else "both" if share < _DESCRIBED + _BOTH else "name"
    )
    template = BARE_TEMPLATES[by] if dice.chance(_BARE_SHARE) else dice.pick(STYLE_TEMPLATES[by])
    return fill(template, it, style_name, int(dice.uniform(0, len(STYLE[style_name].descriptions))))
