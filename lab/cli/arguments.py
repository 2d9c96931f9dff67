"""Words of the command line that are checked and rewritten before Hydra reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from lab.core.errors import UserError
from lab.core.sources import ROOT
from lab.runner.batch import LASTING

_LISTS = ("attacks", "eval", "tracker")  # groups of several choices at once; see conf/config.yaml
_PATHS = ("path", "concepts")  # of an audit
_NO_FOLDER = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job_logging.root.handlers=[console]",
)


def register_resolvers() -> None:
    """Register the functions that the YAML of conf/ calls."""
    OmegaConf.register_new_resolver("project_root", lambda: str(ROOT), replace=True)
    OmegaConf.register_new_resolver("quick_precision", _quick_precision, replace=True)
    OmegaConf.register_new_resolver("checkpoint", _read_checkpoint, replace=True)


def _quick_precision(device: str) -> str:
    """For ``scenario.sampling.precision``: bfloat16 on a device that computes it; emulated, it
    takes far longer.
    """
    from lab.models.devices import computes_bfloat16, pick  # their imports take seconds

    return "bfloat16" if computes_bfloat16(pick("backbone.device", device).type) else "weights"


def _read_checkpoint(fact: str, path: str) -> float:
    """For ``conf/scenario/folder.yaml``: resolution, steps or guidance that suit a checkpoint."""
    from lab.models.diffusion_backbone import read_sampling

    return read_sampling(path)[fact]


def rewrite(words: Sequence[str]) -> list[str]:
    """Return what Hydra is given in place of ``words``.

    - ``action=audit`` takes ``experiment=audit``, or ``audit_sd`` where ``path`` is no miniature;
      with ``concepts=FILE`` it takes ``scenario=folder``.
    - ``dry_run=true`` plans in this process: a launcher would submit jobs, and the plan would end
      in their logs.
    - An action that only looks (``status``, ``leaderboard``, ``verify`` …) leaves no run folder.

    Raises:
        UserError: a list of choices for a group that takes one.
    """
    words = _expand_audit(list(words))
    values = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    for group, choice in values.items():
        if choice.startswith("[") and group not in _LISTS and (ROOT / "conf" / group).is_dir():
            fix = f"takes one choice; for a run of each: -m {group}={choice.strip('[]')}."
            raise UserError(group, choice, fix)  # Hydra would merge them under the last one's name
    is_plan = values.get("dry_run", "").lower() in ("true", "yes", "on", "1")
    if is_plan:
        words = [word for word in words if not re.match(r"hydra[/.]launcher[=.]", word)]
    only_looks = is_plan or values.get("action", "run") not in LASTING
    if only_looks and "hydra.run.dir" not in values:
        first = next(i for i, word in enumerate(words) if re.match(r"\+*(action|dry_run)=", word))
        words[first:first] = _NO_FOLDER  # Hydra takes overrides in one row
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
    paths = {f"{k}={v}": f"{k}={_quoted(v)}" for k, v in values.items() if k in _PATHS}
    words = [paths.get(word, word) for word in words]
    place = words.index("action=audit")  # Hydra takes overrides in one row
    return [*words[:place], *added, *words[place:]]


def _quoted(value: str) -> str:
    """Return a path as Hydra reads it."""
    if re.fullmatch(r"[\w./-]+|['\"].*", value, flags=re.ASCII):
        return value
    return "'{}'".format(value.replace("'", "\\'"))
