"""Texts from outside: what is refused before it reaches a tokenizer, and what is said about those
that are cut.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from lab.core.data import ConceptCase
from lab.core.errors import UserError

_BIDI = frozenset(
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # reorder what a reader sees
_log = logging.getLogger(__name__)


def text(key: str, value: object, *, empty: bool = False) -> str:
    """``value`` without white space at its ends, when it can be a prompt or a part of one.

    Args:
        key: config key that it comes from, for the message.
        empty: "" is fine too, where it stands for none.

    Raises:
        UserError: no text, an empty one, or one with baseline characters.
    """
    if empty and value == "":
        return ""
    if not isinstance(value, str) or not value.strip():
        raise UserError(key, repr(value), "must be a text with at least one word.")
    found = value.strip()
    odd = next((c for c in found if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI), None)
    if odd is not None:
        fix = f"holds the baseline character U+{ord(odd):04X}; a prompt is one line of plain text."
        raise UserError(key, repr(value), fix)
    return found


def texts(key: str, value: object, *, least: int = 1, repeats: bool = False) -> tuple[str, ...]:
    """A list of prompts, without its ``repeats`` unless they count; a single text is a list of one.
    Raises as `text` does.
    """
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or len(items) < least:
        raise UserError(
            key, value, f"must be a list of {f'at least {least} ' if least else ''}prompts."
        )
    found = tuple(text(f"{key}[{i}]", item) for i, item in enumerate(items))
    return found if repeats else tuple(dict.fromkeys(found))


def check_prompts(key: str, prompts: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """``prompts`` without white space at their ends, fit for ``tokenizer``. A prompt that is longer
    than the context is cut when it is encoded (`DiffusionModel.tokens`).

    Raises:
        UserError: no prompt, and as `text` and `refuse_special` do.
    """
    if isinstance(prompts, str) or not prompts:
        raise UserError(key, prompts, "must be a list of at least one prompt.")
    clean = tuple(text(key, prompt) for prompt in prompts)
    refuse_special(key, clean, [tokenizer])
    return clean


def refuse_special(
    key: str, prompts: Iterable[str], tokenizers: Iterable[Any], where: str = ""
) -> None:
    """Markup such as ``<b>`` is text like any other; a special token of a tokenizer is not, since
    it would end or pad the prompt where it stands.

    Args:
        where: what the prompts are, for the message.

    Raises:
        UserError: a prompt with a special token.
    """
    found = {token for tokenizer in tokenizers for token in tokenizer.all_special_tokens}
    special = sorted(
        token for token in found if len(token) > 1
    )  # SD 2.x pads with "!", which stays text
    for prompt in prompts:
        clash = next((token for token in special if token.lower() in prompt.lower()), None)
        if clash is not None:
            told = (
                f"holds {clash}, a special token of the "
                f"tokenizer{f', in {where}' if where else ''}; take it out."
            )
            raise UserError(key, repr(prompt), told)


def check_case(case: ConceptCase, tokenizers: Sequence[Any]) -> None:
    """Every text of ``case`` that is encoded as it stands; what is erased is checked by its eraser.

    Raises:
        UserError: as `refuse_special`; names the case, and the concept where it is one's.
    """
    for where, prompts in _spoken(case):
        refuse_special("scenario", prompts, tokenizers, f"{where}, case {case.name}")


def _spoken(case: ConceptCase) -> Iterator[tuple[str, tuple[str, ...]]]:
    for concept in (*case.targets, *case.others, *case.rehearsal):
        for family, prompts in concept.prompts.items():
            yield f"{family} prompts of concept {concept.name}", prompts
        for part in ("own", "train", "reference", "prior"):
            yield (
                f"captions of {part} pictures of concept {concept.name}",
                getattr(concept, part).prompts,
            )
    yield "captions of keep", case.keep.prompts
    yield "captions of unrelated", case.unrelated.prompts
    yield "captions of C_reg", case.regularizers
    yield "sampling.negative", (case.sampling.negative,)


@cache  # each prompt is told once
def warn_cut(prompt: str, context: int, lost: int) -> None:
    """Log that the last ``lost`` tokens of ``prompt`` do not fit."""
    _log.warning(
        "prompt cut to the context of %d tokens, its last %d tokens are ignored: %r",
        context,
        lost,
        prompt,
    )
