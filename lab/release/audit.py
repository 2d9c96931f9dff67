"""``action=audit``: attack ONE checkpoint, end in a verdict that a pipeline can read.

`prepare` checks everything that can be checked without a network; `eval.generation.audit` decides.
"""

from __future__ import annotations

import copy
import json
import logging
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from eval.generation.scoring import encode
from eval.stats.verdict_rule import WORDS
from lab.core import record as records
from lab.core.errors import UserError, as_user_error, call_all, nearest
from lab.core.hashing import state_hash, write_atomically
from lab.core.images import expand_path
from lab.core.record import Record
from lab.core.sources import ROOT
from lab.models.diffusion_backbone import locate_folder
from lab.release.verify import FACTS
from lab.runner.assemble import Parts, as_list, assemble, read_fail_on
from lab.runner.batch import relative
from lab.runner.experiment import run_once
from lab.scenarios.concept_folders import read_entries

SCHEMA_VERSION = "1.0"
log = logging.getLogger(__name__)


def audit(cfg: DictConfig) -> None:
    """Attack the checkpoint; write record, report and ``verdict.json`` to the run folder.

    Raises:
        UserError: see `prepare`.
    """
    hydra = HydraConfig.get()
    if not any(word.startswith(("path=", "backbone")) for word in hydra.overrides.task):
        fix = "give the folder of the checkpoint; path=minisd is the one of this project."
        raise UserError("path", "null", fix)
    prepared = prepare(cfg)
    parts = assemble(prepared)
    concepts = [task for case in parts.scenario.load(parts.seeds[0]).cases for task in case.tasks]
    listed = ", ".join(f"{concept.name} ({concept.role})" for concept in concepts)
    print(f"concepts: {listed}" + ("" if cfg.concepts else "; concepts=FILE audits your own"))
    warnings = find_other_targets(prepared, parts)
    for warning in warnings:
        log.warning("path: %s", warning)
    path = run_once(prepared, Path(hydra.runtime.output_dir))
    if path is None:
        return
    built = parts.backbone.build(None, 0)
    networks = {"unet": built.unet, "vae": built.vae, "text_encoders": built.text_encoders}
    hashes = {f"{name}_sha256": state_hash(net.state_dict()) for name, net in networks.items()}
    command = shlex.join(["python", "run.py", *hydra.overrides.task])
    verdict = summarize(records.read(path), hashes, command, warnings)
    out = path.with_name("verdict.json")
    write_atomically(out, (json.dumps(verdict, indent=1) + "\n").encode())
    print(f"verdict: {verdict['verdict']}, {relative(out)}")


# ---- checks


def prepare(cfg: DictConfig) -> DictConfig:
    """Return the config of the run behind the audit: with the concepts of the file ``concepts`` and
    the searches of ``audit.search`` for attackers that have none of their own.

    Raises:
        UserError: every mistake in path, concepts, scorers and options that shows without a
            network; nothing was written or attacked.
    """
    if cfg.get("audit") is None or "audit" not in cfg.eval or not cfg.attacks:
        message = "needs its metric and an attack: `python run.py action=audit attacks=[lora]`."
        raise UserError("action", "audit", message)
    prepared = copy.deepcopy(cfg)
    checks: tuple[Callable[[DictConfig], object], ...] = (
        _check_groups,
        lambda c: locate_folder(str(c.backbone.path), "path"),
        _read_concepts,
        _check_scorers,
        _share_searches,
        read_fail_on,
    )
    call_all(partial(check, prepared) for check in checks)
    return prepared


def _check_groups(cfg: DictConfig) -> None:
    for group in ("immunize", "erase", "launch"):
        if cfg[group].name != "none":
            message = f"an audit attacks a checkpoint as it is, in one process: {group}=none."
            raise UserError(group, cfg[group].name, message)


def _read_concepts(cfg: DictConfig) -> None:
    """Put the concepts of the file into the scenario."""
    if cfg.concepts is not None:
        path = expand_path("concepts", cfg.concepts)
        fix = "cannot be read as a list of concepts (docs/examples/concepts.yaml)."
        with as_user_error("concepts", path, fix):
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(values, list):
                raise TypeError("no list")
        read_entries(values, "concepts", path.parent)
        with open_dict(cfg):
            cfg.scenario.concepts, cfg.scenario.root = values, str(path.parent)


def _check_scorers(cfg: DictConfig) -> None:
    """Load the networks that the audit may need, from this machine alone."""
    from huggingface_hub import constants

    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        scorers = instantiate(cfg.scorers)
        for kind in as_list(cfg.eval.audit.similarities):
            encode(scorers, kind, image)
    finally:
        constants.HF_HUB_OFFLINE = before


def _share_searches(cfg: DictConfig) -> None:
    known = {path.stem for path in (ROOT / "conf" / "attacks").glob("*.yaml")} | {*cfg.attacks}
    for name, search in (cfg.audit.search or {}).items():
        if name not in known:
            raise UserError(f"audit.search.{name}", search, nearest(str(name), known))
        if name in cfg.attacks and cfg.attacks[name].get("search") is None:
            with open_dict(cfg):
                cfg.attacks[name].search = search


def find_other_targets(cfg: DictConfig, parts: Parts) -> list[str]:
    """Return a warning where an exported checkpoint was immunized against other concepts than the
    audit attacks: no attack on these says anything about its immunization.
    """
    path = Path(str(cfg.backbone.path)).expanduser() / FACTS
    if not path.is_file():
        return []
    case = json.loads(path.read_text(encoding="utf-8"))["case"]
    names = [case.name for case in parts.scenario.load(parts.seeds[0]).cases]
    if case in names:
        return []
    return [
        f"the checkpoint was exported for case {case}, and this audit attacks {', '.join(names)}: "
        "name the concepts that its record.json has, or its scenario."
    ]


# ---- verdict.json


def summarize(
    record: Record, hashes: dict[str, str], command: str, warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the verdict of a record as ``verdict.json`` has it: docs/guides/audit_a_checkpoint.md.

    Args:
        hashes: NAME_sha256 of what was attacked; that of the U-Net is as in ``export.json``.
        warnings: come first among the limits.
    """
    tables, config, verdict = record["tables"], record["config"], record["metrics"]["verdict"]
    concepts = tables["audit_verdict"]
    reached = [row for row in concepts if row["verdict"] == "fails"]
    strongest = min(reached, key=lambda row: row["steps"], default=None)
    checks = [
        {"concept": row["concept"], "check": row["check"], "required": row["required"]}
        | {"measured": row["value"], "passed": row["passed"]}
        for row in tables["verdict"]
    ]
    return {
        "schema": SCHEMA_VERSION,
        "verdict": WORDS[verdict["value"]],
        "headline": verdict["note"],
        "checkpoint": {"path": config["backbone"]["path"], **hashes},
        "steps": config["budget"]["horizon"] * config["budget"]["multiple"],
        "unit": config["budget"]["unit"],  # of steps
        "attacks": record["attacks"],
        "strongest_attack": strongest
        and {key: strongest[key] for key in ("attack", "concept", "steps", "low", "high")},
        "concepts": concepts,
        "checks": checks,
        "limits": [*warnings, *(row["limit"] for row in tables["audit_limits"])],
        "record": "record.json",
        "content_hash": record["content_hash"],
        "command": command,
        "versions": record["provenance"]["versions"],
    }
