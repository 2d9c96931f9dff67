"""`action=workspace`: a saved view of W&B that compares the runs of records: figures as bars,
curves overlaid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from eval.report.leaderboard import columns
from eval.report.words import heading
from lab.core import record as records
from lab.core.errors import UserError
from lab.tracking import views
from lab.tracking.views import ATTACK, IMMUNIZE

KEY = "tracker.wandb"


def workspace(cfg: DictConfig) -> str:
    """Save the view and print its address; names the offline runs that have to be sent first.

    Raises:
        UserError: W&B is not among the trackers, there is no key, or its server does not take the
            view.
    """
    found = [records.read(path) for path in records.find(_places(cfg), Path(cfg.paths.runs))]
    options = cfg.tracker.get("wandb")
    if options is None:
        raise UserError("tracker", list(cfg.tracker), "a W&B view needs tracker=wandb.")
    for path in sorted({path for r in found for path in r.folder.glob("wandb/offline-run-*")}):
        if not any(path.glob("*.wandb.synced")):  # the mark that `wandb sync` leaves
            print(f"not on the server yet: wandb sync {path}")
    place = _logged_to(found, options)
    view = build(found, _entity(options, place.entity), place.project)
    try:
        view.save()
    except (
        Exception
    ) as error:  # the client raises what its transport raises: its own, requests', JSON's
        raise _unreachable(error) from error
    print(f"workspace: {view.url}")
    return str(view.url)


def _places(cfg: DictConfig) -> list[str]:
    return [cfg.records] if isinstance(cfg.records, str) else [str(place) for place in cfg.records]


class Place(NamedTuple):
    project: str
    entity: str | None


def _logged_to(found: Sequence[records.Record], options: DictConfig) -> Place:
    """Where the runs are: a view elsewhere would be empty. The config's project where no record
    names one.

    Raises:
        UserError: the records were logged to several projects.
    """
    logged = [r["config"].get("tracker", {}).get("wandb") for r in found]
    places = sorted({(str(one["project"]), one.get("entity")) for one in logged if one}, key=str)
    if len(places) > 1:
        told = ", ".join(
            project if entity is None else f"{entity}/{project}" for project, entity in places
        )
        raise UserError(
            "records",
            f"{len(found)} records",
            f"were logged to several projects ({told}); name those of one.",
        )
    return Place(*places[0]) if places else Place(str(options.project), None)


def _entity(options: DictConfig, logged: str | None) -> str:
    """The one that was logged to, else that of the config, else the key's own."""
    from lab.tracking.wandb_backend import has_key

    if not has_key():
        raise UserError(
            f"{KEY}.mode",
            options.mode,
            "a saved view needs a key: set WANDB_API_KEY, or `wandb login`.",
        )
    if (known := logged or options.entity) is not None:
        return str(known)
    import wandb

    try:
        return str(wandb.Api(timeout=round(options.init_timeout_s)).default_entity)
    except Exception as error:  # as above
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> UserError:
    told = (
        f"W&B did not take the view ({type(error).__name__}). The same comparison is in "
        "`action=leaderboard`."
    )
    return UserError(f"{KEY}.project", "not reachable", told)


def build(found: Sequence[records.Record], entity: str, project: str) -> Any:
    """The view, unsaved: only runs of the records' scenarios, one bar chart per metric that
    leaderboards show, one line plot per curve over the shared axis of its stage.
    """
    try:
        import wandb_workspaces.reports.v2 as parts
        import wandb_workspaces.workspaces as views_of
    except ImportError as missing:
        told = 'needs the package wandb-workspaces: `pip install "immunization-bench[workspace]"`.'
        raise UserError("action", "workspace", told) from missing

    scenarios = sorted({r["scenario"] for r in found})
    bars: list[Any] = [
        parts.BarPlot(title=heading(name), metrics=[parts.SummaryMetric(name)])
        for name in columns(n for r in found for n in r["metrics"])
    ]
    sections = [views_of.Section(name="Figures, worst attacker first", panels=bars, is_open=True)]
    for stage in (ATTACK, IMMUNIZE):
        keys = sorted(
            {key for r in found for _, values in views.curve_rows(r, stage) for key in values}
        )
        plots: list[Any] = [
            parts.LinePlot(
                title=heading(curve),
                x=f"{stage}/step",
                y=[f"{stage}/{k}" for k in keys if _of(k) == curve],
            )
            for curve in dict.fromkeys(map(_of, keys))
        ]
        if plots:
            sections.append(
                views_of.Section(name=f"Curves: {stage}", panels=plots, is_open=stage == ATTACK)
            )
    return views_of.Workspace(
        entity=entity,
        project=project,
        name=f"Comparison: {', '.join(scenarios)}",
        sections=sections,
        runset_settings=views_of.RunsetSettings(filters=f"Metric('Group') in {scenarios}"),
    )


def _of(key: str) -> str:
    """The curve of a key ``CURVE/side``."""
    return key.rpartition("/")[0]
