"""What `action=report|leaderboard|compare|status` do with records that are there already."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from eval.report.compare import compare, to_text
from eval.report.html import render
from eval.report.leaderboard import leaderboard, to_csv, to_html, to_markdown
from omegaconf import DictConfig

from lab import record as records
from lab.errors import UserError
from lab.experiment import relative
from lab.store import write_atomically


def publish(found: list[records.Record], folder: Path) -> None:
    """Write leaderboard (Markdown, CSV, HTML) and report of ``found`` to ``folder`` and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = leaderboard(found)
    for name, text in (("md", to_markdown(rows)), ("csv", to_csv(rows)), ("html", to_html(rows))):
        write_atomically(folder / f"leaderboard.{name}", text.encode())
    print(to_markdown(rows))
    print(f"leaderboard: {relative(folder / 'leaderboard.md')} (also .csv, .html)")
    print(f"report: {relative(render(found, folder / 'report.html'))}")


def _load(cfg: DictConfig) -> list[tuple[Path, records.Record]]:
    places = [cfg.records] if isinstance(cfg.records, str) else list(cfg.records)
    return [(path, records.read(path)) for path in records.find(places, Path(cfg.paths.runs))]


def report(cfg: DictConfig) -> None:
    """One HTML file over any set of records."""
    found = [record for _, record in _load(cfg)]
    print(f"report: {relative(render(found, Path(cfg.paths.outputs) / 'report.html'))}")


def leaderboards(cfg: DictConfig) -> None:
    publish([record for _, record in _load(cfg)], Path(cfg.paths.outputs))


def comparison(cfg: DictConfig) -> None:
    """Config and metric differences of exactly two records."""
    found = _load(cfg)
    if len(found) != 2:
        raise UserError("records", f"{len(found)} records", "compare needs exactly two: records=[A.json,B.json].")
    (path_a, a), (path_b, b) = found
    result = compare(a, b)
    out = Path(cfg.paths.outputs) / "comparison.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (json.dumps(result, indent=1) + "\n").encode())
    print(f"A = {relative(path_a)}\nB = {relative(path_b)}\n{to_text(result)}\ncomparison: {relative(out)}")


def status(cfg: DictConfig) -> None:
    """Runs below ``paths.runs``: done, diverged, failed, preempted, or running (a folder without a record)."""
    places = [cfg.records] if isinstance(cfg.records, str) else list(cfg.records)
    root = Path(places[0] if places else cfg.paths.runs)
    if not root.is_dir():
        raise UserError("paths.runs", root, "does not exist: nothing was run from this folder yet.")
    counts: Counter[str] = Counter()
    for log in sorted(root.rglob("run.log")):
        path = log.with_name("record.json")
        if path.is_file():
            record = records.read(path)
            state, why = record["status"], (record["error"] or {}).get("message", "")
            seconds = f"{record['provenance']['wall_time_s']:.0f} s"
        else:
            state, why, seconds = "unfinished", "no record yet: running, or killed (the same command continues it)", ""
        counts[state] += 1
        print(f"{state:<10} {seconds:>7}  {relative(log.parent)}  {why[:100]}")
    unfinished = list(Path(cfg.paths.cache).rglob("*.ckpt"))
    print(", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "no runs")
    if unfinished:
        print(f"{len(unfinished)} stages with a checkpoint to continue from")


ACTIONS = {"report": report, "leaderboard": leaderboards, "compare": comparison, "status": status}
