"""Turn exceptions that a user can mend into one message that names key, value and fix."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from lab.errors import UserError, nearest
from lab.sources import ROOT

_SYSTEM = {
    errno.ENOSPC: "the disk is full: free some space or set paths.outputs=DIR; finished stages are kept.",
    errno.EROFS: "the file system is read-only: set paths.outputs=DIR to a folder that can be written.",
    errno.EACCES: "permission denied: set paths.outputs=DIR to a folder that can be written.",
    errno.ENOTDIR: "is a file where a folder is needed: set paths.outputs=DIR to another folder.",
    errno.EDQUOT: "the disk quota is used up: free some space or set paths.outputs=DIR; finished stages are kept.",
}


def explain(error: BaseException, arguments: Sequence[str] = ()) -> str | None:
    """The message for ``error``, or None when it is a defect of the program.

    Args:
        error: what was raised while composing or running.
        arguments: the command line, to find keys close to an unknown one.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return f"{error.filename or 'output'}: {_SYSTEM[error.errno]}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group or 'config'}={name}: there is no such choice; {nearest(name, _choices(group))}"
    if isinstance(error, MissingMandatoryValue | InterpolationKeyError):
        return f"{error.full_key}: needs a value: {_first_line(error)}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        key = _unknown_key(error)
        if key is not None:
            return f"{key}: there is no such key; {nearest(key, _keys(arguments))}"
        return _first_line(error)
    return None


def _choices(group: str) -> list[str]:
    folder = ROOT / group if group == "sweeps" else ROOT / "conf" / group
    return [path.stem for path in folder.glob("*.yaml")] or [path.name for path in (ROOT / "conf").iterdir()]


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _unknown_key(error: BaseException) -> str | None:
    texts = [str(error), str(error.__cause__ or "")]
    for text in texts:
        found = re.search(r"full_key: (\S+)", text) or re.search(r"Could not override '([^']+)'", text)
        if found:
            return found.group(1)
    return None


def _keys(arguments: Sequence[str]) -> list[str]:
    """Every dotted key of the config that the group choices of the command line select."""
    choices = [a for a in arguments if re.fullmatch(r"[a-z_/]+=[^,]+|[a-z_/]+=\[.*\]", a)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for overrides in (choices, []):
            try:
                return list(_walk(compose("config", overrides=overrides)))
            except (HydraException, OmegaConfBaseException):
                continue  # a choice on the command line is wrong too: fall back to the defaults
    return []


def _walk(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    todo = [(prefix, plain)]
    while todo:
        path, node = todo.pop()
        for key, value in node.items():
            name = f"{path}.{key}" if path else str(key)
            yield name
            if isinstance(value, dict):
                todo.append((name, value))
