"""Two records against each other: which settings differ, and which figures."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from eval.report.leaderboard import columns, terms, trial
from eval.report.page import Block, page
from eval.report.paired import common_seeds, difference
from eval.report.words import (
    ARROWS,
    Record,
    aligned,
    bound,
    counted,
    figure,
    heading,
    interval,
    settings,
    shortened,
)
from lab.core.errors import UserError

OTHER_TRIAL = (
    "Attackers, their options, budget, cases or data differ: "
    "figures over attackers (worst case, verdict) do not answer one question."
)

_OVER_ATTACKERS = re.compile(
    r".*_worst(_|$)|verdict|asr|steps_to_relearn|benign_steps|baseline_horizon|m?r?sgr_|clip_t_|similarity_|audit_"
)


def compare(a: Record, b: Record) -> dict[str, Any]:
    """Return the differences B − A of settings and metrics, JSON-able.

    Intervals of differences are those of `difference`. ``significant`` needs one across seeds that
    excludes zero and, for figures over attackers, the same attackers and budget.

    Raises:
        UserError: records of different schemas (their minor version does not matter) or scenarios.
    """
    for key in ("schema", "scenario"):
        left, right = (str(record[key]) for record in (a, b))
        if key == "schema":
            left, right = left.split(".")[0], right.split(".")[0]
        if left != right:
            fix = f"have different {key}s; compare two records of one {key}."
            raise UserError("records", f"{a[key]} and {b[key]}", fix)
    options = [settings(record) for record in (a, b)]
    keys = sorted(options[0].keys() | options[1].keys())
    config = [{"key": k, "a": options[0].get(k), "b": options[1].get(k)} for k in keys]
    both = [name for name in a["metrics"] if name in b["metrics"]]
    first = columns(both)
    same_terms = trial(a) == trial(b) and terms(a) == terms(b)
    same_trial = same_terms and "failed" not in (a["status"], b["status"])  # may lack an attack
    data = [record["provenance"].get("data_hash") for record in (a, b)]
    names = [*first, *(n for n in both if n not in first)]
    shown = ("name", "scenario", "backbone", "immunizer", "attacks", "status", "seeds")
    return {
        "a": {k: a[k] for k in (*shown, "content_hash")},
        "b": {k: b[k] for k in (*shown, "content_hash")},
        "same_content": a["content_hash"] == b["content_hash"],
        "same_data": data[0] == data[1],
        "same_trial": same_trial,
        "common_seeds": common_seeds(a, b),
        "config": [c for c in config if c["a"] != c["b"]],
        "metrics": [_row(name, a, b, same_trial) for name in names],
        "only_a": [n for n in a["metrics"] if n not in b["metrics"]],
        "only_b": [n for n in b["metrics"] if n not in a["metrics"]],
    }


def _row(name: str, a: Record, b: Record, same_trial: bool) -> dict[str, Any]:
    left, right = a["metrics"][name], b["metrics"][name]
    row = {"name": name, "a": left["value"], "b": right["value"], "better": left["better"]}
    row |= {"unit": left["unit"], "bound_a": bound(left), "bound_b": bound(right)}
    row |= dict.fromkeys(("difference", "low", "high", "ratio", "how", "winner"))
    row["significant"] = False
    gap = difference(name, a, b)
    if gap is None:
        return row
    row |= {"difference": gap.value, "low": gap.low, "high": gap.high, "how": gap.how}
    row["significant"] = gap.significant and (same_trial or not _OVER_ATTACKERS.match(name))
    if gap.ratio is not None:
        row["ratio"] = dict(zip(("value", "low", "high"), gap.ratio, strict=True))
    if left["better"] == "neutral":
        return row
    higher = left["better"] == "higher"
    winner, loser = ("b", "a") if (gap.value > 0) == higher else ("a", "b")
    larger, smaller = (winner, loser) if higher else (loser, winner)
    if row[f"bound_{larger}"] == "≤" or row[f"bound_{smaller}"] == "≥":  # it may be the other one
        return row | {"winner": "undetermined", "significant": False}
    return row | {"winner": "tie" if gap.value == 0 else winner}


# ---- text

SHOWN = 10  # figures of a comparison on a terminal
HEAD = ["", "figure", "A", "B", "B − A [95 %]", "better"]


def to_text(result: dict[str, Any]) -> str:
    """Return the comparison for a terminal: settings and the ten figures that count most."""
    lines = [f"{side.upper()}: {_description(result[side])}" for side in "ab"]
    if result["same_content"]:
        return "\n".join([*lines, "Both records have the same content: every figure is equal."])
    lines += [*_warnings(result), f"\n{len(result['config'])} settings differ:"]
    for change in result["config"][:SHOWN]:
        sides = (shortened(str(change[side]), 60) for side in "ab")
        lines.append(f"  {change['key']}: {' → '.join(sides)}")
    lines += ["  …"] * (len(result["config"]) > SHOWN)
    changed = _changed(result)
    lines += ["", aligned([HEAD, *(_cells(row) for row in changed[:SHOWN])])]
    hidden, equal = len(changed[SHOWN:]), len(result["metrics"]) - len(changed)
    lines.append(f"{hidden} more figures differ and {equal} are equal, see the page.")
    for way, count in Counter(r["how"] for r in changed if r["how"]).most_common():
        lines.append(f"  intervals of {count}: {way}")
    return "\n".join(lines)


def to_html(result: dict[str, Any]) -> str:
    """Return the comparison as a page."""
    changed = _changed(result)
    config = [
        [c["key"], shortened(str(c["a"]), 60), shortened(str(c["b"]), 60)] for c in result["config"]
    ]
    rows = [
        [*cells[1:], row["how"]] for row, cells in zip(changed, map(_cells, changed), strict=True)
    ]
    lines = [f"{side.upper()}: {_description(result[side])}" for side in "ab"]
    lines += [*_warnings(result), f"{len(result['metrics']) - len(changed)} figures are equal."]
    for side in "ab":
        lines += [f"Only in {side.upper()}: {', '.join(result[f'only_{side}'])}."]
    blocks: list[Block] = [
        {"list": lines},
        {"table": [["figure", *HEAD[2:], "interval"], *rows], "label": "Figures"},
        {"heading": "Settings that differ"},
        {"table": [["key", "A", "B"], *config], "label": "Settings"},
    ]
    return page("Comparison", blocks)


def _warnings(result: dict[str, Any]) -> list[str]:
    other_data = "The data differ: differences are not due to settings alone."
    return [*[other_data] * (not result["same_data"]), *[OTHER_TRIAL] * (not result["same_trial"])]


def _changed(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows that differ."""
    rows = result["metrics"]
    return [r for r in rows if r["difference"] != 0 and not (r["a"] is None and r["b"] is None)]


def _description(side: dict[str, Any]) -> str:
    attacks = (
        side["attacks"][0] if len(side["attacks"]) == 1 else counted(len(side["attacks"]), "attack")
    )
    return f"{side['name']} ({side['immunizer']} against {attacks}), {side['status']}"


def _cells(row: dict[str, Any]) -> list[str]:
    sides = [f"{row[f'bound_{side}']} {figure(row[side])}".strip() for side in "ab"]
    change = f"{figure(row['difference'])} {interval(row)}".strip()
    if row["ratio"] is not None:
        change += f", ÷ {figure(row['ratio']['value'])} {interval(row['ratio'])}"
    winner = {"a": "A", "b": "B"}.get(row["winner"] or "", row["winner"] or "")
    if winner in ("A", "B"):
        winner += ", significant" if row["significant"] else ", not significant"
    return [ARROWS[row["better"]], heading(row["name"]), *sides, change, winner]
