"""What `action` names, and what holds for every action."""

from __future__ import annotations

import logging
import pkgutil
from contextlib import nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lab.core.errors import UserError, explain, nearest
from lab.runner.batch import LASTING, claim, discard

ACTIONS = {  # imported when they are called: imports take seconds, some packages may be missing
    "run": "lab.cluster.launch:launch",
    "list": "lab.cli.catalogue:print_choices",
    "new": "lab.cli.scaffold:create",
    "report": "lab.cli.tables:write_report",
    "leaderboard": "lab.cli.tables:write_leaderboard",
    "compare": "lab.cli.tables:write_comparison",
    "status": "lab.cluster.status:status",
    "train": "lab.cli.actions:train",
    "export": "lab.release.export:export",
    "verify": "lab.release.verify:verify",
    "audit": "lab.release.audit:audit",
    "search": "lab.cli.search:search",
    "workspace": "lab.tracking.workspace:workspace",
}
PLANNED = ("run", "search", "audit")  # actions that `dry_run` can plan
EXIT_VERDICT = 3  # the verdict is one of `fail_on`


def is_run(cfg: DictConfig) -> bool:
    """Return True if the action computes and has a folder for its results."""
    return cfg.action in LASTING and not cfg.dry_run


def act(cfg: DictConfig, folder: Path) -> int:
    """Do what ``cfg.action`` says in the run folder ``folder``; return the exit code.

    Raises:
        UserError: an action that does not exist, or that has no plan; wrong input to it.
    """
    try:
        code = _act(cfg, folder)
    except Exception as error:
        if explain(error) is not None and not is_launched():
            discard(folder)  # wrong input leaves nothing behind
        raise
    if not is_run(cfg):
        discard(folder)
    return code


def _act(cfg: DictConfig, folder: Path) -> int:
    if cfg.action not in ACTIONS:
        raise UserError("action", cfg.action, nearest(str(cfg.action), ACTIONS))
    if not isinstance(cfg.dry_run, bool):
        raise UserError("dry_run", cfg.dry_run, "must be true or false.")
    if cfg.dry_run and cfg.action not in PLANNED:
        raise UserError("dry_run", True, f"plans action={' | '.join(PLANNED)} only.")
    _apply_limits(cfg)
    cfg.records = [cfg.records] if isinstance(cfg.records, str) else cfg.records
    is_helper = OmegaConf.select(cfg, "launch.machine_rank")  # the first machine answers for all
    if cfg.action in ("run", "audit") and not is_helper:  # before imports that take seconds
        logging.getLogger("progress").info("loading packages, data and models …")
    with claim(folder) if is_run(cfg) and not is_helper else nullcontext():
        function = pkgutil.resolve_name(ACTIONS[cfg.action])
        arguments = (cfg, folder) if cfg.action in ("run", "search") else (cfg,)
        code = function(*arguments)
    if cfg.action in ("run", "audit") and cfg.fail_on and not cfg.dry_run and not is_helper:
        from eval.report.outcomes import outcome
        from lab.core.record import read
        from lab.runner.assemble import read_fail_on

        label = outcome(read(folder / "record.json")).label
        return EXIT_VERDICT if label in read_fail_on(cfg) else 0
    return code if isinstance(code, int) else 0


def train(cfg: DictConfig) -> object:
    """Train what ``cfg.train`` describes, by ``run`` of the module that has its recipe.

    Raises:
        UserError: there is no recipe, or a wrong one.
    """
    if cfg.get("train") is None:
        fix = "nothing to train is described: `python run.py experiment=train_minisd`."
        raise UserError("train", None, fix)
    from lab.models.devices import limit_threads  # torch takes seconds

    limit_threads(cfg.threads)
    return pkgutil.resolve_name(f"{cfg.train._target_.rpartition('.')[0]}:run")(cfg)


def is_launched() -> bool:
    """Return True in a job of a multirun that a launcher runs in a process of its own.

    Its folder states for the waiting command how it ended.
    """
    config = HydraConfig.get()
    is_internal = str(config.launcher._target_).startswith("hydra._internal")
    return config.mode == RunMode.MULTIRUN and not is_internal


def _apply_limits(cfg: DictConfig) -> None:
    """Lower what ``limits`` names (`conf/debug`), except for keys of the command line."""
    typed = {word.lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.task}
    for key, limit in (cfg.get("limits") or {}).items():
        value = OmegaConf.select(cfg, key)
        if isinstance(value, int | float) and value > limit and key not in typed:
            OmegaConf.update(cfg, key, limit)
