"""Pages as lists of blocks, which the one template `report.html.j2` renders.

A block is a mapping whose keys say what it is: ``heading``, ``text``, ``outcome``, ``table`` (of
pandas), ``tiles``, ``picture``, ``plots``, ``image``, ``list``, ``facts``, ``code``, or ``summary``
with the collapsed ``blocks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from eval.report.outcomes import MARKS
from eval.report.words import figure

Block = dict[str, Any]


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
    environment.filters["cell"] = _cell
    environment.globals |= {"marks": MARKS, "tones": {mark: tone for tone, mark in MARKS.items()}}
    return environment.get_template("report.html.j2")


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float):
        return figure(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
