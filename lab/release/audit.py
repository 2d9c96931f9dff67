"""`action=audit` (`experiment=audit`): attack ONE checkpoint with a suite of attackers and end in
one page.
"""

from __future__ import annotations

import copy
import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from lab.core import record as records
from lab.core.cache import StageCache
from lab.core.errors import UserError, nearest
from lab.core.hashing import write_atomically
from lab.core.options import local
from lab.core.sources import ROOT
from lab.release.audit_cost import seconds_per_update
from lab.release.audit_page import build, ordered
from lab.release.delta import state_hash
from lab.release.export import FACTS
from lab.runner.assemble import assemble
from lab.runner.pipeline import Pipeline

KEY = "audit"
log = logging.getLogger(__name__)


def audit(cfg: DictConfig) -> Path | None:
    """Run the attacks, time them on this machine, write ``audit.md`` and ``audit.html`` beside the
    record.

    Returns:
        the Markdown page; None for ``dry_run``.

    Raises:
        UserError: ``action=audit`` without ``experiment=audit``; an attack, scorer or scenario that
            cannot work.
    """
    from hydra.core.hydra_config import HydraConfig

    from lab.runner.experiment import relative, run_once

    prepared = prepare(cfg)
    if astray := off_target(prepared):
        log.warning("backbone.path: %s", astray)
    path = run_once(prepared, Path(HydraConfig.get().runtime.output_dir))
    if path is None:
        return None
    command = shlex.join(["python", "run.py", *HydraConfig.get().overrides.task])
    page = write(prepared, path, command, [astray] if astray else [])
    print(f"audit: {relative(page)} (also .html)")
    return page


def prepare(cfg: DictConfig) -> DictConfig:
    """The run behind the audit: searches of ``audit.search`` reach the attackers that have none of
    their own.

    Raises:
        UserError: see `audit`.
    """
    _fits(cfg)
    found = copy.deepcopy(cfg)
    if cfg[KEY].search is not None and not OmegaConf.is_dict(cfg[KEY].search):
        raise UserError(
            f"{KEY}.search",
            cfg[KEY].search,
            "must be null or a group: ATTACK: {mode, steps, space}.",
        )
    searches: dict[str, Any] = OmegaConf.to_container(cfg[KEY].search or OmegaConf.create({}))  # type: ignore[assignment]
    known = {path.stem for path in (ROOT / "conf" / "attacks").glob("*.yaml")} | {
        str(name) for name in cfg.attacks
    }
    for name, search in searches.items():
        if name not in known:
            raise UserError(f"{KEY}.search.{name}", search, nearest(str(name), known))
        if (
            search is not None
            and name in found.attacks
            and found.attacks[name].get("search") is None
        ):
            with open_dict(found):
                found.attacks[name].search = search
    return found


def _fits(cfg: DictConfig) -> None:
    if cfg.get(KEY) is None or "audit" not in cfg.eval:
        raise UserError(
            "action",
            "audit",
            "comes with its attacks and metrics: `python run.py experiment=audit …`.",
        )
    for group in ("immunize", "erase"):
        if cfg[group].name != "none":
            told = (
                f"an audit attacks the checkpoint as it is: {group}=none. What changes it "
                "is a run to export."
            )
            raise UserError(group, cfg[group].name, told)
    if cfg.path is not None:
        raise UserError(
            "path", cfg.path, "is where an export goes; an audit takes backbone.path=DIR."
        )
    if not cfg.attacks:
        raise UserError(
            "attacks", "none", "an audit needs at least one attack, e.g. attacks=[lora]."
        )
    if (
        cfg.scenario.get("sampling") is None or cfg.scenario.sampling.get("steps") is None
    ):  # the count is the audit's
        told = (
            "has no pictures to generate: an audit is of a text-to-image model, e.g. "
            "scenario=relearn_styles."
        )
        raise UserError("scenario", cfg.scenario.get("name"), told)
    if (facts := _exported(cfg)) is not None and facts.get("kind") != "diffusion":
        told = f"holds a {facts.get('kind')} model; audits are of text-to-image models."
        raise UserError("backbone.path", cfg.backbone.path, told)
    if cfg.launch.name != "none":
        raise UserError(
            "launch", cfg.launch.name, "an audit times its attacks in one process: launch=none."
        )
    if cfg.backbone.name != "minisd" and cfg.scorers.name == "minisd":
        raise UserError(
            "scorers",
            "minisd",
            f"they only know MiniSD's world, not what {cfg.backbone.name} draws: scorers=real.",
        )


def _exported(cfg: DictConfig) -> dict[str, Any] | None:
    """``export.json`` of the checkpoint; None where it is not an export of ours."""
    path = local("backbone.path", cfg.backbone.get("path") or ".") / FACTS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            "backbone.path", path, f"cannot be read ({error}); `action=verify` says more."
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            "backbone.path", path, "is not the facts of an export; `action=verify` says more."
        )
    return found


def off_target(cfg: DictConfig) -> str | None:
    """What to tell where the audit attacks other targets than those of an exported checkpoint: no
    attack on these says anything about its immunization. None where they agree, or where the
    checkpoint is no export.
    """
    facts = _exported(cfg)
    if facts is None:
        return None
    parts = assemble(cfg)
    names = [case.name for case in parts.scenario.load(parts.seeds[0]).cases]
    if facts.get("case") in names:
        return None
    told = (
        f"the checkpoint was exported for case {facts.get('case')}, and this audit "
        f"attacks {', '.join(names)}"
    )
    return f"{told}: name the scenario of its record.json, or scenario.cases=all."


def write(cfg: DictConfig, path: Path, command: str, told: Sequence[str] = ()) -> Path:
    """The page of the record at ``path``, with costs measured now; ``told`` leads its limits."""
    record = records.read(path)
    if record["status"] != "ok" or not record["tables"].get(KEY):
        raise UserError(
            "records",
            path,
            f"ended as {record['status']} without an audit; see the record's error.",
        )
    pipeline = Pipeline(assemble(cfg), StageCache(cfg.paths.cache))
    costs = seconds_per_update(pipeline, ordered(record["tables"][KEY]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    first = pipeline.seeds[0]
    unet = pipeline.original(pipeline.data(first).cases[0], first).unet.state_dict()
    found = build(
        record, costs, f"{device}, threads: {torch.get_num_threads()}", command, state_hash(unet)
    )
    found.limits[:0] = told
    page = path.parent / "audit.md"
    write_atomically(page, found.markdown().encode())
    write_atomically(page.with_suffix(".html"), found.html().encode())
    print(f"── {found.headline}")
    return page
