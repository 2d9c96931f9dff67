"""The record of a run, at any moment of it, after a failure too."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from omegaconf import DictConfig, ListConfig, OmegaConf

from lab.core import record as records
from lab.core.provenance import provenance
from lab.runner.pipeline import Pipeline

if TYPE_CHECKING:
    from lab.runner.experiment import Run


def record_of(run: Run) -> records.Record:
    """What is known of ``run`` now."""
    config = OmegaConf.to_container(run.cfg, resolve=True)
    pipeline = run.made
    facts = provenance(run.started, time.monotonic() - run.clock)
    facts |= {"cache_hits": run.hits, "cache_misses": run.misses, **run.ranks.facts()}
    facts |= {"data_hash": pipeline.data_hash if pipeline else {}}
    facts |= {"weight_hash": pipeline.weight_hash() if pipeline else {}}
    body = {
        "schema": records.SCHEMA_VERSION,
        "name": f"{run.cfg.name}/{run.cfg.immunize.name}",
        "status": run.status,
        "scenario": str(run.cfg.scenario.name),
        "backbone": str(run.cfg.backbone.name),
        "immunizer": str(run.cfg.immunize.name),
        "attacks": list(run.cfg.attacks),
        "seeds": _seeds(run.cfg, pipeline),
        "config": records.clean(config),
        "notes": list(pipeline.notes) if pipeline else [],
        "cells": run.cells,
        "error": run.error,
        "skipped": run.skipped | run.losses.metrics,
        "provenance": facts,
    }
    found = records.scores_json(run.scores)
    if rows := records.seed_values(run.scores, body["seeds"]):
        found["tables"]["seed_values"] = rows
    run.losses.blank(found)
    return body | found


def _seeds(cfg: DictConfig, pipeline: Pipeline | None) -> list[int]:
    if pipeline is not None:
        return list(pipeline.parts.seeds)
    given = cfg.seeds if isinstance(cfg.seeds, ListConfig) else [cfg.seeds]
    return [seed for seed in given if isinstance(seed, int) and not isinstance(seed, bool)]
