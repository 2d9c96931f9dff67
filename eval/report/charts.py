"""Plots other than curves: heat map, dots with intervals, scatter. SVG as in
`eval.report.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from eval.report.plots import (
    DASHES,
    MARKERS,
    PLACEHOLDERS,
    SERIES,
    is_drawable,
    new_axes,
    plain,
    to_svg,
)
from eval.report.scales import scale
from eval.report.words import figure as number

WIDE = 8.0  # positive values that span more than this factor get a logarithmic axis


@dataclass
class Dots:
    """One series of figures with intervals: ``index`` chooses colour, dash and marker."""

    label: str
    index: int
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]


def spread(values: Sequence[float]) -> bool:
    """Whether numbers want a logarithmic axis."""
    return len(values) > 1 and min(values) > 0 and max(values) / min(values) >= WIDE


def against_option(
    series: Sequence[Dots],
    ticks: Sequence[str],
    *,
    title: str,
    x: str,
    y: str,
    reference: float | None = None,
) -> Markup:
    """A metric against one option, with intervals; an empty string where nothing can be drawn.

    Args:
        ticks: names of the positions 0, 1, … of x; empty for a numeric option, whose axis is
            logarithmic if it spreads.
        reference: a thin horizontal line.
    """
    values = [v for s in series for v in s.y if is_drawable(v, False) and v is not None]
    if not values:
        return Markup("")
    places = sorted({x for s in series for x in s.x})
    log = ("x" if not ticks and spread(places) else "") + ("y" if spread(values) else "")
    fig, axes = new_axes(4.4, 2.75, PLACEHOLDERS)
    ends: list[float] = list(values)
    for k, one in enumerate(series):
        points = [
            p for p in zip(one.x, one.y, one.low, one.high, strict=True) if is_drawable(p[1], False)
        ]
        if not points:
            continue
        xs = [_apart(p[0], k, len(series), places, bool(ticks), "x" in log) for p in points]
        colour, i = PLACEHOLDERS.series[one.index % len(SERIES)], one.index % len(SERIES)
        for place, (_, _, low, high) in zip(xs, points, strict=True):
            if (
                is_drawable(low, "y" in log)
                and is_drawable(high, "y" in log)
                and low is not None
                and high is not None
            ):
                axes.plot([place, place], [low, high], color=colour, linewidth=1.2, alpha=0.75)
                ends += [low, high]
        axes.plot(
            xs,
            [p[1] for p in points if p[1] is not None],
            color=colour,
            marker=MARKERS[i] or "o",
            markersize=5,
            linewidth=0 if ticks else 1.4,
            linestyle="none" if ticks else DASHES[i],
            zorder=3,
        )
    scale(axes, log, None, ends, places)
    if ticks:
        axes.set_xticks(
            range(len(ticks)),
            [plain(t) for t in ticks],
            rotation=20 if max(map(len, ticks)) > 9 else 0,
        )
        axes.set_xlim(-0.5, len(ticks) - 0.5)
    elif "x" not in log and len(places) <= 7:
        axes.set_xticks(places)
    if reference is not None and _near(reference, ends):
        axes.axhline(reference, color=PLACEHOLDERS.ink, linewidth=0.7, alpha=0.6)
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))
    return to_svg(fig, f"{title}: {y} against {x}")


def _near(reference: float, values: Sequence[float]) -> bool:
    """Whether a line at ``reference`` leaves most of the height to the values."""
    room = 0.6 * (max(values) - min(values))
    return min(values) - room <= reference <= max(values) + room


def _apart(
    place: float, k: int, count: int, places: Sequence[float], named: bool, log: bool
) -> float:
    """Series side by side, so that their intervals do not hide each other."""
    offset = k - (count - 1) / 2
    if log:
        return float(place * 1.03**offset)
    if named or len(places) < 2:
        return place + 0.5 * offset / max(count, 2)
    return float(place + 0.012 * offset * (places[-1] - places[0]))


def forest(
    names: Sequence[str], series: Sequence[Dots], *, title: str, x: str, reference: float = 0.0
) -> Markup:
    """Figures with intervals, one row per name (``Dots.x`` is the row), around a vertical line at
    ``reference``.
    """
    fig, axes = new_axes(4.4, 0.9 + 0.29 * len(names), PLACEHOLDERS)
    values = [v for one in series for v in one.y if v is not None]
    if reference == 1.0 and spread(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    for k, one in enumerate(series):
        colour, i = PLACEHOLDERS.series[one.index % len(SERIES)], one.index % len(SERIES)
        for row, value, low, high in zip(one.x, one.y, one.low, one.high, strict=True):
            at = row + 0.24 * (k - (len(series) - 1) / 2)
            if low is not None and high is not None:
                axes.plot([low, high], [at, at], color=colour, linewidth=1.4, alpha=0.75)
            if value is not None:
                axes.plot(
                    [value],
                    [at],
                    color=colour,
                    marker=MARKERS[i] or "o",
                    markersize=5,
                    linestyle="none",
                )
    axes.axvline(reference, color=PLACEHOLDERS.ink, linewidth=0.7, alpha=0.6)
    axes.set_yticks(range(len(names)), [plain(n) for n in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
    axes.set_xlabel(plain(x))
    return to_svg(fig, title)


def scatter(
    x: Sequence[float],
    y: Sequence[float],
    hollow: Sequence[bool],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Markup:
    """Points, logarithmic where they spread; ``hollow`` ones are lower limits."""
    fig, axes = new_axes(4.4, 2.75, PLACEHOLDERS)
    colour = PLACEHOLDERS.series[1]
    for open_, face in ((False, colour), (True, "none")):
        chosen = [(a, b) for a, b, h in zip(x, y, hollow, strict=True) if h == open_]
        if chosen:
            axes.plot(
                [a for a, _ in chosen],
                [b for _, b in chosen],
                linestyle="none",
                marker="o",
                markersize=4.5,
                markerfacecolor=face,
                markeredgecolor=colour,
                alpha=0.85,
            )
    for axis, values, name in ((axes.xaxis, x, "x"), (axes.yaxis, y, "y")):
        if spread(values):
            (axes.set_xscale if name == "x" else axes.set_yscale)("log")
            axis.set_minor_locator(NullLocator())
            short = max(values) / min(values) < 100
            axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if short else (1.0,), numticks=6))
        else:
            axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
    for line in (axes.axhline, axes.axvline):
        line(1.0, color=PLACEHOLDERS.ink, linewidth=0.7, alpha=0.5)
    axes.set_xlabel(plain(xlabel))
    axes.set_ylabel(plain(ylabel))
    return to_svg(fig, title)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: dict[tuple[str, str], float],
    *,
    title: str,
    x: str,
    y: str,
) -> Markup:
    """Values around 1 on a logarithmic scale, purple below and orange above (safe for colour-blind
    readers).
    """
    spread = max((abs(math.log10(v)) for v in cells.values() if v > 0), default=0.0) or 1.0
    fig, axes = new_axes(4.6, 4.1, PLACEHOLDERS)
    axes.grid(False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            value = cells.get((row, column))
            if value is None or value <= 0:
                continue
            colour = _diverging(math.log10(value) / spread)
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, edgecolor="none"))
            dark = (
                sum(w * int(colour[k : k + 2], 16) for w, k in ((0.30, 1), (0.59, 3), (0.11, 5)))
                < 140
            )
            size = 6.5 if len(columns) > 7 else 8
            axes.text(
                j,
                i,
                _short(value),
                ha="center",
                va="center",
                fontsize=size,
                color="#ffffff" if dark else "#111111",
            )
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [plain(c) for c in columns])
    axes.set_yticks(range(len(rows)), [plain(r) for r in rows])
    axes.tick_params(length=0)
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))
    return to_svg(fig, title)


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
    pattern = (
        ""
        if not isinstance(dash, tuple)
        else ' stroke-dasharray="' + " ".join(str(2 * v) for v in dash[1]) + '"'
    )
    if dash == "dashdot":
        pattern = ' stroke-dasharray="8 3 2 3"'
    return Markup(
        '<svg class="swatch" viewBox="0 0 34 10" width="34" height="10" '
        'aria-hidden="true"><line x1="1" y1="5" x2="33"'
        f' y2="5" stroke="var(--s{i})" stroke-width="3"{pattern}/></svg>'
    )
