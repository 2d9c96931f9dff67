"""The end of a run on one terminal screen: who won, by how much and how sure that is."""

from __future__ import annotations

import textwrap
from collections import Counter

from eval.report.leaderboard import columns
from eval.report.outcomes import outcome
from eval.report.words import ARROWS, Record, heading, measured, support

WIDTH = 100
NOTE_WIDTH = 150
_MARKS = {"good": "✓", "bad": "✗", "unsure": "?", "neutral": "·", "error": "!"}


def summary(record: Record) -> str:
    """At most about 30 lines of plain text, 100 columns wide."""
    found = outcome(record)
    attacks = ", ".join(record["attacks"]) or "no attack"
    lines = [
        f"── {record['immunizer']} against the baseline · {record['scenario']} on "
        f"{record['backbone']} · {attacks}",
        *_wrap(f"{_MARKS[found.tone]} {found.headline}", "  "),
    ]
    for detail in found.details:
        lines += _wrap(detail, "    ")
    shown = [n for n in columns(record["metrics"]) if n != "verdict"]
    if shown:
        width = max(len(heading(n)) for n in shown)
        lines.append("")
        for name in shown:
            metric = record["metrics"][name]
            value = (
                measured(metric) if metric["value"] is not None else f"no value: {metric['note']}"
            )
            text = f"  {heading(name):<{width}} {ARROWS[metric['better']]} {value}"
            lines.append(text if len(text) <= WIDTH else text[: WIDTH - 2] + " …")
        known = next((n for n in shown if record["metrics"][n]["value"] is not None), shown[0])
        lines.append(f"  {'':<{width}}   ({support(record['metrics'][known])})")
    lines += _remarks(record)
    return "\n".join(lines)


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _data_notes(notes: list[str]) -> list[str]:
    """What was dropped or imputed, the rank that remains, an immunization cut short; without these
    the first note.
    """
    words = ("remain", "dropped", "replaced", "left the finite", "is left out")
    return [n for n in notes if any(word in n.lower() for word in words)] or notes[:1]


def _remarks(record: Record) -> list[str]:
    out = []
    for status, count in Counter(
        c["status"] for c in record["cells"] if c["status"] != "ok"
    ).items():
        out.append(f"  {count} of {len(record['cells'])} stages {status}")
    out += [f"  skipped {name}: {reason}" for name, reason in record["skipped"].items()]
    shown = _data_notes(record["notes"])
    for note in shown:
        out += _wrap(f"data: {textwrap.shorten(note, NOTE_WIDTH, placeholder=' …')}", "  ")
    if len(record["notes"]) > len(shown):
        out.append(f"  data: {len(record['notes']) - len(shown)} more notes in the record")
    facts = record["provenance"]
    dirty = " with uncommitted changes" if facts.get("git_dirty") else ""
    sha = (facts.get("git_sha") or "no git")[:10]
    out.append(
        f"  {facts['wall_time_s']:.1f} s, peak {facts['peak_memory_mb']:.0f} MB, "
        f"{facts['device']}, {sha}{dirty}"
    )
    return ["", *out]
