"""`action=workspace`: a saved view of W&B that compares the runs of records: figures as bars,
curves overlaid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import wandb
from omegaconf import DictConfig
from wandb_workspaces.reports.v2 import BarPlot, LinePlot, SummaryMetric
from wandb_workspaces.workspaces import RunsetSettings, Section, Workspace

from eval.report.leaderboard import columns
from eval.report.words import heading
from lab.core import record as records
from lab.core.errors import UserError
from lab.tracking.views import ATTACK, IMMUNIZE, curves
from lab.tracking.wandb_backend import has_key


def workspace(cfg: DictConfig) -> str:
    """Save the view and print its address; names the offline runs that have to be sent first.

    Raises:
        UserError: W&B is not among the trackers, there is no key, or its server does not take the
            view.
    """
    if "wandb" not in cfg.tracker:
        raise UserError("tracker", list(cfg.tracker), "a W&B view needs tracker=wandb.")
    options = cfg.tracker.wandb
    if not has_key():
        fix = "a saved view needs a key: set WANDB_API_KEY, or `wandb login`."
        raise UserError("tracker.wandb.mode", options.mode, fix)
    paths = records.find(map(str, cfg.records), Path(cfg.paths.runs))
    loaded = [records.read(path) for path in paths]
    for path in sorted({path for r in loaded for path in r.folder.glob("wandb/offline-run-*")}):
        if not any(path.glob("*.wandb.synced")):  # the mark that `wandb sync` leaves
            print(f"not on the server yet: wandb sync {path}")
    project = str(options.project)
    try:
        api = wandb.Api(timeout=round(options.init_timeout_s))
        view = build(loaded, str(options.entity or api.default_entity), project)
        view.save()
    except Exception as error:  # the client raises what its transport raises
        fix = f"W&B did not take the view ({type(error).__name__}); action=leaderboard shows it."
        raise UserError("tracker.wandb.project", project, fix) from error
    print(f"workspace: {view.url}")
    return str(view.url)


def build(loaded: Sequence[records.Record], entity: str, project: str) -> Workspace:
    """Return the view, unsaved: only runs of the records' scenarios, one bar chart per metric that
    leaderboards show, one line plot per curve over the shared axis of its stage.
    """
    names = columns(name for record in loaded for name in record["metrics"])
    bars: list[Any] = [BarPlot(title=heading(n), metrics=[SummaryMetric(n)]) for n in names]
    sections = [Section(name="Figures, strongest attack first", panels=bars, is_open=True)]
    for stage in (ATTACK, IMMUNIZE):
        keys = sorted({key for record in loaded for key in curves(record, stage)})
        plots: list[Any] = [
            LinePlot(title=heading(curve.split("/")[1]), x=f"{stage}/step", y=[*series])
            for curve, series in groupby(keys, lambda key: key.rpartition("/")[0])
        ]
        if plots:
            sections.append(Section(name=f"Curves: {stage}", panels=plots, is_open=stage == ATTACK))
    scenarios = sorted({record["scenario"] for record in loaded})
    return Workspace(
        entity=entity,
        project=project,
        name=f"Comparison: {', '.join(scenarios)}",
        sections=sections,
        runset_settings=RunsetSettings(filters=f"Metric('Group') in {scenarios}"),
    )
