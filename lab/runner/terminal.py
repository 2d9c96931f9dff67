"""What a run prints at its end: its verdict, five figures, all metrics on request."""

from __future__ import annotations

import os
import sys
import textwrap
from collections import Counter

from eval.report.outcomes import MARKS, key_figures, outcome
from eval.report.words import measured
from lab.core.record import Record

_COLOURS = {"✓": 32, "✗": 31, "?": 33}  # green, red, yellow


def figures(record: Record) -> dict[str, str]:
    """Return heading → value with its 95 % interval of the figures that count, where measured."""
    metrics = record["metrics"]
    shown = {}
    for heading, name in {**key_figures(record), "utility lost": "utility_detection_drop"}.items():
        shown[heading] = measured(metrics.get(name), name)
        if f"{name}_baseline" in metrics:
            shown[heading] += f", baseline {measured(metrics[f'{name}_baseline'], name)}"
    return {heading: value for heading, value in shown.items() if value != "–"}


def paint(text: str) -> str:
    """Colour a text by the mark that it begins with, on a terminal that takes colours."""
    colour = _COLOURS.get(text[:1])
    if colour is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{colour}m{text}\033[0m"


def summarize(record: Record, verbose: bool = False) -> str:
    """Return the verdict in one sentence and five figures; all metrics if ``verbose``."""
    result = outcome(record)
    headline = textwrap.wrap(f"{MARKS[result.tone]} {result.headline}", 100, subsequent_indent="  ")
    shown = {"verdict": result.label} | figures(record)
    if verbose:
        shown |= {n: measured(m, n) for n, m in record["metrics"].items() if n != "verdict"}
    width = max(map(len, shown))
    others = Counter(stage["status"] for stage in record["stages"] if stage["status"] != "ok")
    lines = [
        *(f"  {heading:<{width}}  {value}" for heading, value in shown.items()),
        *(f"  {count} of {len(record['stages'])} stages {s}" for s, count in others.items()),
        *(f"  {name} was left out: {reason}" for name, reason in record["skipped"].items()),
    ]
    if verbose:
        lines += [f"  note: {note}" for note in [*result.details, *record["notes"]]]
    return "\n".join([paint(headline[0]), *headline[1:], "", *lines, ""])


def summarize_shortly(record: Record) -> str:
    """Return one line: verdict, method, figures, time."""
    result = outcome(record)
    shown = [f"{heading} {value}" for heading, value in figures(record).items()]
    seconds = f"{record['provenance']['wall_time_s']:.0f} s"
    line = ", ".join([f"{result.label}: {record['immunizer']}", *shown, seconds])
    return paint(f"{MARKS[result.tone]} {line}")
