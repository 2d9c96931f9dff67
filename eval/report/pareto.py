"""The table of a search: every trial, the Pareto front of its objectives first."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from eval.report.charts import scatter
from eval.report.labels import short_names, typed
from eval.report.page import page
from eval.report.words import ARROWS, UNMEASURED, Metric, heading, measured

LEGEND = (
    "front: no other trial is at least as good in every objective and better in one, "
    "by point values; where intervals "
    "overlap the order may be chance. Trial 0 is the preset itself."
)


@dataclass(frozen=True)
class Trial:
    """``values``: option → what was tried. ``metrics``: objective → metric. ``failure``: why it
    does not count.
    """

    number: int
    values: dict[str, Any]
    metrics: dict[str, Metric]
    failure: str | None = None


def front(objectives: Sequence[str], trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other one dominates: at least as good everywhere, better somewhere."""
    done = [t for t in trials if t.failure is None]

    def losses(trial: Trial) -> list[float]:
        return [
            t["value"] * (-1 if t["better"] == "higher" else 1)
            for t in map(trial.metrics.__getitem__, objectives)
        ]

    def beats(a: list[float], b: list[float]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    found = [(t, losses(t)) for t in done]
    return [t for t, loss in found if not any(beats(other, loss) for _, other in found)]


def _ordered(objectives: Sequence[str], trials: Sequence[Trial]) -> list[tuple[Trial, str]]:
    """(trial, place): the front by its first objective, then the others, then those that failed."""
    best = front(objectives, trials)
    first = objectives[0]

    def worth(trial: Trial) -> float:
        metric = trial.metrics[first]
        return metric["value"] * (-1 if metric["better"] == "higher" else 1)

    others = [t for t in trials if t.failure is None and t not in best]
    out = [(t, "front") for t in sorted(best, key=worth)] + [
        (t, "") for t in sorted(others, key=worth)
    ]
    return out + [(t, f"failed: {t.failure}") for t in trials if t.failure is not None]


def _heads(objectives: dict[str, str], trials: Sequence[Trial]) -> list[str]:
    out = []
    for name, metric in objectives.items():
        better = next((t.metrics[name]["better"] for t in trials if name in t.metrics), "neutral")
        out.append(f"{name}: {heading(metric)} {ARROWS[better]}")
    return out


def _rows(objectives: dict[str, str], trials: Sequence[Trial]) -> list[list[str]]:
    return [
        [
            str(trial.number),
            place,
            *(measured(trial.metrics.get(name)) for name in objectives),
            *(typed(value) for value in trial.values.values()),
        ]
        for trial, place in _ordered(list(objectives), trials)
    ]


def _columns(objectives: dict[str, str], trials: Sequence[Trial]) -> list[str]:
    options = list(trials[0].values) if trials else []
    names = short_names(set(options))
    return ["trial", "place", *_heads(objectives, trials), *(names[o] for o in options)]


def to_markdown(objectives: dict[str, str], trials: Sequence[Trial]) -> str:
    head = _columns(objectives, trials)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in _rows(objectives, trials):
        cells = [" ".join(cell.split()).replace("|", "\\|") or " " for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", LEGEND]) + "\n"


def to_csv(objectives: dict[str, str], trials: Sequence[Trial]) -> str:
    """Full precision; per objective its metric with value, low and high."""
    parts, out = ("value", "low", "high"), io.StringIO()
    options = list(trials[0].values) if trials else []
    best = front(list(objectives), trials)
    writer = csv.writer(out, lineterminator="\n")
    named = [f"{m}{'' if p == 'value' else '_' + p}" for m in objectives.values() for p in parts]
    writer.writerow(["trial", "front", "failure", *named, *options])
    for t in trials:
        figures = [(t.metrics.get(name) or {}).get(p) for name in objectives for p in parts]
        failure = " ".join((t.failure or "").split())
        writer.writerow(
            [
                t.number,
                int(t in best),
                failure,
                *("" if f is None else f for f in figures),
                *map(typed, t.values.values()),
            ]
        )
    return out.getvalue()


def to_json(objectives: dict[str, str], trials: Sequence[Trial]) -> dict[str, Any]:
    best = {t.number for t in front(list(objectives), trials)}
    rows = [
        {
            "trial": t.number,
            "front": t.number in best,
            "values": t.values,
            "metrics": t.metrics,
            "failure": t.failure,
        }
        for t in trials
    ]
    return {"objectives": objectives, "trials": rows}


def to_html(objectives: dict[str, str], trials: Sequence[Trial]) -> str:
    """The table, and one plot per pair of objectives with the front filled."""
    best, done = front(list(objectives), trials), [t for t in trials if t.failure is None]
    plots = []
    for a, b in combinations(objectives, 2):
        svg = scatter(
            [t.metrics[a]["value"] for t in done],
            [t.metrics[b]["value"] for t in done],
            [t not in best for t in done],
            title=f"{a} and {b}",
            xlabel=heading(objectives[a]),
            ylabel=heading(objectives[b]),
        )
        plots.append({"title": f"{a} and {b}", "note": "filled: on the front", "svg": svg})
    rows = [
        {
            "cells": [cell or UNMEASURED if i != 1 else cell for i, cell in enumerate(row)],
            "front": row[1] == "front",
        }
        for row in _rows(objectives, trials)
    ]
    head = _columns(objectives, trials)
    return page("pareto.html", title="Search", head=head, rows=rows, plots=plots, legend=LEGEND)
