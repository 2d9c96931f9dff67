"""The end of a run on a terminal: the verdict, why, and the figures that count."""

from __future__ import annotations

import textwrap

from eval.report.outcomes import MARKS, outcome
from eval.report.words import Record

WIDTH = 100


def summary(record: Record) -> str:
    """Return the outcome, wrapped at `WIDTH` columns."""
    result = outcome(record)
    lines = textwrap.wrap(f"{MARKS[result.tone]} {result.headline}", WIDTH, subsequent_indent="  ")
    for detail in result.details:
        lines += textwrap.wrap(detail, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
