"""What scenarios of text-to-image concepts share: checked options, sizes, the hash of what was
loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from lab.core.data import PRECISIONS, CaptionedImages, ConceptCase, Sampling, ScenarioData
from lab.core.errors import UserError, nearest
from lab.core.fingerprint import fingerprint
from lab.core.hashing import stage_key
from lab.core.options import choice, count, number
from lab.core.prompts import text

# every family that a scenario may give a concept; `lab.core.data.Concept.prompts`
FAMILIES = ("name", "description", "reworded", "unseen_pairs")


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
            raise UserError(
                f"{key}.{name}", given[name], f"there is no such key; {nearest(str(name), options)}"
            )
    return {str(name): value for name, value in given.items()}


def sampling(given: object, key: str = "scenario.sampling") -> Sampling:
    """How pictures are generated, from the config node ``key``; what it leaves out is `Sampling`'s
    default.
    """
    if isinstance(given, Sampling):
        found = {field.name: getattr(given, field.name) for field in fields(Sampling)}
    else:
        found = entries(
            key, {} if given is None else given, [field.name for field in fields(Sampling)]
        )
    for name in ("steps", "count"):
        if name in found:
            count(f"{key}.{name}", found[name], 1)
    if "guidance" in found:
        found["guidance"] = number(f"{key}.guidance", found["guidance"], 0)
    if "precision" in found:
        choice(f"{key}.precision", found["precision"], PRECISIONS)
    if "negative" in found:
        found["negative"] = text(f"{key}.negative", found["negative"], empty=True)
    return Sampling(**found)


def resolution(value: object, key: str = "scenario.resolution") -> int:
    """Side of all pictures in pixels: a multiple of 8."""
    side = count(key, value, 8)
    if side % 8:
        raise UserError(
            key, value, "must be a multiple of 8, as latents are 8 (or 4) times smaller."
        )
    return side


def resize(images: Tensor, side: int) -> Tensor:
    """uint8 [n, 3, s, s] to uint8 [n, 3, side, side] (bicubic, antialiased)."""
    if images.shape[-1] == side or not len(images):
        return images if len(images) else images.new_zeros((0, 3, side, side))
    large = torch.nn.functional.interpolate(
        images.float(), (side, side), mode="bicubic", antialias=True
    )
    return large.round().clamp(0, 255).to(torch.uint8)


def cycled(prompts: Sequence[str], total: int) -> tuple[str, ...]:
    """At least ``total`` prompts: all of them, then again from the first one."""
    return tuple(prompts[i % len(prompts)] for i in range(max(total, len(prompts))))


def empty(side: int) -> CaptionedImages:
    return CaptionedImages(torch.zeros((0, 3, side, side), dtype=torch.uint8), ())


def loaded(cases: Iterable[ConceptCase], notes: Iterable[str]) -> ScenarioData:
    """The cases with their hash over pictures, prompts and roles; every note once."""
    found = tuple(cases)
    key = stage_key(cases=[fingerprint(case, derived=False) for case in found])
    return ScenarioData(found, tuple(dict.fromkeys(notes)), key)
