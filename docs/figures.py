"""Write the figures of README.md and docs/ from the committed records.

A page marks a figure by two comments, inside a sentence or around a table or plot::

    <!-- record: EXPRESSION -->TEXT<!-- end -->

``EXPRESSION`` is a Jinja expression that calls `score`, `setting`, `count`, `table` or `plot`.
``python docs/figures.py`` replaces every ``TEXT``. ``--check`` changes nothing and fails where a
page and its records differ. Fenced blocks are left alone.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from matplotlib.ticker import LogLocator
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
BOUNDS = {"lower": "≥ ", "upper": "≤ ", None: ""}
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


def list_methods(records: str) -> dict[str, str]:
    """Return every record of a set as label → name."""
    return {path.stem: path.stem for path in sorted((RECORDS / records).glob("*.json"))}


def round_number(value: float, show: str) -> str:
    """Return whole percent or two digits."""
    if "percent" in show:
        return f"{100 * value:.0f}"
    value = float(f"{value:.2g}")
    return f"{value:,.0f}" if 10 <= abs(value) < 1e6 else f"{value:#.2g}"


def score(records: str, method: str, metric: str, show: str = "value") -> str:
    """Return a metric as text: ``score("relearn_table", "joint", "asr", "percent interval")``.

    Args:
        records: Folder below ``outputs/records``.
        method: Name of the record there.
        metric: Its name in the record, or ``checks``: how many checks of the verdict pass.
        show: Words out of ``value``, ``percent``, ``ratio`` and ``interval``.
    """
    stored = read(records, method)
    item = stored["metrics"].get(metric, {"value": None})
    if metric == "verdict":
        words = {1: "passes", 0: "fails", None: "inconclusive"}
        return words[item["value"]] if metric in stored["metrics"] else stored["status"]
    if metric == "checks":  # how many checks of the verdict pass
        passed = [check["passed"] for check in stored["tables"].get("verdict", [])]
        return f"{sum(passed)} of {len(passed)}" if passed else "–"
    if item["value"] is None:
        return "–"
    unit = " %" if "percent" in show else "×" if "ratio" in show else ""
    text = f"{BOUNDS[item['bound']]}{round_number(item['value'], show)}{unit}"
    if "interval" in show and item["low"] not in (None, item["high"]):
        text += f" [{round_number(item['low'], show)}, {round_number(item['high'], show)}]"
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
    rows: dict[str, str] | None = None,
    head: str = "Method",
) -> str:
    """Return a Markdown table.

    Args:
        records: Folder below ``outputs/records``.
        columns: Heading → metric and how to show it, ``"asr percent interval"``.
        rows: Text of the first column → record; all of the folder by default.
        head: Heading of the first column.
    """
    body = [
        [label, *(score(records, method, shown.split()[0], shown) for shown in columns.values())]
        for label, method in (rows or list_methods(records)).items()
    ]
    head, *lines = (f"|{'|'.join(line)}|" for line in [[head, *columns], *body])
    return "\n".join(["\n", head, "|---" * (1 + len(columns)) + "|", *lines, "\n"])


def plot(
    page: Path,
    records: str,
    alt: str,
    x: str = "benign_steps_ratio_worst",
    y: str = "steps_to_relearn_ratio",
    rows: dict[str, str] | None = None,
    limits: tuple[float, float] = (1.25, 2.0),
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
    for label, method in (rows or list_methods(records)).items():
        metrics = read(records, method)["metrics"]
        points.append([label, *([metrics[s][v] for v in ("value", "low", "high")] for s in (x, y))])
    drawn = json.dumps([points, x, y, limits])
    path = ROOT / f"docs/figures/{records}.png"
    if not path.is_file() or Image.open(path).info.get("Description") != drawn:
        if "--check" in sys.argv:
            return f"a new plot {path.name}"
        draw(points, limits, path, drawn)
    return f"\n\n![{alt}]({os.path.relpath(path, page.parent)})\n\n"


def draw(points: list[Any], limits: tuple[float, float], path: Path, drawn: str) -> None:
    """Draw one point with intervals per method, on logarithmic axes."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="benign slowdown of the slowest concept, lower is better",
        ylabel="harmful slowdown, higher is better",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}×")
        axis.set_minor_formatter("")
    for label, x, y in points:
        errors = [[[value - low], [high - value]] for value, low, high in (x, y)]
        axes.errorbar(x[0], y[0], errors[1], errors[0], fmt="o", elinewidth=0.6, label=label)
    left, top = axes.get_xlim()[0], axes.get_ylim()[1]
    axes.fill_between([left, limits[0]], limits[1], top, color="tab:green", alpha=0.12, lw=0)
    axes.set(xlim=(left, None), ylim=(None, top))
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120, metadata={"Description": drawn, "Software": None})
    plt.close(figure)


def render(page: Path, text: str) -> str:
    """Return the text of ``page`` with current figures."""
    environment = SandboxedEnvironment(undefined=StrictUndefined)
    names = {f.__name__: f for f in (score, setting, count, table)}
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
