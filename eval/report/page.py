"""Pages as lists of blocks, which the one template `report.html.j2` renders.

A block is a mapping whose keys say what it is: ``heading``, ``text``, ``outcome``, ``table`` (of
pandas), ``tiles`` (checks), ``forest``, ``plots``, ``image``, ``row`` (details of a record),
``list``, ``facts``, or ``summary`` with the collapsed ``blocks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from eval.report.outcomes import MARKS, TONES
from eval.report.words import figure, measured

Block = dict[str, Any]
ROWS = 100  # of a record's table in the page; the record holds all
_PLOTTED = ("spectrum", "principal_angles", "pencil", "verdict", "transfer_cases")
_ABOUT = ("concept", "case", "task", "attack", "model")  # first columns of a table


def page(title: str, blocks: Sequence[Block]) -> str:
    """Return a self-contained page; every value but SVG (`Markup`) is escaped."""
    return _template().render(title=title, blocks=blocks)


def collapsed(summary: str, blocks: Sequence[Block]) -> list[Block]:
    """Return collapsed blocks; nothing where there are none."""
    return [{"summary": summary, "blocks": blocks}] if blocks else []


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "measured": measured}
    environment.filters["table"] = _table
    environment.globals |= {"marks": MARKS, "tones": {mark: tone for tone, mark in MARKS.items()}}
    environment.globals |= {"word_tones": TONES, "rows_shown": ROWS, "plotted": _PLOTTED}
    return environment.get_template("report.html.j2")


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float):
        return figure(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the first rows: what a row is about, then words, then figures."""
    frame = pd.DataFrame(rows, dtype=object)
    is_word = frame.map(lambda value: isinstance(value, str)).any()
    head = sorted(frame, key=lambda key: (key not in _ABOUT, not is_word[key]))
    return frame[head].head(ROWS)
