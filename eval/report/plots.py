"""Plots as inline SVG that takes its colours from the page, so that one file suits light and dark
screens.

Matplotlib draws with placeholder colours, which become ``currentColor`` and CSS variables
afterwards. Text stays text.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from eval.report.scales import scale
from eval.report.words import figure as number
from lab.core.types import BASELINE

INK, GRID = "#010203", "#040506"
SERIES = tuple(f"#0a0b{i:02x}" for i in range(8))  # 0 is the baseline
DASHES: tuple[object, ...] = (
    (0, (4, 2)),
    "solid",
    "solid",
    (0, (6, 1.5)),
    "solid",
    (0, (1.5, 1.5)),
    "solid",
    "dashdot",
)
MARKERS = ("", "o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Palette:
    """Colours of one figure: text and axes, grid lines, the baseline model and then the
    immunizers.
    """

    ink: str
    grid: str
    series: tuple[str, ...]


PLACEHOLDERS = Palette(INK, GRID, SERIES)
# the light colours of style.css (Okabe and Ito's palette, darkened for contrast on white)
PAPER = Palette(
    "#1b1f24",
    "#e6e9ed",
    ("#5b626a", "#0072b2", "#d55e00", "#00805c", "#b04a86", "#9a6a00", "#6a4fb3", "#1b1f24"),
)
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "immunization-bench",
    "font.size": 9.0,
    "axes.linewidth": 0.8,
}


@dataclass
class Line:
    """One series: ``index`` chooses colour, dash and marker (0 = baseline); ``low`` and ``high``
    bound a band.
    """

    label: str
    index: int
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


def is_drawable(value: float | None, log: bool) -> bool:
    """Whether a value can be drawn, on a logarithmic axis if ``log``."""
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _finite(line: Line, log: bool) -> tuple[list[float], list[float]]:
    pairs = [
        (x, y) for x, y in zip(line.x, line.y, strict=True) if x is not None and is_drawable(y, log)
    ]
    return [p[0] for p in pairs], [p[1] for p in pairs if p[1] is not None]


def band(line: Line, log: bool) -> tuple[list[float], list[float], list[float]]:
    """x, low and high where both ends can be drawn; empty without a band."""
    if line.low is None or line.high is None:
        return [], [], []
    rows = [
        (x, low, high)
        for x, low, high in zip(line.x, line.low, line.high, strict=True)
        if x is not None and is_drawable(low, log) and is_drawable(high, log)
    ]
    return (
        [r[0] for r in rows],
        [r[1] for r in rows if r[1] is not None],
        [r[2] for r in rows if r[2] is not None],
    )


def series_of(curve: dict[str, Any]) -> list[str]:
    """Names of a curve's series; ``NAME:low`` and ``NAME:high`` are the band of NAME, no series of
    their own.
    """
    names = [k for k, v in curve.items() if isinstance(v, list) and k != "step"]
    return [
        n for n in names if not (n.endswith((":low", ":high")) and n.rpartition(":")[0] in names)
    ]


def line_of(curve: dict[str, Any], name: str, label: str, index: int) -> Line:
    """Series ``name`` of a record's curve with its band, where it has one of the same length."""
    low, high = (curve.get(f"{name}:{end}") for end in ("low", "high"))
    whole = all(isinstance(v, list) and len(v) == len(curve["step"]) for v in (low, high))
    return Line(label, index, curve["step"], curve[name], *((low, high) if whole else (None, None)))


def lines_plot(
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    log: str = "",
    reference: float | None = None,
    mark: tuple[float, str] | None = None,
    limits: tuple[float, float] | None = None,
    legend: bool = False,
) -> Markup:
    """Series over x with their bands; an empty string where nothing can be drawn.

    Args:
        reference: a thin horizontal line. mark: (x, text) of a thin vertical line. limits: of the y
            axis.
        legend: inside the plot, for series that the page's legend does not have.
    """
    drawn = _drawable(lines, log)
    if not drawn:
        return Markup("")
    fig, axes = new_axes(4.4, 2.75, PLACEHOLDERS)
    if reference is not None:  # first, so that ticks are chosen for it too
        axes.axhline(reference, color=PLACEHOLDERS.ink, linewidth=0.7, alpha=0.6)
    _draw(axes, drawn, x, y, log, limits, PLACEHOLDERS)
    if mark is not None:
        axes.axvline(
            mark[0], color=PLACEHOLDERS.ink, linewidth=0.7, alpha=0.5, linestyle=(0, (1, 2))
        )
        axes.annotate(
            mark[1],
            (mark[0], 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            va="top",
            color=PLACEHOLDERS.ink,
            fontsize=8,
        )
    if legend:
        axes.legend(frameon=False, labelcolor=PLACEHOLDERS.ink, fontsize=8)
    _place(fig, axes)
    return to_svg(fig, f"{title}: {y} against {x}")


def _place(fig: Figure, axes: Axes) -> None:
    """Room for labels by their number of characters: the page's font decides their width, and to
    measure them in another one takes as long as all the rest of the drawing.
    """
    size = _SETTINGS["font.size"]

    def longest(axis: Axis) -> int:
        low, high = sorted(axis.get_view_interval())
        return max(
            (len(number(v)) for v in axis.get_majorticklocs() if low <= v <= high), default=1
        )

    line, character = 1.25 * size, 0.58 * size
    left, bottom = 1.6 * line + longest(axes.yaxis) * character + 7, 2.6 * line + 7
    right, top = max(0.5 * longest(axes.xaxis) * character, 6), 0.7 * line
    width, height = (72 * inches for inches in fig.get_size_inches())
    fig.set_layout_engine("none")
    axes.set_position(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )


def curve_png(name: str, curve: dict[str, Any], path: Path) -> Path:
    """One curve of a record as a picture with a legend, on white, for dashboards; returns
    ``path``.
    """
    model_names = series_of(curve)
    numbers = {
        model_name: 0 if model_name == BASELINE else i
        for i, model_name in enumerate((a for a in model_names if a != BASELINE), start=1)
    }
    lines = [
        line_of(curve, model_name, model_name, numbers.get(model_name, 0))
        for model_name in model_names
    ]
    log = curve.get("log", "")
    fig, axes = new_axes(6.4, 4.0, PAPER)
    fig.patch.set(facecolor="white", alpha=1)
    _draw(
        axes, _drawable(lines, log), curve.get("x", "step"), curve.get("y", name), log, None, PAPER
    )
    if axes.lines:
        axes.legend(frameon=False)
    axes.set_title(plain(name))
    FigureCanvasAgg(fig)
    fig.savefig(path, format="png", dpi=110)
    return path


def _drawable(lines: Sequence[Line], log: str) -> list[tuple[Line, list[float], list[float]]]:
    found = [(line, *_finite(line, "y" in log)) for line in lines]
    return [d for d in found if d[1]]


def _draw(
    axes: Axes,
    drawn: Sequence[tuple[Line, list[float], list[float]]],
    x: str,
    y: str,
    log: str,
    limits: tuple[float, float] | None,
    palette: Palette,
) -> None:
    values: list[float] = []
    for line, xs, ys in drawn:
        i = line.index % len(palette.series)
        where, low, high = band(line, "y" in log)
        if where:
            axes.fill_between(
                where, low, high, color=palette.series[i], alpha=0.16, linewidth=0, zorder=1
            )
        values += [*ys, *low, *high]
        axes.plot(
            xs,
            ys,
            color=palette.series[i],
            linestyle=DASHES[i],
            marker=MARKERS[i],
            markersize=3.5,
            linewidth=1.7,
            markevery=max(len(xs) // 8, 1),
            zorder=2 + i,
            label=plain(line.label),
        )
    if drawn:
        scale(axes, log, limits, values, [x for _, xs, _ in drawn for x in xs])
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))


def plain(text: str) -> str:
    """A dollar sign would start a formula, and a broken one would stop the report."""
    return text.replace("$", r"\$")


def new_axes(width: float, height: float, palette: Palette) -> tuple[Figure, Axes]:
    with rc_context(_SETTINGS):
        fig = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(fig)
        axes = fig.add_subplot()
    fig.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(True, color=palette.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(palette.ink)
    axes.tick_params(colors=palette.ink, labelcolor=palette.ink, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(palette.ink)
    return fig, axes


def to_svg(fig: Figure, title: str) -> Markup:
    out = io.StringIO()
    with rc_context(_SETTINGS):
        # not by savefig, which draws all twice: the first time for layouts that are not used here
        FigureCanvasSVG(fig).print_svg(
            out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for i, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--s{i})")
    return Markup(
        _unique(text).replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    )


def _unique(text: str) -> str:
    """Ids that no different plot of the page has; equal records give equal bytes."""
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    return re.sub(r'href="#', f'href="#{prefix}', text)
