"""Words of the command line that are checked and rewritten before Hydra reads them."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab.core.errors import UserError
from lab.core.sources import ROOT
from lab.runner.batch import LASTING

_LISTS = ("attacks", "eval", "tracker")  # groups of several choices at once; see conf/config.yaml
_NO_FOLDER = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job_logging.root.handlers=[console]",
)


def rewrite(words: Sequence[str]) -> list[str]:
    """Return what Hydra is given in place of ``words``.

    - ``backbone=DIR`` is short for ``backbone.path=DIR``: a folder is no choice of the group. DIR
      is a path that says so by how it begins, or a folder that exists and has not the name of a
      choice.
    - ``action=audit`` takes ``experiment=audit``, or ``audit_sd`` where ``path`` is no miniature;
      with ``concepts=FILE`` it takes ``scenario=folder``.
    - ``dry_run=true`` plans in this process: a launcher would submit jobs, and the plan would end
      in their logs.
    - An action that only looks (``status``, ``leaderboard``, ``verify`` …) leaves no run folder.

    Raises:
        UserError: a list of choices for a group that takes one.
    """
    words = _expand_audit([_expand_backbone(word) for word in words])
    for word in words:
        group, _, choice = word.lstrip("+").partition("=")
        if choice.startswith("[") and group not in _LISTS and (ROOT / "conf" / group).is_dir():
            fix = f"takes one choice; for a run of each: -m {group}={choice.strip('[]')}."
            raise UserError(group, choice, fix)  # Hydra would merge them under the last one's name
    values = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    is_plan = values.get("dry_run", "").lower() in ("true", "yes", "on", "1")
    if is_plan:
        words = [word for word in words if not re.match(r"hydra[/.]launcher[=.]", word)]
    if is_plan or values.get("action", "run") not in LASTING:
        words += [word for word in _NO_FOLDER if "hydra.run.dir" not in values]
    if is_plan and "hydra.sweep.dir" not in values:
        place = tempfile.mkdtemp(prefix="dry-run-")  # Hydra writes there in any case
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        words.append(f"hydra.sweep.dir={place}")
    return words


def _expand_audit(words: list[str]) -> list[str]:
    values = dict(word.split("=", 1) for word in words if "=" in word)
    if values.get("action") != "audit":
        return words
    added = []
    if "experiment" not in values:
        from lab.models.diffusion_backbone import read_sampling  # its imports take seconds

        path = values.get("path", "minisd")
        is_large = Path(path).is_dir() and read_sampling(path)["resolution"] > 64
        added.append(f"experiment={'audit_sd' if is_large else 'audit'}")
    if "concepts" in values and "scenario" not in values:
        added.append("scenario=folder")
    quoted = [f"{key}={_quoted(values[key])}" for key in ("path", "concepts") if key in values]
    return [*added, *(w for w in words if not w.startswith(("path=", "concepts="))), *quoted]


def _quoted(value: str) -> str:
    """Return a path as Hydra reads it."""
    if re.fullmatch(r"[\w./-]+|['\"].*", value, flags=re.ASCII):
        return value
    return "'{}'".format(value.replace("'", "\\'"))


def _expand_backbone(word: str) -> str:
    value = word.removeprefix("backbone=")
    if value == word or not value or (ROOT / "conf" / "backbone" / f"{value}.yaml").is_file():
        return word
    if not value.startswith(("/", "./", "../", "~/")) and not Path(value).is_dir():
        return word
    return f"backbone.path={_quoted(value)}"
