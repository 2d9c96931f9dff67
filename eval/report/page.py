"""Templates: everything from a record is escaped; the style sheet is part of every page."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from eval.report.words import ARROWS, bound, figure, interval, measured, support

_FOLDER = Path(__file__).parent / "templates"


def _breakable(text: str) -> Markup:
    """Escaped, with places where a long name may break."""
    return Markup(str(escape(text)).replace("_", "_<wbr>"))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "interval": interval,
        "measured": measured,
        "support": support,
    }
    environment.filters |= {"breakable": _breakable, "bound": bound}
    environment.globals["arrows"] = ARROWS
    environment.globals["style"] = Markup((_FOLDER / "style.css").read_text(encoding="utf-8"))
    return environment


def page(template: str, **values: Any) -> str:
    """The template as text; every value but `Markup` is escaped."""
    return _environment().get_template(template).render(**values)
