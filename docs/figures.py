"""Write the figures of README.md and docs/ from the committed records.

A page marks a figure by two comments, inside a sentence or around a table or plot::

    <!-- record: EXPRESSION -->TEXT<!-- end -->

``EXPRESSION`` is a Jinja expression that calls `score`, `table`, `grid`, `by_attack`,
`target_share`, `median`, `correlation` or `plot`.
``python docs/figures.py`` replaces every ``TEXT``. ``--check`` changes nothing and fails where a
page and its records differ. An image is drawn again where it shows other values, or where its file
was deleted. Fenced blocks are left alone.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import spearmanr

from eval.report.outcomes import count_checks
from eval.report.plots import COLORS, STYLE, set_log
from eval.report.words import UNMEASURED, bound
from lab.core import record
from lab.core.types import BASELINE, IMMUNIZED

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "outputs/records"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKER = re.compile(
    r"^(`{3,}).*?^\1$|<!-- record: (?P<expression>.*?) -->(?P<text>.*?)<!-- end -->",
    re.DOTALL | re.MULTILINE,
)
TEXT_TO_IMAGE = {
    "Verdict": "verdict",
    "Checks passed": "checks",
    "Attack success": "asr percent interval",
    "Relearning slowdown": "steps_to_relearn_ratio_worst ratio interval",
    "Benign cost": "benign_steps_ratio_worst ratio interval",
}


@functools.cache
def read(records: str, method: str) -> record.Stored:
    """Read ``outputs/records/RECORDS/METHOD.json``."""
    return record.read(RECORDS / records / f"{method}.json")


def round_number(value: float, show: str) -> str:
    """Return whole percent or two digits."""
    if "percent" in show or "points" in show:
        return f"{100 * value:.0f}"
    value = float(f"{value:.2g}")
    return f"{value:,.0f}" if 10 <= abs(value) < 1e6 else f"{value:#.2g}"


def score(records: str, method: str, metric: str, show: str = "value") -> str:
    """Return a metric as text: ``score("relearn_table", "joint", "asr", "percent interval")``.

    Args:
        records: Folder below ``outputs/records``.
        method: Name of the record there.
        metric: Its name in the record, or ``checks``: how many checks of the verdict pass.
        show: Words out of ``value``, ``percent``, ``points``, ``ratio`` and ``interval``.
    """
    stored = read(records, method)
    if metric == "checks":
        passed, total = count_checks(stored)
        return f"{passed} of {total}" if total else UNMEASURED
    item = stored["metrics"].get(metric, {"value": None})
    if metric == "verdict":
        words = {1: "passes", 0: "fails", None: "inconclusive"}
        return words[item["value"]] if metric in stored["metrics"] else stored["status"]
    if item["value"] is None:
        return UNMEASURED
    unit = " %" if "percent" in show else "×" if "ratio" in show else ""
    text = f"{bound(item)} {round_number(item['value'], show)}{unit}".strip()
    if "interval" in show and item["low"] not in (None, item["high"]):
        text += f" [{round_number(item['low'], show)}, {round_number(item['high'], show)}]"
    return text.replace("-", "−")


def table(records: str, rows: dict[str, str], columns: dict[str, str] = TEXT_TO_IMAGE) -> str:
    """Return a Markdown table.

    Args:
        records: Folder below ``outputs/records``.
        rows: Text of the first column → name of the record.
        columns: Heading → metric and how to show it, ``"asr percent interval"``.
    """
    body = [
        [label, *(score(records, method, *shown.split(" ", 1)) for shown in columns.values())]
        for label, method in rows.items()
    ]
    return markdown([["Method", *columns], *body])


def grid(records: str, shown: str, rows: dict[str, str], columns: dict[str, str]) -> str:
    """Return a Markdown table of one metric over two options.

    Args:
        records: Folder below ``outputs/records``.
        shown: Metric and how to show it. A run that diverged shows the step instead.
        rows, columns: Text → part of a record's name, ``COLUMN_ROW``.
    """

    def cell(name: str) -> str:
        stored = read(records, name)
        if stored["status"] != "diverged":
            return score(records, name, *shown.split(" ", 1))
        return f"step {stored['error']['last_good_step'] + 1}"

    body = [
        [label, *(cell(f"{column}_{row}") for column in columns.values())]
        for label, row in rows.items()
    ]
    return markdown([["", *columns], *body])


def by_attack(records: str, method: str, rows: dict[str, str], columns: dict[str, str]) -> str:
    """Return a Markdown table of one record, a row per attack.

    Args:
        records, method: The record.
        rows: Text → attack.
        columns: Heading → metric, which ``_ATTACK`` follows, and how to show it.
    """
    shown = [column.split(" ", 1) for column in columns.values()]
    body = [
        [label, *(score(records, method, f"{metric}_{attack}", show) for metric, show in shown)]
        for label, attack in rows.items()
    ]
    return markdown([["Attack", *columns], *body])


def target_share(records: str, images: int, rows: dict[str, str], columns: dict[str, str]) -> str:
    """Return a Markdown table of the share of images that show the targets after ``images`` images
    of every attack by itself, in percent: the mean over seeds and targets. A model that is not
    usable then shows none.

    Args:
        records: Folder below ``outputs/records``.
        images: A point of the budget, as the column ``at_`` of the records' table ``attacks``.
        rows: Text → attack, with its options as the records name them.
        columns: Heading → name of the record; the baseline's column precedes them.
    """

    def cell(method: str, model: str, attack: str) -> str:
        shares = [
            0 if str(images) in row["unusable_at"].split(", ") else row[f"at_{images:03d}"] or 0
            for row in read(records, method)["tables"]["attacks"]
            if (row["model"], row["attack"], row["role"]) == (model, attack, "harmful")
        ]
        return f"{100 * np.mean(shares):.0f} %" if shares else UNMEASURED

    first, *_ = columns.values()
    body = [
        [
            label,
            cell(first, BASELINE, attack),
            *(cell(method, IMMUNIZED, attack) for method in columns.values()),
        ]
        for label, attack in rows.items()
    ]
    return markdown([["Attack", "Baseline", *columns], *body])


def median(records: str, method: str, curve: str) -> str:
    """Return the median of a curve of the immunized model, and its range."""
    values = [v for v in read(records, method)["curves"][curve]["immunized"] if v is not None]
    middle, low, high = np.median(values), min(values), max(values)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})".replace("-", "−")


def correlation(records: str, x: str, y: str) -> str:
    """Return Spearman's ρ between two metrics of concepts, ``sgr_clip`` and ``asr``, over all
    records of a folder, seeds and concepts that have both, with a 95 % interval (bootstrap over
    records).
    """
    pairs = []
    for path in sorted((RECORDS / records).glob("*.json")):
        stored = read(records, path.stem)["tables"]["seed_values"]
        rows = {row["metric"]: row for row in stored}
        both = [
            (rows[x + k.removeprefix(y)], row)
            for k, row in rows.items()
            if k.startswith(y) and x + k.removeprefix(y) in rows
        ]
        values = [(a[seed], b[seed]) for a, b in both for seed in a if seed != "metric"]
        pairs.append([pair for pair in values if None not in pair])
    draws = np.random.default_rng(0).integers(len(pairs), size=(1000, len(pairs)))
    each = [spearmanr(np.concatenate([pairs[i] for i in rows])).statistic for rows in draws]
    low, high = np.nanquantile(each, [0.025, 0.975])
    value = spearmanr(np.concatenate(pairs)).statistic
    return f"{value:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")


def markdown(lines: list[list[str]]) -> str:
    """Return a Markdown table; the first line is its head."""
    head, *body = (f"|{'|'.join(line)}|" for line in lines)
    return "\n".join(["\n", head, "|---" * len(lines[0]) + "|", *body, "\n"])


def plot(page: Path, records: str, alt: str, rows: dict[str, str]) -> str:
    """Draw `slowdowns` to ``docs/figures/RECORDS.png`` and return a link to it.

    Args:
        page: Page with the link; an expression leaves it out.
        alt: What the plot shows, for readers who do not see it.
    """
    path = ROOT / f"docs/figures/{records}.png"
    if not is_current(path, slowdowns(records, rows), draw_slowdowns):
        return f"a new plot {path.name}"
    return f"\n\n![{alt}]({os.path.relpath(path, page.parent)})\n\n"


def slowdowns(records: str, rows: dict[str, str]) -> dict[str, Any]:
    """Return the slowdown of the slowest other concept, the relearning slowdown of the
    least-protected target, and the share of unrelated detections that is lost, per label of
    ``rows``, and what the verdict of the last record requires of them.
    """
    points: dict[str, Any] = {}
    limits: dict[str, float] = {}
    for label, method in rows.items():
        stored = read(records, method)
        metrics = stored["metrics"]
        counted = "usable_" if "asr_usable" in metrics else ""
        names = [f"benign_steps_{counted}ratio_worst", f"steps_to_relearn_{counted}ratio_worst"]
        names += ["utility_detection_drop"] if "utility_detection_drop" in metrics else []
        sides = [metrics[name] for name in names]
        points[label] = [{part: side[part] for part in ("value", "low", "high")} for side in sides]
        limits = stored["config"]["eval"]["concept_verdict"]
    required = [limits["max_benign_steps_ratio"], limits["min_worst_steps_ratio"]]
    required.append(limits["max_detection_drop"])
    return {"limits": required, "points": points}


@rc_context(STYLE)
def draw_slowdowns(values: dict[str, Any]) -> Figure:
    """Draw a point with its 95 % intervals per method, from what `slowdowns` returned; its colour
    is the share of unrelated detections that is lost. The first one is highlighted, and the region
    that passes is shaded.
    """
    limits = values["limits"]
    fig = Figure(figsize=(8.5, 4.4), layout="constrained")
    axes = fig.add_subplot()
    colors = ScalarMappable(Normalize(0, 100 * limits[2]), "YlOrRd")
    for i, (label, (x, y, *drop)) in enumerate(values["points"].items()):
        errors = [[[m["value"] - m["low"]], [m["high"] - m["value"]]] for m in (y, x)]
        color = colors.to_rgba(100 * drop[0]["value"]) if drop else "lightgray"
        style: Any = {"fmt": "os^DvPX*hp<>"[i % 12], "label": label, "zorder": 3 + i}
        style |= {"color": color, "markeredgecolor": "black", "ecolor": "gray"}
        style |= (
            {"markersize": 8, "elinewidth": 0.5} if i else {"markersize": 12, "elinewidth": 1.5}
        )
        axes.errorbar(x["value"], y["value"], *errors, **style)
    for side in "xy":
        set_log(axes, side)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.fill_between([left, limits[0]], limits[1], top, color=COLORS["good"], alpha=0.13, lw=0)
    axes.text(left, top, "\n  passes", color=COLORS["good"], va="top")
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_xlabel("slowdown of the slowest benign concept, × (lower is better)")
    axes.set_ylabel("slowdown of the least-protected target, × (higher is better)")
    bar = fig.colorbar(colors, ax=axes, extend="max", pad=0.01)
    bar.set_label("unrelated detections lost, % (limit at the top)")
    fig.legend(loc="outside right upper")
    return fig


def is_current(path: Path, values: Any, draw: Callable[[Any], Figure]) -> bool:
    """Return whether an image shows ``values``. If not, draw it, except with ``--check``."""
    description = json.dumps(values)
    if path.is_file() and Image.open(path).info.get("Description") == description:
        return True
    if "--check" not in sys.argv:
        metadata = {"Description": description, "Software": None}
        draw(values).savefig(path, dpi=110, metadata=metadata)
    return "--check" not in sys.argv


def render(page: Path, text: str) -> str:
    """Return the text of ``page`` with current figures."""
    environment = SandboxedEnvironment(undefined=StrictUndefined)
    names = {
        f.__name__: f for f in (score, table, grid, by_attack, target_share, median, correlation)
    }
    names["plot"] = functools.partial(plot, page)

    def replace(match: re.Match[str]) -> str:
        if match["expression"] is None:
            return match[0]
        figure = environment.compile_expression(match["expression"], False)(**names)
        return f"<!-- record: {match['expression']} -->{figure}<!-- end -->"

    return MARKER.sub(replace, text)


def main() -> int:
    """Rewrite every page, or check it with ``--check``; print what changes as a diff."""
    check = "--check" in sys.argv
    code = 0
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = render(page, old)
        if new != old:
            code = int(check)
            lines = old.splitlines(keepends=True), new.splitlines(keepends=True)
            sys.stdout.writelines(difflib.unified_diff(*lines, str(page), str(page), n=0))
            if not check:
                page.write_text(new, encoding="utf-8")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
