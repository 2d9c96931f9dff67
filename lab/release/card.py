"""The model card of an export, from the template ``card.md``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class

from eval.report.leaderboard import columns
from eval.report.outcomes import outcome
from eval.report.words import ARROWS, figure, flatten, heading, interval, support
from lab.core.record import Record
from lab.core.sources import ROOT
from lab.core.types import BASELINE, Attacker

_TEMPLATE = Path(__file__).with_name("card.md")
_LIBRARIES = {"diffusion": "diffusers", "deep": "timm", "linear": "safetensors"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SKIPPED = ("_convert_", "name", "sampling", "keep_weights", "families", "explosion", "search")


def make_card(record: Record, facts: dict[str, Any], credits: Sequence[str]) -> str:
    """Return the card in Markdown, with the front matter that hubs read.

    Args:
        facts: what ``export.json`` says.
        credits: whose data the scenario's are, and further notes on them.
    """
    config, kind = record["config"], facts["kind"]
    path = config["backbone"].get("path")
    # names of folders stay private
    is_hub_name = bool(_HUB_NAME.fullmatch(str(path))) and not Path(str(path)).is_dir()
    data = ModelCardData(
        library_name=_LIBRARIES[kind],
        license="cc-by-sa-4.0" if path == "minisd" else "other",
        license_name=None if path == "minisd" else "see-data-and-licence",
        pipeline_tag="text-to-image" if kind == "diffusion" else None,
        base_model=path if is_hub_name else None,
        tags=["model-immunization"],
    )
    values: dict[str, Any] = {
        "record": record,
        "facts": facts,
        "attackers": find_attackers(kind),
        "cells": [cell for cell in record["cells"] if cell["stage"] == "attack"],
        "columns": columns(record["metrics"]),
        "credits": list(dict.fromkeys(credits)),
        "is_baseline": facts["model"] == BASELINE,
        "outcome": outcome(record),
        "arrows": ARROWS,
        "figure": figure,
        "heading": heading,
        "interval": interval,
        "settings": format_settings,
        "support": support,
    }
    return str(ModelCard.from_template(data, str(_TEMPLATE), **values))


def format_settings(node: dict[str, Any]) -> str:
    """Return the options of a method as the command line takes them, without what only the
    benchmark needs.
    """
    plain = flatten({key: value for key, value in node.items() if key not in _SKIPPED})
    words = {True: "true", False: "false", None: "null"}
    return ", ".join(
        f"`{key}={words[value] if isinstance(value, bool | None) else value}`"
        for key, value in plain.items()
        if not key.endswith("_target_")
    )


def find_attackers(kind: str) -> list[str]:
    """Return the attackers of ``conf/attacks`` that take models of ``kind``."""
    names = sorted(path.stem for path in (ROOT / "conf" / "attacks").glob("*.yaml"))
    state = GlobalHydra.instance().hydra  # of the action that is running
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        nodes = compose("config", overrides=[f"attacks=[{','.join(names)}]"]).attacks
    GlobalHydra.instance().hydra = state
    classes: dict[str, type[Attacker]] = {
        name: get_class(node._target_) for name, node in nodes.items()
    }
    return [name for name, attacker in classes.items() if kind in attacker.accepts]
