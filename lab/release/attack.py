"""`action=export export.attack=NAME`: what an attacker of a record ended with, as files that
diffusers loads.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from attacks.diffusion.export import export as write
from lab.core.cache import StageCache
from lab.core.errors import UserError, nearest
from lab.core.options import choice
from lab.core.record import Record
from lab.core.types import BASELINE, Trajectory
from lab.release.source import command_of, target

_OPTIONS = ("attack", "task", "case", "seed")


def export_attack(record: Record, cfg: DictConfig) -> Path:
    """Write the weights of one attack to ``path``: a peft adapter, a U-Net, or deltas and
    embeddings.

    Raises:
        UserError: no such attack, or several and no choice; weights that are not in the cache or
            were not kept; a target folder that is not empty; ``push_to``: an attack is not
            published.
    """
    if cfg.push_to is not None:
        raise UserError(
            "push_to",
            cfg.push_to,
            "is for immunized models; what an attack taught a model stays here.",
        )
    cell = choose_attack(record, cfg.export)
    where = " ".join(str(cell[key]) for key in ("attack", "task", "model", "case", "seed"))
    plain = re.sub(
        r"[^\w.-]+", "-", f"{record['name'].split('/')[0]} {where} {record['content_hash'][:8]}"
    )
    folder = target(cfg, plain)
    found = StageCache(cfg.paths.cache).read("attack", cell["key"])
    if found is None:
        told = (
            f"holds no whole weights of {where} (stage attack {cell['key'][:12]}…). Set "
            "paths.cache to the cache of "
        )
        raise UserError(
            "paths.cache",
            cfg.paths.cache,
            f"{told}that run, or compute them again: {command_of(record)}",
        )
    weights = {
        name.removeprefix("weights/"): t
        for name, t in found.tensors.items()
        if name.startswith("weights/")
    }
    if "form" not in found.values["info"]:
        raise UserError(
            "export.attack",
            cell["attack"],
            "attacks no text-to-image model; its weights have no format.",
        )
    for path in write(Trajectory(**found.values, weights=weights, samples={}), folder):
        print(f"  {path.relative_to(folder)}")
    return folder


def choose_attack(record: Record, options: Any) -> dict[str, Any]:
    """The attack stage that ``options`` (``attack``, ``task``, ``model_name``, ``case``, ``seed``)
    select.
    """
    model_name = record["immunizer"] if options.model_name is None else str(options.model_name)
    choice("export.model", model_name, dict.fromkeys((record["immunizer"], BASELINE)))
    fine = [
        c
        for c in record["cells"]
        if c["stage"] == "attack" and c["model"] == model_name and c["status"] == "ok"
    ]
    if not fine:
        raise UserError("records", record["name"], f"holds no finished attack on {model_name}.")
    for option in _OPTIONS:
        given, known = options[option], list(dict.fromkeys(c[option] for c in fine))
        if given is not None and given not in known:
            raise UserError(f"export.{option}", given, nearest(str(given), map(str, known)))
        fine = [c for c in fine if given is None or c[option] == given]
    if len(fine) != 1:
        open_ = [option for option in _OPTIONS if len({c[option] for c in fine}) > 1]
        told = "; ".join(
            f"export.{o}: {', '.join(dict.fromkeys(str(c[o]) for c in fine))}" for o in open_
        )
        raise UserError("export", f"{len(fine)} attacks", f"choose one by {told}.")
    return fine[0]
