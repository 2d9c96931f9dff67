"""What every `action` does. Its imports take seconds, so `run.py` makes them late."""

from __future__ import annotations

import json
import pkgutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from eval.report import compare as comparing
from eval.report.html import render
from eval.report.leaderboard import leaderboard, to_csv, to_html, to_markdown, to_text
from lab.cluster.status import lost_runs
from lab.core import record as records
from lab.core.errors import UserError, nearest
from lab.core.hashing import write_atomically
from lab.runner.batch import LASTING, claim
from lab.runner.experiment import relative

PLANNED = ("run", "search", "audit")  # actions that `dry_run` can plan


def act(cfg: DictConfig, folder: Path) -> int:
    """Do what ``cfg.action`` says in the run folder ``folder``; return the exit code.

    Raises:
        UserError: an action that does not exist, or that has no plan; wrong input to it.
    """
    if cfg.action not in ACTIONS:
        raise UserError("action", cfg.action, nearest(str(cfg.action), ACTIONS))
    if not isinstance(cfg.dry_run, bool):
        raise UserError("dry_run", cfg.dry_run, "must be true or false.")
    if cfg.dry_run and cfg.action not in PLANNED:
        raise UserError("dry_run", True, f"plans action={' | '.join(PLANNED)} only.")
    _apply_limits(cfg)
    cfg.records = [cfg.records] if isinstance(cfg.records, str) else cfg.records
    is_helper = OmegaConf.select(cfg, "launch.machine_rank")  # the first machine answers for all
    works = cfg.action in LASTING and not (cfg.dry_run or is_helper)
    with claim(folder) if works else nullcontext():
        function = pkgutil.resolve_name(ACTIONS[cfg.action])
        arguments = (cfg, folder) if cfg.action in ("run", "search") else (cfg,)
        code = function(*arguments)
    return code if isinstance(code, int) else 0


def _apply_limits(cfg: DictConfig) -> None:
    """Lower what ``limits`` names (`conf/debug`), except for keys of the command line."""
    typed = {word.lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.task}
    for key, limit in (cfg.get("limits") or {}).items():
        value = OmegaConf.select(cfg, key)
        if isinstance(value, int | float) and value > limit and key not in typed:
            OmegaConf.update(cfg, key, limit)


def publish(
    loaded: Sequence[records.Record], folder: Path, lost: Sequence[records.Record] = ()
) -> None:
    """Write leaderboard (Markdown, CSV, HTML) and report of ``loaded`` to ``folder``.

    ``lost`` have a row in the leaderboard, see `lab.cluster.status.lost_runs`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = leaderboard([*loaded, *lost])
    for name, text in (("md", to_markdown(rows)), ("csv", to_csv(rows)), ("html", to_html(rows))):
        write_atomically(folder / f"leaderboard.{name}", text.encode())
    print(to_text(rows))
    print(f"leaderboard: {relative(folder / 'leaderboard.md')} (also .csv, .html)")
    print(f"report: {relative(render(loaded, folder / 'report.html'))}")


def _paths(cfg: DictConfig) -> list[Path]:
    return records.find(map(str, cfg.records), Path(cfg.paths.runs))


def _summarize(cfg: DictConfig, write: Callable[[Sequence[records.Record]], None]) -> None:
    """Call ``write`` with all records that can be read.

    Raises:
        UserError: the first record that cannot be read, after the others were written.
    """
    loaded, broken = records.readable(_paths(cfg))
    distinct = records.distinct(loaded)
    if len(distinct) < len(loaded):
        repeated = f"{len(loaded) - len(distinct)} of {len(loaded)} records"
        print(f"{repeated} repeat another one's content and are left out.")
    if distinct:
        write(distinct)
    for error in broken[1:]:
        print(f"error: {error}", file=sys.stderr)
    if broken:
        raise broken[0]


def report(cfg: DictConfig) -> None:
    """Write one HTML file over any set of records."""
    out = Path(cfg.paths.outputs) / "report.html"
    _summarize(cfg, lambda loaded: print(f"report: {relative(render(loaded, out))}"))


def leaderboards(cfg: DictConfig) -> None:
    """Write Markdown, CSV and HTML over any set of records."""
    places = [Path(place) for place in cfg.records or [cfg.paths.runs]]
    _summarize(cfg, lambda loaded: publish(loaded, Path(cfg.paths.outputs), lost_runs(places)))


def comparison(cfg: DictConfig) -> None:
    """Write the differences of two records in config and metrics."""
    loaded = [(path, records.read(path)) for path in _paths(cfg)]
    if len(loaded) != 2:
        fix = "compare needs exactly two: records=[A.json,B.json]."
        raise UserError("records", f"{len(loaded)} records", fix)
    (path_a, a), (path_b, b) = loaded
    result = comparing.compare(a, b)
    out = Path(cfg.paths.outputs) / "comparison.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(out.with_suffix(".html"), comparing.to_html(result).encode())
    print(f"A = {relative(path_a)}\nB = {relative(path_b)}\n{comparing.to_text(result)}")
    print(f"comparison: {relative(out)} (also .html)")


ACTIONS = {  # imported when they are called: some need packages that others do without
    "run": "lab.cluster.launch:launch",
    "report": "lab.cli.actions:report",
    "leaderboard": "lab.cli.actions:leaderboards",
    "compare": "lab.cli.actions:comparison",
    "status": "lab.cluster.status:status",
    "train": "lab.minisd.train.publish:run",
    "export": "lab.release.export:export",
    "verify": "lab.release.verify:verify",
    "audit": "lab.release.audit:audit",
    "search": "lab.cli.search:search",
    "workspace": "lab.tracking.workspace:workspace",
}
