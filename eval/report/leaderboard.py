"""Several records side by side: ordered rows, as Markdown, CSV or HTML."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from eval.report.labels import labels
from eval.report.outcomes import outcome
from eval.report.page import page
from eval.report.trials import groups, trial
from eval.report.words import (
    ARROWS,
    ENDED_EARLY,
    UNMEASURED,
    Record,
    bound,
    heading,
    measured,
    support,
)
from lab.core.record import is_immunized

# in this order; the worst case over attackers comes first, the benign side after the harmful one
COLUMNS = (
    "verdict",
    "slowdown_harmful_worst",
    "slowdown_benign_worst",
    "slowdown_relative_worst",
    "slowdown_loss_harmful_worst",
    "slowdown_loss_benign_worst",
    "sgrc_harmful_worst",
    "sgrc_benign_worst",
    "rir",
    "rir_bound_ratio",
    "rir_above_one",
    "kappa_harmful_ratio",
    "kappa_benign_ratio",
    "rir_ridge",
    "rir_release",
    "steps_to_relearn_ratio_worst",
    "steps_to_relearn_ratio",
    "asr",
    "asr_baseline",
    "msgr_clip",
    "mrsgr_clip",
    "benign_steps_ratio",
    "sgr_benign_clip",
    "utility_detection_drop",
    "utility_clip_drift",
    "asr_prompt_adherent",
    "steps_to_relearn_prompt_adherent_ratio",
)
# metrics of text-to-image runs by other scorers and of other utilities, where somebody has them;
# not those of a longer horizon, of one model or of other prompts (msgr_clip_2x, …_baseline,
# …_reworded), which the table of all metrics has
_MORE = re.compile(r"(msgr|mrsgr|sgr_benign)_[a-z0-9_]+|utility_[a-z0-9_]+_drift")
_NOT_MORE = re.compile(r".*_(baseline|auc|legacy|\d+x)")
_HOLDING = (
    "slowdown_harmful_worst",
    "sgrc_harmful_worst",
    "rir",
    "steps_to_relearn_ratio_worst",
    "msgr_clip",
)
# of the least protected target
_LEAST = ("steps_to_relearn_ratio_worst", "slowdown_harmful_worst")

Row = dict[str, Any]


def columns(names: Iterable[str]) -> list[str]:
    """Those metrics of ``names`` that a table shows, in its order."""
    known = set(names)
    more = {n for n in known - set(COLUMNS) if _MORE.fullmatch(n) and not _NOT_MORE.fullmatch(n)}
    more = {n for n in more if not any(n.startswith(f"{m}_") for m in known - {n})}
    return [c for c in COLUMNS if c in known] + sorted(more)


def leaderboard(records: Sequence[Record]) -> list[Row]:
    """Rows ordered by scenario, backbone and trial, then best first; the baseline and failed runs
    come last, unranked.

    Order: complete runs before those that diverged in part; verdict; among those that hold (or have
    none) harmful slowdown and SGRC against the worst attacker, then RIR, or the worst target's
    steps to relearn, then MSGR; among those that fail the number of checks passed, then the
    slowdown of the least protected target (of feature extractors the harmful slowdown).
    """
    rows: list[Row] = []
    for place, found in groups(records).items():
        group = []
        for record, label in zip(found, labels(found), strict=True):
            metrics = {k: record["metrics"][k] for k in columns(record["metrics"])}
            passed = [bool(check["passed"]) for check in record["tables"].get("verdict", [])]
            group.append(
                {
                    "scenario": place.scenario,
                    "backbone": place.backbone,
                    "title": place.title,
                    "label": label,
                    "immunizer": record["immunizer"],
                    "trial": trial(record),
                    "status": record["status"],
                    "outcome": outcome(record).label,
                    "seeds": len(record["seeds"]),
                    "attacks": list(record["attacks"]),
                    "metrics": metrics,
                    "checks": (sum(passed), len(passed)),
                    "rank": None,
                    "best": [],
                }
            )
        group.sort(key=_key)
        for rank, row in enumerate((r for r in group if _ranked(r)), start=1):
            row["rank"] = rank
        _mark_best(group)
        rows += group
    return rows


def _ranked(row: Row) -> bool:
    """Also a failed run has figures where an attack of several failed: of fewer attackers than it
    was asked for.
    """
    return bool(is_immunized(row) and row["metrics"] and row["status"] not in ENDED_EARLY)


def _partly(row: Row) -> bool:
    return bool(row["status"] == "diverged")


def _key(row: Row) -> tuple[float, ...]:
    verdict = _value(row, "verdict")
    failing = [row["checks"][0], _least_slowdown(row)]
    values = failing if verdict == 0 else [_value(row, name) for name in _HOLDING]
    first = (
        0.0 if _ranked(row) else 1.0,
        1.0 if _partly(row) else 0.0,
        1.0 if verdict is None else -verdict,
    )
    return (*first, *(float("inf") if v is None else -v for v in values))


def _least_slowdown(row: Row) -> float | None:
    """Return the slowdown of the least protected target."""
    return next((v for v in (_value(row, name) for name in _LEAST) if v is not None), None)


def _mark_best(group: list[Row]) -> None:
    """Best figure of each column among complete runs; where verdicts were passed, only among those
    that hold.
    """
    complete = [r for r in group if r["status"] == "ok"]
    group = [r for r in complete if _value(r, "verdict") != 0]
    for name in columns(n for r in group for n in r["metrics"]):
        cells = [
            (r, r["metrics"][name]) for r in group if name in r["metrics"] and name != "verdict"
        ]
        cells = [(r, m) for r, m in cells if m["value"] is not None and m["better"] != "neutral"]
        if len(cells) > 1:
            higher = cells[0][1]["better"] == "higher"
            top = (max if higher else min)(m["value"] for _, m in cells)
            best, others = (
                ("≤", "≥") if higher else ("≥", "≤")
            )  # limits that leave it open who is best
            if any(bound(m) == (best if m["value"] == top else others) for _, m in cells):
                continue
            for row, metric in cells:
                if metric["value"] == top:
                    row["best"].append(name)


def sections(rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[Row]]]:
    """(title, columns that somebody has, rows) per scenario, backbone and trial."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["title"], []).append(row)
    for title, group in found.items():
        yield title, columns(n for r in group for n in r["metrics"]), group


def direction(column: str, rows: Sequence[Row]) -> str:
    """↑, ↓ or · for a column."""
    better = next(
        (r["metrics"][column]["better"] for r in rows if column in r["metrics"]), "neutral"
    )
    return ARROWS[better]


def cell(row: Row, column: str) -> str:
    """One figure of one row as text."""
    metric = row["metrics"].get(column)
    if column == "verdict" and metric is not None and metric["value"] is not None:
        return "✓ holds" if metric["value"] else "✗ fails"
    return measured(metric)


def sound(row: Row) -> str:
    """How many seeds the row's intervals stand on."""
    found = [m for n, m in row["metrics"].items() if n != "verdict"]
    metric = next((m for m in found if m["value"] is not None), next(iter(found), None))
    return support(metric) if metric is not None else UNMEASURED


LEGEND = (
    "↑ higher is better, ↓ lower. [low, high]: 95 % interval: Student's t over seed "
    "means below ten seeds, two-stage"
    " bootstrap from ten on; fewer than three seeds support no claim about other "
    "seeds. Bold: best of the column among"
    " complete runs that hold; ≥: the target was not reached, a lower limit, ≤: an "
    "upper one. Partly diverged:"
    " immunization failed on some cases, which count as failures; such runs come "
    "after complete ones."
)


def to_markdown(rows: Sequence[Row]) -> str:
    """One Markdown table per scenario, backbone and trial."""
    parts = []
    for title, shown, group in sections(rows):
        head = [
            "#",
            "immunizer",
            "outcome",
            *(f"{heading(c)} {direction(c, group)}" for c in shown),
            "seeds",
        ]
        first = headline(group)
        lines = [
            f"### {_md(title)}",
            "",
            *([_md(first), ""] if first else []),
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
        ]
        for row in group:
            cells = [_md(cell(row, c)) for c in shown]
            cells = [
                f"**{t}**" if c in row["best"] else t for c, t in zip(shown, cells, strict=True)
            ]
            rank = str(row["rank"] or "–")
            lines.append(
                "| "
                f"{' | '.join([rank, _md(row['label']), _md(row['outcome']), *cells, sound(row)])} "
                "|"
            )
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, LEGEND]) + "\n"


def _md(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def to_csv(rows: Sequence[Row]) -> str:
    """One line per row, full precision, with low, high, n and kind of interval for every figure."""
    shown = columns(n for r in rows for n in r["metrics"])
    head = [
        "rank",
        "scenario",
        "backbone",
        "trial",
        "immunizer",
        "label",
        "status",
        "outcome",
        "seeds",
    ]
    parts = ("value", "low", "high", "n", "interval")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, *(c if p == "value" else f"{c}_{p}" for c in shown for p in parts)])
    for row in rows:
        figures = [(row["metrics"].get(c) or {}).get(p) for c in shown for p in parts]
        writer.writerow([_csv(row[h]) for h in head] + ["" if f is None else f for f in figures])
    return out.getvalue()


def _csv(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets a leading quote."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t"):
        return "'" + value
    return "" if value is None else value


def headline(group: Sequence[Row]) -> str:
    """Who comes first among several immunizers, and whether the second is distinguishable; empty
    for fewer than two.
    """
    ranked = [r for r in group if r["rank"] is not None]
    if len(ranked) < 2:
        return ""
    first, second = ranked[:2]
    verdicts = [r["metrics"].get("verdict") for r in ranked]
    if all(v is not None and v["value"] == 0 for v in verdicts):
        text = f"The baseline wins: none of {len(ranked)} immunizers holds."
        return f"{text} {_closest(first)}".rstrip()
    name = next(
        (n for n in _HOLDING if all(_value(r, n) is not None for r in (first, second))), None
    )
    if name is None:
        return f"{first['label']} comes first of {len(ranked)} immunizers."
    a, b = first["metrics"][name], second["metrics"][name]
    text = f"{first['label']} comes first of {len(ranked)}: {heading(name)} {measured(a)}"
    text += f", before {second['label']} with {measured(b)}"
    if _partly(second):
        return f"{text}, which diverged on part of the run."
    if _value(second, "verdict") == 0:
        return f"{text}, which does not hold."
    if not a["interval"] == b["interval"] == "across_seeds":
        return f"{text}; too few seeds to say how sure that order is."
    if bound(b) == "≥" or bound(a) == "≤":
        return f"{text}; that is a limit, so the order is open."
    if any(m[end] is None for m in (a, b) for end in ("low", "high")):
        return f"{text}; one of them has no interval, so how sure that order is cannot be said."
    apart = a["low"] > b["high"] or a["high"] < b["low"]
    return (
        f"{text}; their intervals "
        f"{'do not overlap' if apart else 'overlap, so the order may be chance'}."
    )


def _closest(row: Row) -> str:
    passed, total = row["checks"]
    name = next((n for n in _LEAST if _value(row, n) is not None), None)
    figure = f", {heading(name)} {measured(row['metrics'][name])}" if name else ""
    return f"Closest: {row['label']}, which passes {passed} of {total} checks{figure}."


def _value(row: Row, name: str) -> float | None:
    return (row["metrics"].get(name) or {}).get("value")


def boards(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the templates need: per scenario, backbone and trial a title, headings and rows of
    (text, is best).
    """
    out = []
    for title, shown, group in sections(rows):
        lines = [
            {
                "rank": row["rank"] or "–",
                "label": row["label"],
                "outcome": row["outcome"],
                "status": row["status"],
                "cells": [(cell(row, c), c in row["best"]) for c in shown],
                "seeds": sound(row),
                "baseline": not is_immunized(row),
            }
            for row in group
        ]
        heads = [(heading(c), direction(c, group)) for c in shown]
        out.append({"title": title, "heads": heads, "rows": lines, "headline": headline(group)})
    return out


def to_html(rows: Sequence[Row]) -> str:
    """A page with the leaderboard alone."""
    return page("leaderboard.html", title="Leaderboard", boards=boards(rows), legend=LEGEND)
