"""Texts of MiniSD's world, for its tokenizer."""

from lab.minisd.world import captions
from lab.minisd.world.vocabulary import PHOTO, STYLES, THINGS


def world_prompts() -> list[str]:
    """Every single-object caption of the world: all things, all styles (photo included), all ways
    to ask.
    """
    styles = (PHOTO, *(s.name for s in STYLES))
    return [
        text
        for thing in THINGS
        for style in styles
        for by in ("name", "description", "both")
        for text in captions.prompts(captions.noun(thing.name), style, by)
    ]
