"""The table of a search: every trial, the Pareto front of its objectives first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
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


def front(objectives: Sequence[str], trials: Sequence[Trial]) -> list[Trial]:
    """Return trials that no other one dominates: at least as good everywhere, better somewhere."""
    done = [trial for trial in trials if trial.failure is None]
    losses = [[_loss(trial, name) for name in objectives] for trial in done]

    def is_dominated(loss: list[float]) -> bool:
        return any(
            other != loss and all(x <= y for x, y in zip(other, loss, strict=True))
            for other in losses
        )

    return [trial for trial, loss in zip(done, losses, strict=True) if not is_dominated(loss)]


def _loss(trial: Trial, objective: str) -> float:
    metric = trial.metrics[objective]
    return float(metric["value"] * (-1 if metric["better"] == "higher" else 1))


def _table(objectives: dict[str, str], trials: Sequence[Trial]) -> list[list[str]]:
    """Return head and rows: the front by its first objective, then the others, then failures."""
    best, first = front(list(objectives), trials), next(iter(objectives))
    options = list(trials[0].values) if trials else []
    names = short_names(set(options))
    head = ["trial", "place"]
    for name, metric in objectives.items():
        better = next((t.metrics[name]["better"] for t in trials if name in t.metrics), "neutral")
        head.append(f"{name}: {heading(metric)} {ARROWS[better]}")
    done = [trial for trial in trials if trial.failure is None]
    done.sort(key=lambda trial: (trial not in best, _loss(trial, first)))
    rows = [[*head, *(names[option] for option in options)]]
    for trial in [*done, *(t for t in trials if t.failure is not None)]:
        place = f"failed: {trial.failure}" if trial.failure is not None else ""
        figures = (measured(trial.metrics.get(n), metric) for n, metric in objectives.items())
        cells = [str(trial.number), "front" if trial in best else place, *figures]
        rows.append([*cells, *(typed(value) for value in trial.values.values())])
    return rows


def to_markdown(objectives: dict[str, str], trials: Sequence[Trial]) -> str:
    return f"{markdown(_table(objectives, trials))}\n\n{LEGEND}\n"


def to_csv(objectives: dict[str, str], trials: Sequence[Trial]) -> str:
    """Return full precision; per objective its metric with value, low and high."""
    best, rows = front(list(objectives), trials), []
    for trial in trials:
        failure = " ".join((trial.failure or "").split())
        row: dict[str, Any] = {"trial": trial.number, "front": int(trial in best)}
        row["failure"] = failure
        for name, metric in objectives.items():
            for part in ("value", "low", "high"):
                value = (trial.metrics.get(name) or {}).get(part)
                row[metric if part == "value" else f"{metric}_{part}"] = value
        rows.append(row | {option: typed(value) for option, value in trial.values.items()})
    return str(pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n"))


def to_json(objectives: dict[str, str], trials: Sequence[Trial]) -> dict[str, Any]:
    best = front(list(objectives), trials)
    rows = [
        {"trial": trial.number, "front": trial in best, "values": trial.values}
        | {"metrics": trial.metrics, "failure": trial.failure}
        for trial in trials
    ]
    return {"objectives": objectives, "trials": rows}


def to_html(objectives: dict[str, str], trials: Sequence[Trial]) -> str:
    """Return the table, and one plot per pair of objectives with the front filled."""
    best, done = front(list(objectives), trials), [t for t in trials if t.failure is None]
    plots = []
    for a, b in combinations(objectives, 2):
        lines = []
        for index, name in ((1, "on the front"), (2, "other trials")):
            own = [t.metrics for t in done if (t in best) == (index == 1)]
            lines.append(Line(name, index, *([m[o]["value"] for m in own] for o in (a, b))))
        words: Any = {
            "x": heading(objectives[a]),
            "y": heading(objectives[b]),
            "title": f"{a} and {b}",
        }
        plots.append({"title": words["title"], "svg": lines_plot(lines, **words, is_scatter=True)})
    table = {"table": _table(objectives, trials), "label": "Trials"}
    return page("Search", [{"text": LEGEND}, table, {"plots": plots}])
