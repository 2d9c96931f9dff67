"""What every `action` but `run` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from eval.report import compare as comparing
from eval.report.html import render
from eval.report.leaderboard import leaderboard, to_csv, to_html, to_markdown
from lab.cluster.status import status
from lab.core import record as records
from lab.core.errors import UserError
from lab.core.hashing import write_atomically
from lab.core.options import names
from lab.runner.experiment import relative


def publish(
    found: Sequence[records.Record], folder: Path, lost: Sequence[records.Record] = ()
) -> None:
    """Write leaderboard (Markdown, CSV, HTML) and report of ``found`` to ``folder`` and say where.

    ``lost`` have a row in the leaderboard, see `lab.cluster.lost`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = leaderboard([*found, *lost])
    for name, text in (("md", to_markdown(rows)), ("csv", to_csv(rows)), ("html", to_html(rows))):
        write_atomically(folder / f"leaderboard.{name}", text.encode())
    print(to_markdown(rows))
    print(f"leaderboard: {relative(folder / 'leaderboard.md')} (also .csv, .html)")
    print(f"report: {relative(render(found, folder / 'report.html'))}")


def _places(cfg: DictConfig) -> list[str]:
    return [*names("records", cfg.records)]


def _load(cfg: DictConfig) -> list[tuple[Path, records.Record]]:
    return [(path, records.read(path)) for path in records.find(_places(cfg), Path(cfg.paths.runs))]


def _summed_up(cfg: DictConfig, write: Callable[[Sequence[records.Record]], None]) -> None:
    """``write`` over all records that can be read.

    Raises:
        UserError: of the first one that cannot, after the others were written; the further ones are
            told.
    """
    found, broken = records.readable(records.find(_places(cfg), Path(cfg.paths.runs)))
    once = records.distinct(found)
    if len(once) < len(found):
        print(
            f"{len(found) - len(once)} of {len(found)} records repeat another one's content "
            "and are left out."
        )
    if once:
        write(once)
    for further in broken[1:]:
        print(f"error: {further}", file=sys.stderr)
    if broken:
        raise broken[0]


def report(cfg: DictConfig) -> None:
    """One HTML file over any set of records."""
    out = Path(cfg.paths.outputs) / "report.html"
    _summed_up(cfg, lambda found: print(f"report: {relative(render(found, out))}"))


def leaderboards(cfg: DictConfig) -> None:
    """Markdown, CSV and HTML over any set of records."""
    from lab.cluster.lost import lost_runs

    places = [Path(place) for place in _places(cfg)] or [Path(cfg.paths.runs)]
    _summed_up(cfg, lambda found: publish(found, Path(cfg.paths.outputs), lost_runs(places)))


def comparison(cfg: DictConfig) -> None:
    """Config and metric differences of exactly two records."""
    found = _load(cfg)
    if len(found) != 2:
        raise UserError(
            "records",
            f"{len(found)} records",
            "compare needs exactly two: records=[A.json,B.json].",
        )
    (path_a, a), (path_b, b) = found
    result = comparing.compare(a, b)
    out = Path(cfg.paths.outputs) / "comparison.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(out.with_suffix(".html"), comparing.to_html(result).encode())
    print(f"A = {relative(path_a)}\nB = {relative(path_b)}\n{comparing.to_text(result)}")
    print(f"comparison: {relative(out)} (also .html)")


def train(cfg: DictConfig) -> None:
    """Train what ``train`` describes; see `lab.minisd.train.publish`."""
    from lab.minisd.train.publish import run

    run(cfg)


def release(cfg: DictConfig) -> None:
    """Write an immunized model in an open layout; see `lab.release.export`."""
    from lab.release.export import export

    export(cfg)


def check_release(cfg: DictConfig) -> None:
    """Check an exported folder; see `lab.release.verify`."""
    from lab.release.verify import verify

    verify(cfg)


def audits(cfg: DictConfig) -> None:
    """Attack one checkpoint and end in one page; see `lab.release.audit`."""
    from lab.release.audit import audit

    audit(cfg)


def searches(cfg: DictConfig) -> None:
    """Search settings of an immunizer; see `lab.cli.search`."""
    from lab.cli.search import search

    search(cfg)


def saved_view(cfg: DictConfig) -> None:
    """Save a comparison on the W&B server; see `lab.tracking.workspace`."""
    from lab.tracking.workspace import workspace

    workspace(cfg)


ACTIONS = {
    "report": report,
    "leaderboard": leaderboards,
    "compare": comparison,
    "status": status,
    "train": train,
    "export": release,
    "verify": check_release,
    "audit": audits,
    "search": searches,
    "workspace": saved_view,
}
