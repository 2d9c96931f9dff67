"""What scenarios of text-to-image concepts share: checked options, sizes, prompts, the hash of what was loaded."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from lab.cases import fingerprint
from lab.errors import UserError, nearest
from lab.options import choice, count, number
from lab.store import stage_key
from lab.types import PRECISIONS, ConceptCase, Pictures, Sampling, ScenarioData

# every family that a scenario may give a concept; `lab.types.Concept.prompts`
FAMILIES = ("name", "description", "reworded", "unseen_pairs")
_REORDERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # change what a reader sees


def plain(value: Any) -> Any:
    """Lists and mappings of a config as Python's own."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def entries(key: str, given: object, known: Iterable[str]) -> dict[str, Any]:
    """``given`` as a mapping with ``known`` keys only.

    Raises:
        UserError: no mapping, or an unknown key (with the nearest ones).
    """
    options, given = tuple(known), plain(given)
    if not isinstance(given, Mapping):
        raise UserError(key, given, f"must be a mapping with keys of {', '.join(options)}.")
    for name in given:
        if name not in options:
            raise UserError(f"{key}.{name}", given[name], f"there is no such key; {nearest(str(name), options)}")
    return {str(name): value for name, value in given.items()}


def sampling(given: object, key: str = "scenario.sampling") -> Sampling:
    """How pictures are generated, from the config node of that name; what it leaves out is `Sampling`'s default."""
    if isinstance(given, Sampling):
        found = {field.name: getattr(given, field.name) for field in fields(Sampling)}
    else:
        found = entries(key, given or {}, [field.name for field in fields(Sampling)])
    for name in ("steps", "count"):
        if name in found:
            count(f"{key}.{name}", found[name], 1)
    if "guidance" in found:
        found["guidance"] = number(f"{key}.guidance", found["guidance"], 0)
    if "precision" in found:
        choice(f"{key}.precision", found["precision"], PRECISIONS)
    if "negative" in found and found["negative"] != "":
        text(f"{key}.negative", found["negative"])
    return Sampling(**found)


def text(key: str, value: object) -> str:
    """``value`` when it can be a prompt.

    Raises:
        UserError: no text, an empty one, or one with control characters.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError(key, value, "must be a text with at least one word.")
    for letter in value.strip():
        if unicodedata.category(letter) in ("Cc", "Cs") or unicodedata.bidirectional(letter) in _REORDERING:
            fix = f"holds the control character U+{ord(letter):04X}; a prompt is one line of plain text."
            raise UserError(key, repr(value), fix)
    return value.strip()


def texts(key: str, value: object, least: int = 1) -> tuple[str, ...]:
    """A list of prompts without repeats; a single text counts as a list of one. Raises as `text` does."""
    value = plain(value)
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or len(items) < least:
        raise UserError(key, value, f"must be a list of at least {least} prompts.")
    return tuple(dict.fromkeys(text(f"{key}[{i}]", item) for i, item in enumerate(items)))


def resolution(value: object, key: str = "scenario.resolution") -> int:
    """Side of all pictures in pixels: a multiple of 8."""
    side = count(key, value, 8)
    if side % 8:
        raise UserError(key, value, "must be a multiple of 8, as latents are 8 (or 4) times smaller.")
    return side


def resize(images: Tensor, side: int) -> Tensor:
    """uint8 [n, 3, s, s] to uint8 [n, 3, side, side] (bicubic, antialiased)."""
    if images.shape[-1] == side or not len(images):
        return images if len(images) else images.new_zeros((0, 3, side, side))
    large = torch.nn.functional.interpolate(images.float(), (side, side), mode="bicubic", antialias=True)
    return large.round().clamp(0, 255).to(torch.uint8)


def cycled(prompts: Sequence[str], total: int) -> tuple[str, ...]:
    """At least ``total`` prompts: all of them, then again from the first one."""
    return tuple(prompts[i % len(prompts)] for i in range(max(total, len(prompts))))


def empty(side: int) -> Pictures:
    return Pictures(torch.zeros((0, 3, side, side), dtype=torch.uint8), ())


def loaded(cases: Iterable[ConceptCase], notes: Iterable[str]) -> ScenarioData:
    """The cases with their hash over pictures, prompts and roles; every note once."""
    found = tuple(cases)
    key = stage_key(cases=[fingerprint(case) for case in found])
    return ScenarioData(found, tuple(dict.fromkeys(notes)), key)
