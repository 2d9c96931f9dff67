"""What a run prints at its end: its verdict, five figures, all metrics on request."""

from __future__ import annotations

import os
import sys
import textwrap
from collections import Counter
from typing import Any

from eval.report.outcomes import outcome
from lab.core.record import Record, is_immunized

# heading → metrics, of which the first that a record has is shown
FIGURES = {
    "attack success rate": ("asr",),
    "relearning slowdown": (
        "steps_to_relearn_ratio_worst",
        "steps_to_relearn_ratio",
        "slowdown_harmful_worst",
    ),
    "benign cost": ("benign_steps_ratio_worst", "benign_steps_ratio", "slowdown_benign_worst"),
    "utility lost": ("utility_detection_drop",),
    "RIR": ("rir",),
}
MARKS = {"passes": "✓", "fails": "✗", "inconclusive": "?"}
_COLOURS = {"✓": 32, "✗": 31, "?": 33}  # green, red, yellow


def verdict(record: Record) -> str:
    """Return ``passes``, ``fails`` or ``inconclusive``, or why there is no verdict."""
    metric = record["metrics"].get("verdict")
    if record["status"] in ("failed", "preempted") or (record["status"] != "ok" and not metric):
        return str(record["status"])
    if metric is None:
        return "no verdict" if is_immunized(record) else "baseline"
    return {None: "inconclusive", 0: "fails", 1: "passes"}[metric["value"]]


def figures(record: Record, interval: bool = True) -> dict[str, str]:
    """Return heading → value of `FIGURES`, "–" where the record has none.

    Args:
        record: with its ``metrics``.
        interval: whether the 95 % interval is shown.
    """
    metrics, shown = record["metrics"], {}
    for heading, names in FIGURES.items():
        name = next((name for name in names if name in metrics), None)
        shown[heading] = _value(name, metrics[name], interval) if name else "–"
    if "asr_baseline" in metrics and shown["attack success rate"] != "–":
        baseline = _value("asr_baseline", metrics["asr_baseline"], False)
        shown["attack success rate"] += f", baseline {baseline}"
    return shown


def _value(name: str, metric: dict[str, Any], interval: bool) -> str:
    if metric["value"] is None:
        return "–"
    is_share = name.startswith("asr") or name.endswith("_drop")
    scale, unit = (100, " %") if is_share else (1, metric["unit"])
    unit = unit if unit in ("", "×", " %") else f" {unit}"
    limit = {"lower": "≥ ", "upper": "≤ "}.get(metric.get("bound") or "", "")
    text = f"{limit}{_rounded(scale * metric['value'])}{unit}"
    if interval and metric["low"] is not None and metric["high"] is not None:
        ends = " to ".join(_rounded(scale * metric[end]) for end in ("low", "high"))
        text += f" (95 % interval {ends})"
    return text


def _rounded(number: float) -> str:
    return f"{number:.0f}" if 10 <= abs(number) < 1e6 else f"{number:.2g}"


def paint(text: str) -> str:
    """Colour a text by the mark that it begins with, on a terminal that takes colours."""
    colour = _COLOURS.get(text[:1])
    if colour is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{colour}m{text}\033[0m"


def summarize(record: Record, verbose: bool = False) -> str:
    """Return the verdict in one sentence and five figures; all metrics if ``verbose``."""
    word = verdict(record)
    headline = f"{MARKS.get(word, '·')} {word}: {outcome(record).headline}"
    lines = textwrap.wrap(headline, 100, subsequent_indent="  ")
    lines = [paint(lines[0]), *lines[1:], ""]
    shown = {"verdict": word} | {k: v for k, v in figures(record).items() if v != "–"}
    if verbose:
        shown = {n: _value(n, m, True) for n, m in record["metrics"].items()} | shown
    width = max(map(len, shown))
    lines += [f"  {heading:<{width}}  {value}" for heading, value in shown.items()]
    others = Counter(cell["status"] for cell in record["cells"] if cell["status"] != "ok")
    lines += [f"  {count} of {len(record['cells'])} stages {s}" for s, count in others.items()]
    lines += [f"  {name} was left out: {reason}" for name, reason in record["skipped"].items()]
    if verbose:
        lines += [f"  note: {note}" for note in record["notes"]]
    return "\n".join([*lines, ""])


def summarize_shortly(record: Record) -> str:
    """Return one line: verdict, method, figures, time."""
    word = verdict(record)
    shown = [f"{k} {v}" for k, v in figures(record, interval=False).items() if v != "–"]
    seconds = f"{record['provenance']['wall_time_s']:.0f} s"
    line = ", ".join([f"{word}: {record['immunizer']}", *shown, seconds])
    return paint(f"{MARKS.get(word, '·')} {line}")
