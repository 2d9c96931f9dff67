"""Plots as inline SVG that takes its colours from the page, so that one file suits light and dark screens.

Matplotlib draws with placeholder colours, which become ``currentColor`` and CSS variables afterwards. Text stays text.
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from eval.report.words import figure as number
from lab.types import CONTROL

INK, GRID = "#010203", "#040506"
SERIES = tuple(f"#0a0b{i:02x}" for i in range(8))  # 0 is the control
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
    ink: str
    grid: str
    series: tuple[str, ...]


PLACEHOLDERS = Palette(INK, GRID, SERIES)
# the light colours of style.css (Okabe and Ito's palette, darkened for contrast on white)
PAPER = Palette(
    "#1b1f24", "#e6e9ed", ("#5b626a", "#0072b2", "#d55e00", "#00805c", "#b04a86", "#9a6a00", "#6a4fb3", "#1b1f24")
)
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "immunization-bench",
    "font.size": 9.0,
    "axes.linewidth": 0.8,
}


@dataclass
class Line:
    """One series: ``index`` chooses colour, dash and marker (0 = control)."""

    label: str
    index: int
    x: Sequence[float]
    y: Sequence[float | None]


def _finite(line: Line, log: bool) -> tuple[list[float], list[float]]:
    pairs = [
        (x, y)
        for x, y in zip(line.x, line.y, strict=True)
        if x is not None and y is not None and math.isfinite(y) and (y > 0 or not log)
    ]
    return [p[0] for p in pairs], [p[1] for p in pairs]


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
) -> Markup:
    """Series over x; an empty string where nothing can be drawn.

    Args:
        reference: a thin horizontal line. mark: (x, text) of a thin vertical line. limits: of the y axis.
    """
    drawn = _drawable(lines, log)
    if not drawn:
        return Markup("")
    fig, axes = _axes(4.4, 2.75, PLACEHOLDERS)
    _draw(axes, drawn, x, y, log, limits, PLACEHOLDERS)
    if reference is not None:
        axes.axhline(reference, color=PLACEHOLDERS.ink, linewidth=0.7, alpha=0.6)
    if mark is not None:
        axes.axvline(mark[0], color=PLACEHOLDERS.ink, linewidth=0.7, alpha=0.5, linestyle=(0, (1, 2)))
        axes.annotate(mark[1], (mark[0], 0.98), xycoords=("data", "axes fraction"), xytext=(3, 0),
                      textcoords="offset points", va="top", color=PLACEHOLDERS.ink, fontsize=8)  # fmt: skip
    return _svg(fig, f"{title}: {y} against {x}")


def curve_png(name: str, curve: dict[str, Any], path: Path) -> Path:
    """One curve of a record as a picture with a legend, on white, for dashboards; returns ``path``."""
    arms = [k for k, v in curve.items() if isinstance(v, list) and k != "step"]
    numbers = {arm: 0 if arm == CONTROL else i for i, arm in enumerate((a for a in arms if a != CONTROL), start=1)}
    lines = [Line(arm, numbers.get(arm, 0), curve["step"], curve[arm]) for arm in arms]
    log = curve.get("log", "")
    fig, axes = _axes(6.4, 4.0, PAPER)
    fig.patch.set(facecolor="white", alpha=1)
    _draw(axes, _drawable(lines, log), curve.get("x", "step"), curve.get("y", name), log, None, PAPER)
    if axes.lines:
        axes.legend(frameon=False)
    axes.set_title(_plain(name))
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
    for line, xs, ys in drawn:
        i = line.index % len(palette.series)
        axes.plot(
            xs, ys, color=palette.series[i], linestyle=DASHES[i], marker=MARKERS[i], markersize=3.5, linewidth=1.7,
            markevery=max(len(xs) // 8, 1), zorder=2 + i, label=_plain(line.label),
        )  # fmt: skip
    if drawn:
        _scale(axes, log, limits, [v for _, _, ys in drawn for v in ys], max(x for _, xs, _ in drawn for x in xs))
    axes.set_xlabel(_plain(x))
    axes.set_ylabel(_plain(y))


def _plain(text: str) -> str:
    """A dollar sign would start a formula, and a broken one would stop the report."""
    return text.replace("$", r"\$")


def _scale(axes: Axes, log: str, limits: tuple[float, float] | None, values: list[float], last: float) -> None:
    if "y" in log:
        axes.set_yscale("log")
        low, high = min(values), max(values)
        if high / low < 1.05:  # a constant: no room for a decade
            axes.set_ylim(low / 2, high * 2)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        bottom, top = axes.get_ylim()
        decades = math.log10(top / bottom)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0), numticks=6))
        if decades <= 0.9:
            axes.yaxis.set_major_locator(MaxNLocator(5))
    if "x" in log:
        axes.set_xscale("symlog", linthresh=1.0)
    elif last >= 1000:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    if limits is not None:
        axes.set_ylim(*limits)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: dict[tuple[str, str], float], *, title: str, x: str, y: str
) -> Markup:
    """Values around 1 on a logarithmic scale, purple below and orange above (safe for colour-blind readers)."""
    spread = max((abs(math.log10(v)) for v in cells.values() if v > 0), default=0.0) or 1.0
    fig, axes = _axes(4.6, 4.1, PLACEHOLDERS)
    axes.grid(False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            value = cells.get((row, column))
            if value is None or value <= 0:
                continue
            colour = _diverging(math.log10(value) / spread)
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, edgecolor="none"))
            dark = sum(w * int(colour[k : k + 2], 16) for w, k in ((0.30, 1), (0.59, 3), (0.11, 5))) < 140
            size = 6.5 if len(columns) > 7 else 8
            axes.text(
                j, i, _short(value), ha="center", va="center", fontsize=size, color="#ffffff" if dark else "#111111"
            )
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [_plain(c) for c in columns])
    axes.set_yticks(range(len(rows)), [_plain(r) for r in rows])
    axes.tick_params(length=0)
    axes.set_xlabel(_plain(x))
    axes.set_ylabel(_plain(y))
    return _svg(fig, title)


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.0f}k" if value < 1e6 else number(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _diverging(position: float) -> str:
    """Purple (-1) over near white (0) to orange (1)."""
    ends = ((0x54, 0x27, 0x88), (0xF4, 0xF1, 0xF4), (0xB3, 0x58, 0x06))
    left, right = (ends[1], ends[0]) if position < 0 else (ends[1], ends[2])
    t = min(abs(position), 1.0)
    return "#" + "".join(f"{round(a + (b - a) * t):02x}" for a, b in zip(left, right, strict=True))


def swatch(index: int) -> Markup:
    """A piece of the line of series ``index``, for legends in the page."""
    i = index % len(SERIES)
    dash = DASHES[i]
    pattern = "" if not isinstance(dash, tuple) else ' stroke-dasharray="' + " ".join(str(2 * v) for v in dash[1]) + '"'
    if dash == "dashdot":
        pattern = ' stroke-dasharray="8 3 2 3"'
    return Markup(
        f'<svg class="swatch" viewBox="0 0 34 10" width="34" height="10" aria-hidden="true"><line x1="1" y1="5" x2="33"'
        f' y2="5" stroke="var(--s{i})" stroke-width="3"{pattern}/></svg>'
    )


def _axes(width: float, height: float, palette: Palette) -> tuple[Figure, Axes]:
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


def _svg(fig: Figure, title: str) -> Markup:
    out = io.StringIO()
    with rc_context(_SETTINGS):
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
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
    return Markup(_unique(text).replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))


def _unique(text: str) -> str:
    """Ids that no different plot of the page has; equal records give equal bytes."""
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    return re.sub(r'href="#', f'href="#{prefix}', text)
