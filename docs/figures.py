"""Write the figures of README.md and docs/ from the committed records.

A page marks a figure by two comments, inside a sentence or around a table::

    <!-- record: EXPRESSION -->TEXT<!-- end -->

``EXPRESSION`` is a Jinja expression that calls `score`, `limit`, `table`, `grid`, `by_attack`,
`share_after`, `target_share`, `median`, `correlation`, `step_times` or `plain_attacks`.
``python docs/figures.py`` replaces every ``TEXT`` and draws the figures of the README
(`readme_figures`). ``--check`` changes nothing and fails where a page and its records differ.
Fenced blocks are left alone.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from scipy.stats import spearmanr

from eval.report.outcomes import count_checks
from eval.report.words import UNMEASURED, bound
from eval.stats.verdict_rule import WORDS
from lab.core import record
from lab.core.types import BASELINE, IMMUNIZED

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "outputs/records"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKER = re.compile(
    r"^(`{3,}).*?^\1$|<!-- record: (?P<expression>.*?) -->(?P<text>.*?)<!-- end -->",
    re.DOTALL | re.MULTILINE,
)


@functools.cache
def read(records: str, method: str) -> record.Stored:
    """Read ``outputs/records/RECORDS/METHOD.json``."""
    return record.read(RECORDS / records / f"{method}.json")


def round_number(value: float, show: str) -> str:
    """Return whole percent or two digits."""
    if "percent" in show or "points" in show:
        return f"{round(100 * value)}"
    value = float(f"{value:.2g}")
    return f"{value:,.0f}" if 10 <= abs(value) < 1e6 else f"{value:#.2g}"


def unit(show: str) -> str:
    """Return ``%``, ``×`` or nothing."""
    return " %" if "percent" in show else "×" if "ratio" in show else ""


def limit(verdict: str, key: str, show: str = "value") -> str:
    """Return a limit of ``conf/eval/VERDICT.yaml`` as text."""
    options = yaml.safe_load((ROOT / f"conf/eval/{verdict}.yaml").read_text(encoding="utf-8"))
    value = options[verdict][key] * (100 if show in ("percent", "points") else 1)
    return f"{value:g}{unit(show)}"


def score(records: str, method: str, metric: str, show: str = "value") -> str:
    """Return a metric as text: ``score("relearn_table", "joint", "asr", "percent interval")``.

    Args:
        records: Folder below ``outputs/records``.
        method: Name of the record there.
        metric: Its name in the record, or ``checks``, how many checks of the verdict pass, or
            ``seeds``, how many there are.
        show: Words out of ``value``, ``percent``, ``points``, ``ratio`` and ``interval``; instead
            of the value ``median`` of the seeds, where one outlier decides a mean, or ``range``.
    """
    stored = read(records, method)
    if metric == "seeds":
        return str(len(stored["seeds"]))
    if metric == "checks":
        passed, total = count_checks(stored)
        return f"{passed} of {total}" if total else UNMEASURED
    item = stored["metrics"].get(metric, {"value": None})
    if metric == "verdict":
        return WORDS[item["value"]] if metric in stored["metrics"] else stored["status"]
    if ("median" in show or "range" in show) and item["value"] is not None:
        rows = {row["metric"]: row for row in stored["tables"]["seed_values"]}
        seeds = [value for key, value in rows[metric].items() if key != "metric"]
        shown = [np.median(seeds)] if "median" in show else [min(seeds), max(seeds)]
        return " to ".join(round_number(float(value), show) for value in shown) + unit(show)
    return score_text(item, show)


def score_text(item: Mapping[str, Any], show: str) -> str:
    """Return a score with ``value``, ``low``, ``high`` and ``bound`` as text."""
    if item["value"] is None:
        return UNMEASURED
    text = f"{bound(item)} {round_number(item['value'], show)}{unit(show)}".strip()
    if "interval" in show and item["low"] not in (None, item["high"]):
        text += f" [{round_number(item['low'], show)}, {round_number(item['high'], show)}]"
    return text.replace("-", "−")


def table(records: str, rows: dict[str, str], columns: dict[str, str]) -> str:
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


def share_after(records: str, method: str, attack: str, images: int, model: str = IMMUNIZED) -> str:
    """Return the share of images that show the targets after an attack by itself, in percent: the
    mean over seeds and targets. A model that is not usable then shows none, where the attack
    measured that.

    Args:
        records, method: The record.
        attack: Its name there, with its options.
        images: A point of the budget, as the column ``at_`` of the table ``attacks``.
        model: The immunized model or the baseline.
    """
    rows = read(records, method)["tables"]["attacks"]
    column = next(k for k in rows[0] if k.startswith("at_") and int(k[3:]) == images)
    shares = [
        0 if str(images) in row.get("unusable_at", "").split(", ") else row[column] or 0
        for row in rows
        if (row["model"], row["attack"], row["role"]) == (model, attack, "harmful")
    ]
    return f"{100 * np.mean(shares):.0f} %" if shares else UNMEASURED


def target_share(records: str, images: int, rows: dict[str, str], columns: dict[str, str]) -> str:
    """Return a Markdown table of `share_after`, a row per attack.

    Args:
        records, images: As there.
        rows: Text → attack.
        columns: Heading → name of the record; the baseline's column precedes them.
    """
    first, *_ = columns.values()
    body = [
        [
            label,
            share_after(records, first, attack, images, BASELINE),
            *(share_after(records, method, attack, images) for method in columns.values()),
        ]
        for label, attack in rows.items()
    ]
    return markdown([["Attack", "Baseline", *columns], *body])


def with_verdict(records: str, verdict: str, *methods: str) -> str:
    """Return the names of those of ``methods`` whose verdict it is: ``a``, ``b`` and ``c``."""
    names = [f"`{m}`" for m in methods if score(records, m, "verdict") == verdict]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "none"


def curve(records: str, name: str, rows: dict[str, str]) -> str:
    """Return a Markdown table of a curve of shares in percent, a column per point.

    Args:
        records: Folder below ``outputs/records``.
        name: Of the curve.
        rows: Text → record and model, ``"joint baseline"``.
    """
    lines: list[list[str]] = [[]]
    for label, place in rows.items():
        method, model = place.split()
        points = read(records, method)["curves"][name]
        lines[0] = [points["x"], *(f"{x:g}" for x in points["step"])]
        lines.append([label, *(f"{100 * share:.0f} %" for share in points[model])])
    return markdown(lines)


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


def step_times() -> str:
    """Return a Markdown table of ``tests/benchmarks/kappa_step.csv``: milliseconds per step, in
    brackets those of the straightforward loop, and the exponent of the time in the dimension
    between the largest two.
    """
    times = pd.read_csv(ROOT / "tests/benchmarks/kappa_step.csv")
    times = times.pivot(index="rows", columns="dimensions")
    text = times.map(lambda ms: "" if pd.isna(ms) else round_number(ms, ""))
    thin, other = text["thin_ms"], text["straightforward_ms"].map(lambda ms: ms and f" ({ms})")
    *_, before, last = thin
    exponents = np.log(times["thin_ms", last] / times["thin_ms", before]) / np.log(last / before)
    cells = (thin + other).assign(exponent=exponents.map(lambda e: round_number(e, "")))
    head = ["Rows of a batch", *(f"d = {d:,}" for d in thin), "exponent"]
    return markdown([head, *([f"{row.Index:,}", *row[1:]] for row in cells.itertuples())])


def plain_attacks() -> str:
    """Return a Markdown table of ``docs/examples/plain_attacks.csv``, which
    ``docs/examples/score_plain_attack.py`` writes.
    """
    rows: dict[tuple[str, str], list[str]] = {}
    table = pd.read_csv(ROOT / "docs/examples/plain_attacks.csv").replace({np.nan: None})
    for line in table.to_dict("records"):
        text = score_text(line, "ratio interval" if "ratio" in line["figure"] else "value")
        rows.setdefault((line["attack"], line["concept"]), []).append(text)
    head = ["Attack, weights", "Target", "Baseline, steps", "Immunized, steps", "Slowdown"]
    return markdown([head, *([*key, *cells] for key, cells in rows.items())])


def markdown(lines: list[list[str]]) -> str:
    """Return a Markdown table; the first line is its head."""
    head, *body = (f"|{'|'.join(line)}|" for line in lines)
    return "\n".join(["\n", head, "|---" * len(lines[0]) + "|", *body, "\n"])


FUNCTIONS = (
    score,
    limit,
    table,
    grid,
    by_attack,
    share_after,
    target_share,
    curve,
    median,
    with_verdict,
    correlation,
    step_times,
    plain_attacks,
)


def render(text: str) -> str:
    """Return the text of a page with current figures."""
    environment = SandboxedEnvironment(undefined=StrictUndefined)
    names = {f.__name__: f for f in FUNCTIONS}

    def replace(match: re.Match[str]) -> str:
        if match["expression"] is None:
            return match[0]
        figure = environment.compile_expression(match["expression"], False)(**names)
        return f"<!-- record: {match['expression']} -->{figure}<!-- end -->"

    return MARKER.sub(replace, text)


def main() -> int:
    """Rewrite every page and draw the figures of the README, or check both with ``--check``; print
    what changes as a diff.
    """
    check = "--check" in sys.argv
    code = 0
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            code = int(check)
            lines = old.splitlines(keepends=True), new.splitlines(keepends=True)
            sys.stdout.writelines(difflib.unified_diff(*lines, str(page), str(page), n=0))
            if not check:
                page.write_text(new, encoding="utf-8")
    import readme_figures  # which imports this module

    return max(code, readme_figures.main(sys.argv[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
