"""Axes that suit their values, with readable numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from eval.report.words import figure as number


def scale(
    axes: Axes,
    log: str,
    limits: tuple[float, float] | None,
    values: Sequence[float],
    steps: Sequence[float],
) -> None:
    """Axes that suit ``values`` (y) and ``steps`` (x), with readable numbers."""
    if "y" in log:
        axes.set_yscale("log")
        low, high = min(values), max(values)
        if high / low < 1.05:  # a constant: no room for a decade
            axes.set_ylim(low / 2, high * 2)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        bottom, top = axes.get_ylim()
        decades = math.log10(top / bottom)
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0), numticks=6)
        )
        if decades <= 0.9:
            axes.yaxis.set_major_locator(MaxNLocator(5))
    if "x" in log:
        _log_steps(axes, sorted(set(steps)))
    elif max(steps) >= 1000:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    if limits is not None:
        axes.set_ylim(*limits)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))


def _log_steps(axes: Axes, steps: Sequence[float]) -> None:
    """Logarithmic from the first positive step on, linear between 0 and it; few steps are the ticks
    themselves.
    """
    positive = [x for x in steps if x > 0]
    if not positive:
        return
    zero = min(steps) <= 0
    first, last = min(positive), max(positive)
    if zero:
        # half a decade for the way from 0 to the first step: it holds one point
        axes.set_xscale("symlog", linthresh=first, linscale=0.5)
    else:
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    if len(steps) <= 7:
        axes.set_xticks(list(steps))
    else:
        decades = range(math.ceil(math.log10(first)), math.floor(math.log10(last)) + 1)
        ticks = [10.0**d for d in decades]
        axes.set_xticks([0.0, *ticks] if zero else ticks or [first, last])
