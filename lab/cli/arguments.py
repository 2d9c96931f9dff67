"""Words of the command line that are rewritten before Hydra reads them."""

from __future__ import annotations

import atexit
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab.core.sources import ROOT
from lab.runner.batch import LASTING

_BACKBONE = "backbone="
_PATHS = ("/", "./", "../", "~/")
_LAUNCHER = ("hydra/launcher=", "hydra.launcher.")
_NO_FOLDER = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job_logging.root.handlers=[console]",
)


def rewritten(words: Sequence[str]) -> list[str]:
    """What Hydra is given in place of ``words``.

    - ``backbone=DIR`` is short for ``backbone.path=DIR``: a folder is no choice of the group. DIR
      is a path that says so by how it begins, or a folder that is there and has not the name of a
      choice.
    - ``dry_run=true`` plans here: a launcher would hand in jobs, and the plan would end in their
        logs.
    - What only looks (``action=status``, ``leaderboard``, ``verify`` …) leaves no run folder
        behind.
    """
    found = [_as_path(word) for word in words]
    asked = [
        word.lower().partition("dry_run=")[2]
        for word in found
        if re.match(r"\+{0,2}dry_run=", word)
    ]
    dry = bool(asked) and asked[-1] in (
        "true",
        "yes",
        "on",
        "1",
    )  # the last word of a key is the one that holds
    if dry and any(word.startswith(_LAUNCHER) for word in found):
        found = [word for word in found if not word.startswith(_LAUNCHER)]
        print("dry_run: planned here, without the launcher", file=sys.stderr)
    chosen = [word.removeprefix("action=") for word in found if word.startswith("action=")]
    if (dry or (chosen and chosen[-1] not in LASTING)) and not any(
        word.startswith("hydra.run.dir=") for word in found
    ):
        found += _NO_FOLDER
        if dry and not any(word.startswith("hydra.sweep.dir=") for word in found):
            place = Path(tempfile.mkdtemp(prefix="dry-run-"))  # Hydra writes one in any case
            atexit.register(shutil.rmtree, place, ignore_errors=True)
            found.append(f"hydra.sweep.dir={place}")
    return found


def _as_path(word: str) -> str:
    value = word.removeprefix(_BACKBONE)
    if value == word or not value or (ROOT / "conf" / "backbone" / f"{value}.yaml").is_file():
        return word
    if not value.startswith(_PATHS) and not Path(value).is_dir():
        return word
    if not re.fullmatch(
        r"[\w./-]+", value, flags=re.ASCII
    ):  # what Hydra's grammar takes without quotes
        value = "'{}'".format(value.replace("'", "\\'"))
    return f"backbone.path={value}"
