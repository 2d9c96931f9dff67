"""Check prompts before they reach a tokenizer, and write captions of a concept by template."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

from lab.core.config import plain_line
from lab.core.data import CaptionedImages, Concept, ConceptCase
from lab.core.errors import UserError

Item = TypeVar("Item")
_log = logging.getLogger(__name__)
_FILLER = frozenset(
    re.findall(r"\w+", "a an the of in on at with and one two photo photograph picture image good")
)
_ENOUGH = 8  # captions that cannot share more than their class by chance


def in_turn(items: Sequence[Item], count: int) -> list[Item]:
    """Return ``count`` items in turn, starting again where they run out."""
    return [items[i % len(items)] for i in range(count)]


def texts(key: str, prompts: Sequence[str]) -> tuple[str, ...]:
    """Return prompts without white space at their ends, each once.

    Config classes declare `lab.core.config.Prompts` instead.

    Args:
        key: config key that they come from, for the message.

    Raises:
        UserError: an empty one, or one with control characters.
    """
    lines: dict[str, None] = {}
    for i, prompt in enumerate(prompts):
        try:
            lines[plain_line(prompt)] = None
        except ValueError as error:
            raise UserError(f"{key}[{i}]", repr(prompt), f"{error}.") from None
    return tuple(lines)


def refuse_special(key: str, prompts: Iterable[str], tokenizers: Iterable[Any]) -> None:
    """Refuse special tokens of a tokenizer, which would end or pad the prompt where they stand.

    Other markup such as ``<b>`` is text.

    Raises:
        UserError: a prompt with a special token.
    """
    tokens = {token for tokenizer in tokenizers for token in tokenizer.all_special_tokens}
    special = sorted(token for token in tokens if len(token) > 1)  # SD 2.x pads with "!"
    for prompt in prompts:
        clash = next((token for token in special if token.lower() in prompt.lower()), None)
        if clash is not None:
            reason = f"holds {clash}, a special token of the tokenizer; take it out."
            raise UserError(key, repr(prompt), reason)


def check_case(case: ConceptCase, tokenizers: Sequence[Any]) -> None:
    """Check every text of ``case`` that is encoded as it stands.

    Raises:
        UserError: as `refuse_special`.
    """
    prompts = [
        *case.keep.prompts,
        *case.unrelated.prompts,
        *case.regularizers,
        case.sampling.negative,
    ]
    for concept in (*case.targets, *case.others, *case.rehearsal):
        for family in concept.prompts.values():
            prompts += family
        for images in (concept.own, concept.train, concept.reference, concept.prior):
            prompts += images.prompts
    for erasure in case.erased:
        prompts += (*erasure.prompts, *erasure.anchors, *erasure.preserve)
    refuse_special("scenario", prompts, tokenizers)


@cache  # each prompt is logged once
def warn_cut(prompt: str, context: int, lost: int) -> None:
    """Log that the last ``lost`` tokens of ``prompt`` do not fit."""
    _log.warning(
        "prompt cut to the context of %d tokens, its last %d tokens are ignored: %r",
        context,
        lost,
        prompt,
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
    task: Concept, images: CaptionedImages, template: str, expression: str
) -> tuple[str, ...]:
    """Return one caption per image.

    Args:
        task: gives the words to replace and the description prompts.
        images: what the captions are about.
        template: ``name``: their own captions; ``token``: the same with the concept's words
            replaced by ``expression`` (a caption without the words gets it in front);
            ``description``: the images' captions by description, or, where the scenario has none,
                the task's description prompts in turn.
        expression: the token, with a class noun where the attacker uses one.
    """
    if template == "description":
        if images.described:
            return images.described
        return tuple(in_turn(task.prompts["description"], len(images)))
    if template == "name":
        return tuple(images.prompts)
    return tuple(spoken(caption, task.words, expression) for caption in images.prompts)


def spoken(text: str, words: str, expression: str) -> str:
    """Return ``text`` with ``expression`` in place of ``words`` (any case, plural in s or es too),
    or in front of it.
    """
    pattern = rf"(?<!\w){re.escape(words)}(?:e?s)?(?!\w)"
    new = re.sub(pattern, lambda _: expression, text, flags=re.IGNORECASE)
    return new if new != text else f"{expression}, {text}"
