"""Plots of records: inline SVG for pages, whose colours follow light and dark screens, or files.

Matplotlib draws in the colours of a light page; in SVG for pages they become CSS variables.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from eval.report.outcomes import Tone
from eval.report.words import (
    UNMEASURED,
    Metric,
    figure,
    measured,
    shortened,
)

# the light colours of report.html.j2, which has the dark ones by the same names; series 0 is the
# baseline, 1 is highlighted
COLORS = {
    "ink": "#1b1f24",
    "grid": "#e6e9ed",
    "faint": "#b4bac1",
    "good": "#0a7a4b",
    "bad": "#b3261e",
    "undecided": "#8a5a01",
    "neutral": "#57606a",
    "s0": "#5b626a",
    "s1": "#0072b2",
    "s2": "#d55e00",
    "s3": "#00805c",
    "s4": "#b04a86",
    "s5": "#9a6a00",
    "s6": "#6a4fb3",
}
SHAPES: dict[Tone, str] = {"good": "o", "bad": "X", "undecided": "D", "neutral": "s", "error": "X"}
DASHES: tuple[Any, ...] = ((0, (4, 2)), "solid", "solid", (0, (6, 1.5)), "solid", "dashdot", ":")
MARKERS = ("", "o", "s", "^", "D", "v", "P")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "immunization-bench",
    "font.size": 9.0,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.color": COLORS["ink"],
    "text.parse_math": False,
    "axes.edgecolor": COLORS["ink"],
    "axes.labelcolor": COLORS["ink"],
    "xtick.color": COLORS["ink"],
    "ytick.color": COLORS["ink"],
}


# ---- series over steps or options


@dataclass
class Line:
    """One series.

    Attributes:
        index: colour, dash and marker; 0 is the baseline, 1 is highlighted. None: grey.
        low, high: a band.
    """

    label: str
    index: int | None
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


def series_of(curve: dict[str, Any]) -> list[str]:
    """Return names of a curve's series; ``NAME:low`` and ``NAME:high`` are the band of NAME."""
    return [k for k, v in curve.items() if isinstance(v, list) and k != "step" and ":" not in k]


def line_of(curve: dict[str, Any], name: str, label: str, index: int | None) -> Line:
    """Return series ``name`` of a record's curve with its band."""
    band = (curve.get(f"{name}:{end}") or () for end in ("low", "high"))
    return Line(label, index, curve["step"], curve[name], *band)


@rc_context(STYLE)
def lines_plot(
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    log: str = "",
    reference: float | None = None,
    mark: tuple[float, str] | None = None,
    clip: tuple[float, float] = (-math.inf, math.inf),
    ticks: Sequence[str] = (),
    is_scatter: bool = False,
) -> Markup:
    """Return series over x with their bands, and a legend of several; an empty string where nothing
    can be drawn.

    Args:
        reference: height of a thin horizontal line. mark: (x, text) of a thin vertical line.
        clip: what of the y axis is shown. ticks: names of the positions 0, 1, … of x.
        is_scatter: points are not connected.
    """
    fig = Figure(figsize=(4.4, 2.75))
    axes = fig.add_axes((0.15, 0.18, 0.81, 0.74))
    axes.set(xlabel=x, ylabel=y)
    for line in lines:
        _draw_line(axes, line, log, is_scatter or bool(ticks))
    if not axes.lines:
        return Markup("")
    axes.xaxis.set_major_formatter(tick)
    axes.yaxis.set_major_formatter(tick)
    for side in log:
        set_log(axes, side)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend()
    if ticks:
        axes.set_xticks(range(len(ticks)), [shortened(tick, 14) for tick in ticks])
    if reference is not None:
        axes.axhline(reference, color=COLORS["ink"], linewidth=0.7, alpha=0.6)
    if mark is not None:
        axes.axvline(mark[0], color=COLORS["ink"], linewidth=0.7, alpha=0.5, linestyle=":")
        axes.text(mark[0], 0.02, f" {mark[1]}", transform=axes.get_xaxis_transform(), fontsize=8)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, clip[0]), min(high, clip[1]))
    return to_svg(fig, f"{title}: {y} against {x}")


def _draw_line(axes: Axes, line: Line, log: str, is_scatter: bool) -> None:
    parts = (line.x, line.y, line.low or line.y, line.high or line.y)
    x, y, low, high = (np.array(values, dtype=float) for values in parts)
    seen = np.isfinite(y) & np.isfinite(low) & np.isfinite(high)
    if "y" in log:
        seen &= low > 0 if (low[np.isfinite(low)] > 0).any() else y > 0
    if not seen.any():
        return
    x, y, low, high = x[seen], y[seen], low[seen], high[seen]
    style: dict[str, Any] = {"color": COLORS["faint"], "linewidth": 1.0, "zorder": 1.5}
    if line.index is not None:
        i = line.index % len(DASHES)
        style = {
            "color": COLORS[f"s{i}"],
            "linewidth": 1.8,
            "linestyle": DASHES[i],
            "zorder": 2 + i,
        }
        style |= {"marker": MARKERS[i], "markersize": 3.5, "markevery": max(len(x) // 8, 1)}
    if is_scatter:
        style |= {"linestyle": "none", "marker": style.get("marker") or "o", "markevery": 1}
        axes.vlines(x, low, high, color=style["color"], linewidth=1.2)
    elif line.index is not None:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.16, linewidth=0)
    axes.plot(x, y, label=line.label, **style)


def tick(value: float, _: float = 0) -> str:
    """Return the shortest text of an axis' tick."""
    text = f"{value:.4g}" if 1e-4 <= abs(value) < 1e5 or value == 0 else figure(value)
    return text.replace("-", "−")


def set_log(axes: Axes, side: str) -> None:
    """Make the axis ``x`` or ``y`` logarithmic; from 0 to the first step it is linear."""
    axis = axes.xaxis if side == "x" else axes.yaxis
    steps = np.unique(np.concatenate([line.get_xdata() for line in axes.lines]))
    if side == "x" and steps[0] <= 0:
        axes.set_xscale("symlog", linthresh=steps[steps > 0].min(initial=1e9), linscale=0.5)
        axes.set_xticks(steps[:: math.ceil(len(steps) / 8)])
    else:
        axes.set(**{f"{side}scale": "log"})
        low, high = sorted(axis.get_view_interval())
        subs = (1.0,) if high / low > 300 else (1.0, 3.0) if high / low > 60 else (1.0, 2.0, 5.0)
        is_narrow = high / low < 6
        axis.set_major_locator(MaxNLocator(5) if is_narrow else LogLocator(subs=subs, numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(tick)


# ---- one row or point per method

# label, tone of its verdict, and a metric per column
Method = tuple[str, Tone, dict[str, Metric | None]]


@rc_context(STYLE)
def forest(
    methods: Sequence[Method],
    limits: dict[str, tuple[str, float] | None],
    is_narrow: bool = False,
) -> Markup:
    """Return one row per method and one panel per column, beside or (narrow) below each other.

    Args:
        limits: column → what the verdict requires, see `eval.report.outcomes.limit_of`.
    """
    names = [shortened(label, 17 if is_narrow else 44) for label, _, _ in methods]
    rows, count = (len(limits), 1) if is_narrow else (1, len(limits))
    width, height = (4.1, 0.26 * len(names) + 0.85) if is_narrow else (10, 0.3 * len(names) + 0.8)
    fig = Figure(figsize=(width, height * rows), layout="constrained")
    panels = fig.subplots(rows, count, sharey=True, squeeze=False).ravel()
    for axes, (title, limit) in zip(panels, limits.items(), strict=True):
        _draw_methods(axes, [(tone, metrics[title]) for _, tone, metrics in methods], limit)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title)
    return to_svg(fig, " and ".join(limits))


def _draw_methods(
    axes: Axes, rows: Sequence[tuple[Tone, Metric | None]], limit: tuple[str, float] | None
) -> None:
    ends = [_ends(metric) for _, metric in rows if metric and metric["value"] is not None]
    positive = [v for v in [*chain(*ends), 1.0, *(limit or ())[1:]] if v > 0]
    room = max((max(positive) / min(positive)) ** 0.07, 1.1)
    left, right = min(positive) / room, max(positive) * room
    axes.set(xscale="log", xlim=(left, right), ylim=(len(rows) - 0.4, -1.0))
    if limit:
        rule, value = limit
        start, end, side = (value, right, "left") if rule == "≥" else (left, value, "right")
        color, text = COLORS["good"], f" passes {rule} {value:g} "
        axes.axvspan(start, end, color=color, alpha=0.13, linewidth=0)
        axes.text(value, -0.72, text, color=color, fontsize=8, ha=side, va="center")
    axes.axvline(1.0, color=COLORS["ink"], linewidth=0.8, alpha=0.6)
    for row, (tone, metric) in enumerate(rows):
        color, text = COLORS.get(tone, COLORS["bad"]), measured(metric)
        if metric is not None and metric["value"] is not None:
            low, value, high = _ends(metric)
            error = [[value - low], [high - value]]
            axes.errorbar(
                value,
                row,
                xerr=error,
                color=color,
                fmt=SHAPES[tone],
                ms=8,
                elinewidth=2.2,
                zorder=4,
            )
            if metric.get("bound"):  # the true figure may lie anywhere beyond
                far = right if metric["bound"] == "lower" else left
                arrow = {"arrowstyle": "->", "color": color, "linestyle": ":"}
                axes.annotate("", (far, row), (value, row), arrowprops=arrow)
        text = text.replace(UNMEASURED, "not measured")
        axes.text(1.03, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    set_log(axes, "x")


def _ends(metric: Metric) -> tuple[float, float, float]:
    """Return low, value and high; the value where there is no interval."""
    value = metric["value"]
    low, high = (value if metric[k] is None else metric[k] for k in ("low", "high"))
    return low, value, high


# ---- SVG


def to_svg(fig: Figure, title: str) -> Markup:
    """Return inline SVG whose colours are CSS variables and whose ids no other plot has."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    fig.savefig(out, format="svg", transparent=True, metadata=metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    # what has no use in a page: metadata, comments and namespaces
    waste = r'<metadata>.*?</metadata>\s*|<!--.*?-->\s*|\s(xmlns(:xlink)?|version)="[^"]*"'
    text = re.sub(waste, "", text, flags=re.S)
    text = re.sub(r"(font: [^\"';]*?[\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}", text)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))
