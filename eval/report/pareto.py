"""The table of a search: every trial, the Pareto front of its objectives first (``best``, numbers
of trials).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import pandas as pd

from eval.report.page import page
from eval.report.plots import Line, lines_plot
from eval.report.words import ARROWS, Metric, heading, markdown, measured, short_names, typed

LEGEND = (
    "front: no other trial is at least as good in every objective and better in one, by point "
    "values; where intervals overlap the order may be chance. Trial 0 is the preset itself."
)


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Attributes:
        values: option → what was tried. metrics: objective → metric. failure: why it does not
            count.
    """

    number: int
    values: dict[str, Any]
    metrics: dict[str, Metric]
    failure: str | None = None


def _loss(trial: Trial, objective: str) -> float:
    metric = trial.metrics[objective]
    return float(metric["value"] * (-1 if metric["better"] == "higher" else 1))


def _table(objectives: dict[str, str], trials: Sequence[Trial], best: set[int]) -> pd.DataFrame:
    """Return the front by its first objective, then the others, then failures, as text."""
    first, *_ = objectives
    names = short_names(set(trials[0].values))
    done = [trial for trial in trials if trial.failure is None]
    done.sort(key=lambda trial: (trial.number not in best, _loss(trial, first)))
    rows = []
    for trial in [*done, *(trial for trial in trials if trial.failure is not None)]:
        place = "" if trial.failure is None else f"failed: {trial.failure}"
        row = {"trial": str(trial.number), "place": "front" if trial.number in best else place}
        for name, metric in objectives.items():
            arrow = ARROWS[trials[0].metrics[name]["better"]]
            row[f"{name}: {heading(metric)} {arrow}"] = measured(trial.metrics.get(name), metric)
        rows.append(row | {names[option]: typed(value) for option, value in trial.values.items()})
    return pd.DataFrame(rows)


def to_markdown(objectives: dict[str, str], trials: Sequence[Trial], best: set[int]) -> str:
    return f"{markdown(_table(objectives, trials, best))}\n\n{LEGEND}\n"


def to_csv(objectives: dict[str, str], trials: Sequence[Trial], best: set[int]) -> str:
    """Return full precision; per objective its metric with value, low and high."""
    rows = []
    for trial in trials:
        failure = " ".join((trial.failure or "").split())
        row = {"trial": trial.number, "front": int(trial.number in best), "failure": failure}
        for (name, metric), part in product(objectives.items(), ("value", "low", "high")):
            row[f"{metric}_{part}".removesuffix("_value")] = trial.metrics.get(name, {}).get(part)
        rows.append(row | {option: typed(value) for option, value in trial.values.items()})
    return str(pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n"))


def to_html(objectives: dict[str, str], trials: Sequence[Trial], best: set[int]) -> str:
    """Return the table, and one plot per pair of objectives with the front filled."""
    done = [trial for trial in trials if trial.failure is None]
    front = [trial for trial in done if trial.number in best]
    others = [trial for trial in done if trial.number not in best]
    plots = []
    for a, b in combinations(objectives, 2):
        lines = [
            Line(name, index, *([t.metrics[o]["value"] for t in group] for o in (a, b)))
            for index, (name, group) in enumerate(
                {"on the front": front, "other trials": others}.items(), start=1
            )
        ]
        title, (x, y) = f"{a} and {b}", (heading(objectives[o]) for o in (a, b))
        svg = lines_plot(lines, x=x, y=y, title=title, is_scatter=True)
        plots.append({"title": title, "svg": svg})
    table = {"table": _table(objectives, trials, best), "label": "Trials"}
    return page("Search", [{"text": LEGEND}, table, {"plots": plots}])
