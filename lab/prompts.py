"""Prompts from outside: what is refused before it reaches a tokenizer, and what is said about those that are cut."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from lab.errors import UserError

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # reorder what a reader sees
_log = logging.getLogger(__name__)


def check_prompts(key: str, prompts: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """``prompts`` without white space at their ends, fit for ``tokenizer``. Markup such as ``<b>`` is text like any
    other; a special token of the tokenizer is not, since it would end or pad the prompt where it stands. A prompt
    that is longer than the context is cut when it is encoded (`DiffusionModel.tokens`).

    Args:
        key: config key that the prompts come from, for the message.

    Raises:
        UserError: no prompt or no text, an empty prompt, control characters, or a special token.
    """
    if isinstance(prompts, str) or not prompts:
        raise UserError(key, prompts, "must be a list of at least one prompt.")
    special = [t for t in tokenizer.all_special_tokens if len(t) > 1]  # SD 2.x pads with "!", which stays text
    clean = []
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(key, repr(prompt), "is no prompt; every prompt must be a text with at least one letter.")
        text = prompt.strip()
        odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI), None)
        if odd is not None:
            fix = f"holds the control character U+{ord(odd):04X}; a prompt is one line of plain text."
            raise UserError(key, repr(prompt), fix)
        clash = next((t for t in special if t.lower() in text.lower()), None)
        if clash is not None:
            raise UserError(key, repr(prompt), f"holds {clash}, a special token of the tokenizer; take it out.")
        clean.append(text)
    return tuple(clean)


@cache  # each prompt is told once
def warn_cut(prompt: str, context: int, lost: int) -> None:
    """Log that the last ``lost`` tokens of ``prompt`` do not fit."""
    _log.warning("prompt cut to the context of %d tokens, its last %d tokens are ignored: %r", context, lost, prompt)
