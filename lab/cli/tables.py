"""Actions over records: report, leaderboard, comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from eval.report import compare as comparing
from eval.report.html import render
from eval.report.leaderboard import leaderboard, to_csv, to_markdown, to_text
from lab.core import record as records
from lab.core.errors import UserErrors
from lab.core.hashing import write_atomically
from lab.runner.batch import relative


def publish(loaded: Sequence[records.Record], folder: Path) -> None:
    """Write leaderboard (Markdown, CSV) and report of ``loaded`` to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = leaderboard(loaded)
    for name, text in (("md", to_markdown(rows)), ("csv", to_csv(rows))):
        write_atomically(folder / f"leaderboard.{name}", text.encode())
    print(f"\n{to_text(rows)}")
    print(f"\nleaderboard: {relative(folder / 'leaderboard.md')} and .csv")
    print(f"report: {relative(render(loaded, folder / 'report.html'))}")


def _show(cfg: DictConfig, write: Callable[[list[records.Stored]], None]) -> None:
    """Call ``write`` with the distinct records that ``cfg.records`` names, if any can be read.

    Raises:
        UserError: at the end, records that cannot be read.
    """
    loaded, broken = records.readable(records.find(map(str, cfg.records), Path(cfg.paths.runs)))
    distinct = records.distinct(loaded)
    if len(distinct) < len(loaded):
        repeated = f"{len(loaded) - len(distinct)} of {len(loaded)} records"
        print(f"{repeated} repeat another one's content and are left out.")
    if distinct:
        write(distinct)
    UserErrors.check(broken)


def write_report(cfg: DictConfig) -> None:
    """Write one HTML file over any set of records."""
    file = Path(cfg.paths.outputs) / "report.html"
    _show(cfg, lambda loaded: print(f"report: {relative(render(loaded, file))}"))


def write_leaderboard(cfg: DictConfig) -> None:
    """Write the leaderboard and the report over any set of records."""
    _show(cfg, lambda loaded: publish(loaded, Path(cfg.paths.outputs)))


def write_comparison(cfg: DictConfig) -> None:
    """Write the differences of two records in config and metrics, or those of several records from
    the first.
    """
    paths = records.find(map(str, cfg.records), Path(cfg.paths.runs))
    loaded = [records.read(path) for path in paths]
    result = comparing.compare_all(loaded)
    out = Path(cfg.paths.outputs) / "comparison.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if len(loaded) > 2:
        result.to_csv(out.with_suffix(".csv"), index=False)
        print(comparing.many_to_text(result, loaded[0]))
        print(f"comparison: {relative(out.with_suffix('.csv'))}")
        return
    write_atomically(out, (json.dumps(result.attrs, indent=1) + "\n").encode())
    write_atomically(out.with_suffix(".html"), comparing.to_html(result.attrs).encode())
    print(f"A = {relative(paths[0])}\nB = {relative(paths[1])}\n{comparing.to_text(result.attrs)}")
    print(f"comparison: {relative(out)} (also .html)")
