"""`action=list`: every choice of the config groups with one line of explanation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lab.core.errors import UserError, nearest

GROUPS = (
    *("experiment", "scenario", "backbone", "erase", "immunize", "attacks", "eval", "scorers"),
    *("tracker", "launch", "debug", "sweeps"),
)


def print_choices(cfg: DictConfig) -> None:
    """Print one line per choice of ``group``, or of all groups.

    Raises:
        UserError: there is no such group.
    """
    if cfg.group is not None and cfg.group not in GROUPS:
        raise UserError("group", cfg.group, nearest(str(cfg.group), GROUPS))
    for group in GROUPS if cfg.group is None else [cfg.group]:
        choices = dict(sorted(find_choices(group)))
        width = max(map(len, choices))
        print(f"{group}=")
        for name, file in choices.items():
            print(f"  {name:<{width}}  {describe(file)}".rstrip())


def find_choices(group: str) -> Iterator[tuple[str, Path]]:
    """Yield name and file of each choice, those of ``--config-dir`` included."""
    for source in HydraConfig.get().runtime.config_sources:
        folder = Path(source.path) / group
        for file in folder.rglob("*.yaml") if source.schema == "file" else ():
            name = file.relative_to(folder).with_suffix("").as_posix()
            if not name.startswith("base/"):  # options that several choices share
                yield name, file


def describe(file: Path) -> str:
    """Return the first sentence of the comment that a YAML begins with."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    text = " ".join(line.lstrip("# ") for line in lines if "@package" not in line)
    first = re.split(r"(?<!Alg)\. |\.$", text)[0]
    return first if len(first) <= 100 else f"{first[:99]}…"
