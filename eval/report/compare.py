"""Two records against each other: what was asked differently, and what came out differently."""

from __future__ import annotations

import math
from typing import Any

from eval.report.leaderboard import settings
from eval.report.words import ARROWS, Record, figure
from lab.errors import UserError


def compare(a: Record, b: Record) -> dict[str, Any]:
    """Differences B − A of settings and metrics, JSON-able.

    The interval of a difference combines both records' intervals by MOVER (Zou & Donner 2008, method of variance
    estimates recovery), as if both were independent; they share seeds, so it is wider than a paired one. ``sure`` needs
    both intervals across seeds and a difference whose interval excludes zero.

    Raises:
        UserError: records of different schemas (their minor version does not matter) or scenarios.
    """
    for key in ("schema", "scenario"):
        if a[key] != b[key] and not (key == "schema" and _major(a) == _major(b)):
            raise UserError(
                "records", f"{a[key]} and {b[key]}", f"have different {key}s; compare two records of one {key}."
            )
    left, right = settings(a), settings(b)
    changed = [
        {"key": k, "a": left.get(k), "b": right.get(k)}
        for k in sorted(left.keys() | right.keys())
        if left.get(k) != right.get(k)
    ]
    both = [name for name in a["metrics"] if name in b["metrics"]]
    data_a, data_b = a["provenance"].get("data_hash"), b["provenance"].get("data_hash")
    return {
        "a": _identity(a),
        "b": _identity(b),
        "same_content": a["content_hash"] == b["content_hash"],
        "same_data": data_a == data_b,
        "config": changed,
        "metrics": [_difference(name, a["metrics"][name], b["metrics"][name]) for name in both],
        "only_a": [n for n in a["metrics"] if n not in b["metrics"]],
        "only_b": [n for n in b["metrics"] if n not in a["metrics"]],
    }


def _major(record: Record) -> str:
    return str(record["schema"]).split(".")[0]


def _identity(record: Record) -> dict[str, Any]:
    keys = ("name", "scenario", "backbone", "immunizer", "status", "seeds", "content_hash")
    return {k: record[k] for k in keys}


def _difference(name: str, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    row = {"name": name, "a": a["value"], "b": b["value"], "better": a["better"], "unit": a["unit"]}
    row |= {"difference": None, "low": None, "high": None, "winner": None, "sure": False}
    if a["value"] is None or b["value"] is None:
        return row
    gap = b["value"] - a["value"]
    row["difference"] = gap
    if None not in (a["low"], a["high"], b["low"], b["high"]):
        row["low"] = gap - math.hypot(b["value"] - b["low"], a["high"] - a["value"])
        row["high"] = gap + math.hypot(b["high"] - b["value"], a["value"] - a["low"])
        across = a["interval"] == b["interval"] == "across_seeds"
        row["sure"] = bool(across and (row["low"] > 0 or row["high"] < 0))
    if a["better"] != "neutral":
        wins_b = gap > 0 if a["better"] == "higher" else gap < 0
        row["winner"] = "tie" if gap == 0 else "b" if wins_b else "a"
    return row


def to_text(result: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    lines = [
        f"{side.upper()}: {result[side]['name']} ({result[side]['immunizer']}, {result[side]['status']})"
        for side in "ab"
    ]
    if result["same_content"]:
        return "\n".join([*lines, "Both records have the same content: every figure is equal."])
    if not result["same_data"]:
        lines.append("The data differ: differences below are not due to settings alone.")
    lines.append(f"\nsettings that differ ({len(result['config'])}):")
    lines += [f"  {c['key']}: {_short(c['a'])} → {_short(c['b'])}" for c in result["config"]]
    rows = result["metrics"]
    changed = [r for r in rows if r["difference"] != 0]
    lines.append(f"\nmetrics, B − A ({len(changed)} differ, {len(rows) - len(changed)} are equal):")
    width = max((len(r["name"]) for r in changed), default=0)
    for row in changed:
        lines.append(f"  {row['name']:<{width}} {ARROWS[row['better']]} {_line(row)}")
    for side in "ab":
        if result[f"only_{side}"]:
            lines.append(f"only in {side.upper()}: {', '.join(result[f'only_{side}'])}")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return f"{figure(row['a'])} → {figure(row['b'])}"
    span = "" if row["low"] is None else f" [{figure(row['low'])}, {figure(row['high'])}]"
    winner = {"a": "A better", "b": "B better"}.get(row["winner"] or "", "")
    sure = (", sure" if row["sure"] else ", not sure") if winner else ""
    change = f"{figure(row['a'])} → {figure(row['b'])}  difference {figure(row['difference'])}{span}"
    return f"{change}  {winner}{sure}".rstrip()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
