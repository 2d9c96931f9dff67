"""Captions of a concept's images by template, as attackers write them."""

from __future__ import annotations

import re

from lab.core.data import CaptionedImages, Concept

TEMPLATES = ("name", "token", "description")
_FILLER = frozenset(
    re.findall(r"\w+", "a an the of in on at with and one two photo photograph picture image good")
)
_ENOUGH = 8  # captions that cannot share more than their class by chance


def renamed(text: str, words: str, new: str) -> str:
    """Return ``text`` with ``words`` (any case, plural in s or es too) replaced by ``new``."""
    return re.sub(
        rf"(?<!\w){re.escape(words)}(?:e?s)?(?!\w)", lambda _: new, text, flags=re.IGNORECASE
    )


def class_words(task: Concept) -> str:
    """Return the class noun of ``task``: what all captions of its prior images share, articles and
    media left out.

    Captions "a photo of an animal" give "animal"; captions of mixed things give "". Few captions
    can share more than their class ("a brown dog sitting"): below `_ENOUGH` of them, several shared
    words are taken for chance.
    """
    captions = [re.findall(r"\w+", caption.lower()) for caption in task.prior.prompts]
    shared = set.intersection(*map(set, captions)) - _FILLER if captions else set()
    if not shared or (len(shared) > 1 and len(captions) < _ENOUGH):
        return ""
    return " ".join(word for word in captions[0] if word in shared)


def captions(
    task: Concept, pictures: CaptionedImages, template: str, expression: str
) -> tuple[str, ...]:
    """Return one caption per image.

    Args:
        task: gives the words to replace and the description prompts.
        pictures: whose captions are asked for.
        template: ``name``: their own captions; ``token``: the same with the concept's words
            replaced by ``expression`` (a caption without the words gets it in front);
            ``description``: the pictures' captions by description, or, where the scenario has none,
                the task's description prompts in turn.
        expression: the token, with a class noun where the attacker uses one.
    """
    if template == "description":
        if pictures.described:
            return pictures.described
        prompts = task.prompts["description"]
        return tuple(prompts[i % len(prompts)] for i in range(len(pictures)))
    if template == "name":
        return tuple(pictures.prompts)
    return tuple(spoken(caption, task.words, expression) for caption in pictures.prompts)


def spoken(text: str, words: str, expression: str) -> str:
    """Return ``text`` with ``expression`` in place of ``words``, or in front of it."""
    new = renamed(text, words, expression)
    return new if new != text else f"{expression}, {text}"
