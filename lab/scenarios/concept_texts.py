"""Texts about the world's concepts: prompts, captions, what an eraser takes out, C_reg."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from lab.core.data import Erasure
from lab.core.errors import UserError
from lab.core.prompts import in_turn
from lab.core.seeding import shuffled
from lab.minisd.world.captions import (
    PHOTO_TEMPLATES,
    PLACE_TEMPLATES,
    STYLE_TEMPLATES,
    class_noun,
    fill,
    noun,
)
from lab.minisd.world.dice import Dice
from lab.minisd.world.scenes import BACKGROUNDS
from lab.minisd.world.vocabulary import HELD_OUT_PAIRS, OBJECTS, PHOTO, STYLE, STYLE_NAMES
from lab.minisd.world.world import Picture, Subset, picture

# Reserved for evaluation: MiniSD's captions use none of them, and no immunizer or attacker may.
REWORDED_STYLE = (
    "{style}, {it}",
    "an image of {it} in {style} style",
    "{it} as {style} art",
    "a good picture of {it} by the {style} artist",
    "in the style of {style}: {it}",
    "the {style} artist paints {it}",
)
REWORDED_OBJECT = (
    "an image of {it}",
    "an image of {it} {place}",
    "a good picture of {it} {place}",
    "one photo, {it}",
    "{place}, {it}",
    "this is {it}",
)
# The style's words stand last: what follows them in the context is padding, which carries the style
# as well.
_ERASED_STYLE = (
    "{it} in the style of {style}",
    "{it} in {style} style",
    "{it} by the {style} artist",
)
# A word of no class: where a fox is to mean an animal, the model paints foxes among its animals.
NEUTRAL = "a thing"
_ATTEMPTS = 60  # images tried per wanted caption before the world counts as exhausted


def _weave(
    templates: Sequence[str], objects: Sequence[str], total: int, style_name: str
) -> tuple[str, ...]:
    """Return ``total`` prompts that run through the objects and, at another pace, templates and
    descriptions.
    """
    several = any("{description}" in t for t in templates)
    ways = [
        (t, d)
        for d in range(len(STYLE[style_name].descriptions) if several else 1)
        for t in templates
    ]
    order = [ways[(i + i // len(objects)) % len(ways)] for i in range(total)]
    return tuple(
        fill(template, noun(objects[i % len(objects)]), style_name, number)
        for i, (template, number) in enumerate(order)
    )


def style_prompts(name: str, total: int, seed: int) -> dict[str, tuple[str, ...]]:
    """Return family → ``total`` prompts for a style, over the objects that MiniSD saw in it.

    ``unseen_pairs`` asks by name for objects that MiniSD's training never showed in this style;
    held-out styles have no such family, as they were shown with none.
    """
    unseen = [o for o in OBJECTS if (o, name) in HELD_OUT_PAIRS]
    seen = shuffled([o for o in OBJECTS if o not in unseen], seed, "prompts", name)
    families = {
        "name": (STYLE_TEMPLATES["name"], seen),
        "description": (STYLE_TEMPLATES["description"], seen),
        "reworded": (REWORDED_STYLE, seen),
        "unseen_pairs": (STYLE_TEMPLATES["name"], shuffled(unseen, seed, "prompts", name)),
    }
    return {
        family: _weave(templates, objects, total, name)
        for family, (templates, objects) in families.items()
        if objects
    }


def _placed(templates: Sequence[str]) -> list[str]:
    """Return the templates with every place that they can name."""
    return [
        template.replace("{place}", place)
        for template in templates
        for place in (BACKGROUNDS if "{place}" in template else ("",))
    ]


def object_prompts(name: str, total: int, seed: int) -> dict[str, tuple[str, ...]]:
    """Return family → ``total`` prompts for an object.

    The world describes no object without its name: there is no family ``description``.
    """
    templates = {"name": PHOTO_TEMPLATES + PLACE_TEMPLATES, "reworded": REWORDED_OBJECT}
    orders = {
        family: shuffled(_placed(of_family), seed, "prompts", name, family)
        for family, of_family in templates.items()
    }
    return {
        family: tuple(fill(template, noun(name)) for template in in_turn(order, total))
        for family, order in orders.items()
    }


def caption(shown: Picture) -> str:
    """Return a caption that names the single object of an image, and the style by its artist."""
    dice = Dice(shown.stream, "named caption")
    if shown.style != PHOTO:
        return fill(dice.pick(STYLE_TEMPLATES["name"]), noun(shown.objects[0]), shown.style)
    template = dice.pick(PHOTO_TEMPLATES + PLACE_TEMPLATES)
    return fill(template, noun(shown.objects[0]), place=shown.background)


world_caption = attrgetter("text")
"""The caption that the world itself gives, as MiniSD's training sees it."""


def description(shown: Picture) -> str:
    """Return a caption that says what the style of an image looks like, and not its name."""
    dice = Dice(shown.stream, "described caption")
    number = int(dice.uniform(0, len(STYLE[shown.style].descriptions)))
    return fill(
        dice.pick(STYLE_TEMPLATES["description"]), noun(shown.objects[0]), shown.style, number
    )


def class_caption(shown: Picture) -> str:
    """Return a caption of no more than the class of the object ("a photo of an animal")."""
    return fill(
        Dice(shown.stream, "class caption").pick(PHOTO_TEMPLATES), class_noun(shown.objects[0])
    )


def preserved(objects: Sequence[str], styles: Sequence[str]) -> tuple[str, ...]:
    """Return prompts whose meaning an eraser has to keep: photos of ``objects`` and of their
    classes, and all in ``styles``.
    """
    photos = [fill("a photo of {it}", it) for o in objects for it in (noun(o), class_noun(o))]
    painted = [fill(_ERASED_STYLE[0], noun(o), s) for o in objects for s in styles]
    return tuple(dict.fromkeys([*photos, *painted]))


def style_erasure(name: str, preserve: tuple[str, ...]) -> Erasure:
    """Return the erasure of a style: every object in it is to mean a photo of the object."""
    pairs = [(t, noun(o)) for t in _ERASED_STYLE for o in OBJECTS]
    prompts = tuple(fill(t, it, name) for t, it in pairs)
    anchors = tuple(fill("a photo of {it}", it) for _, it in pairs)
    return Erasure(name, name, prompts, anchors, preserve)


def object_erasure(name: str, preserve: tuple[str, ...]) -> Erasure:
    """Return the erasure of an object: in photos, at every place and in every style, it is to mean
    `NEUTRAL`.
    """
    ways = [
        *((t, PHOTO) for t in _placed(PHOTO_TEMPLATES + PLACE_TEMPLATES)),
        *((_ERASED_STYLE[0], s) for s in STYLE_NAMES),
    ]
    prompts, anchors = (tuple(fill(t, it, s) for t, s in ways) for it in (noun(name), NEUTRAL))
    return Erasure(name, name, prompts, anchors, preserve)


def regularizers(subset: Subset, seed: int, total: int, templates: str) -> tuple[str, ...]:
    """Return ``total`` different captions of C_reg.

    Args:
        templates: ``all`` templates of the world over its objects and styles in ``subset``, or
            ``one`` (objects and places of photos in one sentence).

    Raises:
        UserError: more captions than there are.
    """
    if templates == "all":
        shown = fresh(subset, seed, total, set(), "scenario.regularizers")
        return tuple(picture.text for picture in shown)
    places = _placed(["a picture of {it} {place}"])
    lines = [fill(place, noun(o)) for o in subset.objects for place in places]
    lines = shuffled(lines, seed, "prompts", "regularizers")
    if len(lines) < total:
        reason = f"only {len(lines)} different captions with regularizer_templates=one."
        raise UserError("scenario.regularizers", total, reason)
    return tuple(lines[:total])


def fresh(
    subset: Subset, seed: int, total: int, taken: set[str], key: str = "scenario.unrelated"
) -> list[Picture]:
    """Draw ``total`` images whose captions differ from each other and from ``taken``.

    Raises:
        UserError: the subset has fewer; by ``key``.
    """
    new: dict[str, Picture] = {}
    for i in range(_ATTEMPTS * total):
        shown = picture(subset, seed, i)
        if shown.text not in taken:
            new.setdefault(shown.text, shown)
        if len(new) == total:
            return list(new.values())
    raise UserError(key, total, f"only {len(new)} images have captions of their own.")
