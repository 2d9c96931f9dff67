"""Write the figures of README.md and docs/ from the committed records.

A page marks a figure by two comments, inside a sentence or around a table or plot::

    <!-- record: EXPRESSION -->TEXT<!-- end -->

``EXPRESSION`` is a Jinja expression that calls `score`, `setting`, `count`, `table` or `plot`.
``python docs/figures.py`` replaces every ``TEXT``. ``--check`` changes nothing and fails where a
page and its records differ. Fenced blocks are left alone.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from omegaconf import OmegaConf
from PIL import Image

from lab.core import record

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "outputs/records"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKER = re.compile(
    r"^(`{3,}).*?^\1$|<!-- record: (?P<expression>.*?) -->(?P<text>.*?)<!-- end -->",
    re.DOTALL | re.MULTILINE,
)
TEXT_TO_IMAGE = {
    "Verdict": "verdict",
    "Attack success": "asr percent interval",
    "Relearning slowdown": "steps_to_relearn_ratio_worst ratio interval",
    "Benign cost": "benign_steps_ratio ratio interval",
}


@functools.cache
def read(records: str, method: str) -> record.Stored:
    """Read ``outputs/records/RECORDS/METHOD.json`` (or ``METHOD/record.json``)."""
    path = RECORDS / records / f"{method}.json"
    return record.read(path if path.is_file() else RECORDS / records / method / "record.json")


def named(records: str, rows: dict[str, str] | Iterable[str]) -> dict[str, str]:
    """Return label → method for ``rows``, or for all records of a set without any."""
    rows = rows or [path.stem for path in sorted((RECORDS / records).glob("*.json"))]
    return rows if isinstance(rows, dict) else {name: name for name in rows}


def rounded(value: float, show: str) -> str:
    """Return whole percent or two digits."""
    if "percent" in show:
        return f"{100 * value:.0f}"
    large = 10 <= abs(float(f"{value:.2g}")) < 1e6
    return f"{float(f'{value:.2g}'):,.0f}" if large else f"{value:#.2g}"


def score(records: str, method: str, metric: str, show: str = "value") -> str:
    """Return a metric as text: ``score("relearn_table", "joint", "asr", "percent interval")``.

    Args:
        records: Folder below ``outputs/records``.
        method: Name of the record there.
        metric: Its name in the record.
        show: Words out of ``value``, ``percent``, ``ratio`` and ``interval``.
    """
    stored = read(records, method)
    found = stored["metrics"].get(metric, {"value": None})
    if metric == "verdict":
        ended = stored["status"] if stored["status"] != "ok" else "inconclusive"
        return {1: "passes", 0: "fails"}.get(found["value"], ended)
    if found["value"] is None:
        return "–"
    unit = " %" if "percent" in show else "×" if "ratio" in show else ""
    bound = {"lower": "≥ ", "upper": "≤ ", None: ""}[found["bound"]]
    text = f"{bound}{rounded(found['value'], show)}{unit}"
    if "interval" in show and found["low"] not in (None, found["high"]):
        text += f" [{rounded(found['low'], show)}, {rounded(found['high'], show)}]"
    return text.replace("-", "−")


def setting(records: str, method: str, key: str) -> str:
    """Return a value of a record's configuration by its dotted key."""
    return str(OmegaConf.select(OmegaConf.create(read(records, method)["config"]), key))


def count(pattern: str) -> int:
    """Return how many files of the repository match: ``count("conf/immunize/*.yaml")``."""
    return len(list(ROOT.glob(pattern)))


def table(
    records: str,
    columns: dict[str, str] = TEXT_TO_IMAGE,
    rows: dict[str, str] | Iterable[str] = (),
    head: str = "Method",
) -> str:
    """Return a Markdown table.

    Args:
        records: Folder below ``outputs/records``.
        columns: Heading → metric and how to show it, ``"asr percent interval"``.
        rows: Records, or text of the first column → record; all of the folder by default.
        head: Heading of the first column.
    """
    lines = [[head, *columns], ["---"] * (1 + len(columns))]
    for label, method in named(records, rows).items():
        cells = [score(records, method, column.split()[0], column) for column in columns.values()]
        lines.append([label, *cells])
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def plot(
    page: Path,
    records: str,
    alt: str,
    x: str = "benign_steps_ratio",
    y: str = "steps_to_relearn_ratio_worst",
    rows: dict[str, str] | Iterable[str] = (),
    limits: tuple[float, float] = (1.25, 1.25),
) -> str:
    """Draw harmful against benign slowdown to ``docs/figures/RECORDS.png``; return a link to it.

    Args:
        page: Page with the link; an expression leaves it out.
        records: Folder below ``outputs/records``.
        alt: What the plot shows, for readers who do not see it.
        x: Metric of the benign side.
        y: Metric of the harmful side.
        rows: As for `table`.
        limits: Largest ``x`` and smallest ``y`` that pass.
    """
    points = []
    for label, method in named(records, rows).items():
        sides = [read(records, method)["metrics"].get(side, {"value": None}) for side in (x, y)]
        if all(side["value"] is not None for side in sides):
            points.append([label, *([s["value"], s["low"], s["high"]] for s in sides)])
    drawn = json.dumps([points, x, y, limits])
    path = ROOT / f"docs/figures/{records}.png"
    if not path.is_file() or Image.open(path).info.get("Description") != drawn:
        if "--check" in sys.argv:
            return f"a new plot {path.name}"
        draw(points, limits, path, drawn)
    return f"\n\n![{alt}]({os.path.relpath(path, page.parent)})\n\n"


def draw(points: list[Any], limits: tuple[float, float], path: Path, drawn: str) -> None:
    """Draw one point with intervals per method, on logarithmic axes."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set(xscale="log", xlabel="benign slowdown (×), lower is better")
    axes.set(yscale="log", ylabel="harmful slowdown (×), least-protected target")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    for label, x, y in points:
        errors = [[[value - low], [high - value]] for value, low, high in (x, y)]
        axes.errorbar(x[0], y[0], xerr=errors[0], yerr=errors[1], fmt="o", elinewidth=0.6)
        axes.annotate(label, (x[0], y[0]), xytext=(5, 5), textcoords="offset points")
    left, top = axes.get_xlim()[0], axes.get_ylim()[1]
    axes.fill_between([left, limits[0]], limits[1], top, color="tab:green", alpha=0.12, lw=0)
    axes.set(xlim=(left, None), ylim=(None, top))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Description": drawn, "Software": None})
    plt.close(figure)


def update(page: Path) -> tuple[str, list[str]]:
    """Return a page's text with current figures, and a line per figure that was another one."""
    text = page.read_text(encoding="utf-8")
    environment = SandboxedEnvironment(undefined=StrictUndefined)
    names = {f.__name__: f for f in (score, setting, count, table)}
    names["plot"] = functools.partial(plot, page)
    differences = []

    def replace(match: re.Match[str]) -> str:
        if match["expression"] is None:
            return match[0]
        new = str(environment.compile_expression(match["expression"], False)(**names))
        if new != match["text"]:
            place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
            differences.append(f"{place}: {match['text'].strip()!r} is now {new.strip()!r}")
        return f"<!-- record: {match['expression']} -->{new}<!-- end -->"

    return MARKER.sub(replace, text), differences


def main() -> int:
    """Rewrite every page, or check it with ``--check``; return the exit code."""
    lines = []
    for page in PAGES:
        text, differences = update(page)
        lines += differences
        if differences and "--check" not in sys.argv:
            page.write_text(text, encoding="utf-8")
    print(*lines, sep="\n")
    return int(bool(lines) and "--check" in sys.argv)


if __name__ == "__main__":
    raise SystemExit(main())
