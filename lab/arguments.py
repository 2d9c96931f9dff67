"""Words of the command line that are rewritten before Hydra reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lab.sources import ROOT

_BACKBONE = "backbone="
_PATHS = ("/", "./", "../", "~/")


def with_paths(words: Iterable[str]) -> list[str]:
    """``backbone=DIR`` is short for ``backbone.path=DIR``: a folder is no choice of the group.

    DIR is a path that says so by how it begins, or a folder that is there and has not the name of a choice.
    """
    return [_as_path(word) for word in words]


def _as_path(word: str) -> str:
    value = word.removeprefix(_BACKBONE)
    if value == word or not value or (ROOT / "conf" / "backbone" / f"{value}.yaml").is_file():
        return word
    if not value.startswith(_PATHS) and not Path(value).is_dir():
        return word
    if not re.fullmatch(r"[\w./~-]+", value):
        value = "'{}'".format(value.replace("'", "\\'"))
    return f"backbone.path={value}"
