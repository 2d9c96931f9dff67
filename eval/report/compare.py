"""Two records against each other: what was asked differently, and what came out differently."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from eval.report.labels import settings
from eval.report.leaderboard import columns
from eval.report.page import page
from eval.report.paired import common_seeds, difference
from eval.report.trials import terms, trial
from eval.report.words import ARROWS, Record, bound, figure, heading, interval
from lab.core.errors import UserError

OTHER_TRIAL = (
    "Attackers, their options, budget, cases or data differ: "
    "figures over attackers (worst case, verdict) do not answer one question."
)

_OVER_ATTACKERS = re.compile(
    r".*_worst(_|$)|verdict|asr|steps_to_relearn|benign_steps|baseline_horizon|m?r?sgr_|clip_t_|similarity_|audit_"
)


def compare(a: Record, b: Record) -> dict[str, Any]:
    """Differences B − A of settings and metrics, JSON-able.

    Intervals of differences are those of `eval.report.paired.difference`; ``sure`` needs one across
    seeds that excludes zero, and for figures over attackers the same attackers and budget.

    Raises:
        UserError: records of different schemas (their minor version does not matter) or scenarios.
    """
    for key in ("schema", "scenario"):
        if a[key] != b[key] and not (key == "schema" and _major(a) == _major(b)):
            raise UserError(
                "records",
                f"{a[key]} and {b[key]}",
                f"have different {key}s; compare two records of one {key}.",
            )
    left, right = settings(a), settings(b)
    changed = [
        {"key": k, "a": left.get(k), "b": right.get(k)}
        for k in sorted(left.keys() | right.keys())
        if left.get(k) != right.get(k)
    ]
    both = [name for name in a["metrics"] if name in b["metrics"]]
    first = columns(both)
    asked = trial(a) == trial(b) and terms(a) == terms(b)
    same_trial = asked and "failed" not in (a["status"], b["status"])  # which may lack an attack
    data_a, data_b = a["provenance"].get("data_hash"), b["provenance"].get("data_hash")
    return {
        "a": _identity(a),
        "b": _identity(b),
        "same_content": a["content_hash"] == b["content_hash"],
        "same_data": data_a == data_b,
        "same_trial": same_trial,
        "common_seeds": common_seeds(a, b),
        "config": changed,
        "metrics": [
            _row(name, a, b, same_trial) for name in (*first, *(n for n in both if n not in first))
        ],
        "only_a": [n for n in a["metrics"] if n not in b["metrics"]],
        "only_b": [n for n in b["metrics"] if n not in a["metrics"]],
    }


def _major(record: Record) -> str:
    return str(record["schema"]).split(".")[0]


def _identity(record: Record) -> dict[str, Any]:
    keys = (
        "name",
        "scenario",
        "backbone",
        "immunizer",
        "attacks",
        "status",
        "seeds",
        "content_hash",
    )
    return {k: record[k] for k in keys}


def _whose(side: dict[str, Any]) -> str:
    attackers = ", ".join(side["attacks"]) or "nobody"
    return f"{side['name']} ({side['immunizer']} against {attackers})"


def _row(name: str, a: Record, b: Record, same_trial: bool) -> dict[str, Any]:
    left, right = a["metrics"][name], b["metrics"][name]
    row = {
        "name": name,
        "a": left["value"],
        "b": right["value"],
        "better": left["better"],
        "unit": left["unit"],
    }
    row |= {"bound_a": bound(left), "bound_b": bound(right)}
    row |= {
        "difference": None,
        "low": None,
        "high": None,
        "ratio": None,
        "how": None,
        "winner": None,
        "sure": False,
    }
    found = difference(name, a, b)
    if found is None:
        return row
    sure = found.sure and (same_trial or not _OVER_ATTACKERS.match(name))
    row |= {
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "how": found.how,
        "sure": sure,
    }
    if found.ratio is not None:
        row["ratio"] = dict(zip(("value", "low", "high"), found.ratio, strict=True))
    if left["better"] != "neutral":
        higher = left["better"] == "higher"
        wins_b = found.value > 0 if higher else found.value < 0
        winner, loser = ("b", "a") if wins_b else ("a", "b")
        larger, smaller = (winner, loser) if higher else (loser, winner)
        if (
            row[f"bound_{larger}"] == "≤" or row[f"bound_{smaller}"] == "≥"
        ):  # the order may be the other one
            return row | {"winner": "open", "sure": False}
        row["winner"] = "tie" if found.value == 0 else winner
    return row


def to_text(result: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    lines = [f"{side.upper()}: {_whose(result[side])}, {result[side]['status']}" for side in "ab"]
    if result["same_content"]:
        return "\n".join([*lines, "Both records have the same content: every figure is equal."])
    if not result["same_data"]:
        lines.append("The data differ: differences below are not due to settings alone.")
    if not result["same_trial"]:
        lines.append(OTHER_TRIAL)
    lines.append(f"\nsettings that differ ({len(result['config'])}):")
    lines += [f"  {c['key']}: {_short(c['a'])} → {_short(c['b'])}" for c in result["config"]]
    changed, equal = _split(result["metrics"])
    lines.append(
        f"\nmetrics, B − A, and ÷: B ÷ A of geometric means ({len(changed)} differ, "
        f"{equal} are equal):"
    )
    width = max((len(r["name"]) for r in changed), default=0)
    for row in changed:
        lines.append(f"  {row['name']:<{width}} {ARROWS[row['better']]} {_line(row)}")
    for way, count in Counter(r["how"] for r in changed if r["how"]).most_common():
        lines.append(f"  intervals of {count}: {way}")
    for side in "ab":
        if result[f"only_{side}"]:
            lines.append(f"only in {side.upper()}: {', '.join(result[f'only_{side}'])}")
    return "\n".join(lines)


def to_html(result: dict[str, Any]) -> str:
    """The comparison as a page."""
    changed, equal = _split(result["metrics"])
    rows = [
        {
            "name": heading(r["name"]),
            "arrow": ARROWS[r["better"]],
            "a": _side(r, "a"),
            "b": _side(r, "b"),
            "change": _change(r),
            "scored": _scored(r),
            "how": r["how"] or "",
            "sure": r["sure"],
        }
        for r in changed
    ]
    config = [{"key": c["key"], "a": _short(c["a"]), "b": _short(c["b"])} for c in result["config"]]
    return page(
        "comparison.html",
        title="Comparison",
        result=result,
        rows=rows,
        config=config,
        equal=equal,
        other_trial=OTHER_TRIAL,
    )


def _split(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Rows that differ, and the number of the others."""
    changed = [r for r in rows if r["difference"] != 0 and not (r["a"] is None and r["b"] is None)]
    return changed, len(rows) - len(changed)


def _line(row: dict[str, Any]) -> str:
    sides = f"{_side(row, 'a')} → {_side(row, 'b')}"
    return (
        sides
        if row["difference"] is None
        else f"{sides}  difference {_change(row)}  {_scored(row)}".rstrip()
    )


def _side(row: dict[str, Any], side: str) -> str:
    return f"{row[f'bound_{side}']} {figure(row[side])}".lstrip()


def _change(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return figure(None)
    text = figure(row["difference"]) + ("" if row["low"] is None else " " + interval(row))
    return (
        text
        if row["ratio"] is None
        else f"{text}, ÷ {figure(row['ratio']['value'])} {interval(row['ratio'])}"
    )


def _scored(row: dict[str, Any]) -> str:
    if row["winner"] == "open":
        return "open, as the figure behind a limit is not known"
    winner = {"a": "A better", "b": "B better"}.get(row["winner"] or "", "")
    return f"{winner}{', sure' if row['sure'] else ', not sure'}" if winner else ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
