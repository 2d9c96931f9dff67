"""What `action=report|leaderboard|compare|status` do with records that are there already."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from eval.report.compare import compare, to_text
from eval.report.html import render
from eval.report.leaderboard import leaderboard, to_csv, to_html, to_markdown
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


def _places(cfg: DictConfig) -> list[str]:
    return [cfg.records] if isinstance(cfg.records, str) else [str(place) for place in cfg.records]


def _load(cfg: DictConfig) -> list[tuple[Path, records.Record]]:
    return [(path, records.read(path)) for path in records.find(_places(cfg), Path(cfg.paths.runs))]


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
    places = [Path(p) for p in _places(cfg)] or [Path(cfg.paths.runs)]
    for root in places:
        if not root.is_dir():
            raise UserError(
                "records" if cfg.records else "paths.runs", root, "does not exist: nothing was run there yet."
            )
    marks = ("record.json", "run.log", "config.yaml")  # the last one lies in .hydra from the first second on
    found = {p for root in places for name in marks for p in root.rglob(name)}
    folders = {p.parent.parent if p.parent.name == ".hydra" else p.parent for p in found}
    counts: Counter[str] = Counter()
    for folder in sorted(folders):
        if (folder / "record.json").is_file():
            record = records.read(folder / "record.json")
            state, why = record["status"], (record["error"] or {}).get("message", "")
            seconds = f"{record['provenance']['wall_time_s']:.0f} s"
        else:
            state, why, seconds = "unfinished", "no record yet: running, or killed (the same command continues it)", ""
        counts[state] += 1
        print(f"{state:<10} {seconds:>7}  {relative(folder)}  {why[:100]}")
    unfinished = list(Path(cfg.paths.cache).rglob("*.ckpt"))
    print(", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "no runs")
    if unfinished:
        print(f"{len(unfinished)} stages with a checkpoint to continue from")


def train(cfg: DictConfig) -> None:
    """Train what ``train`` describes; see `lab.minisd.publish`."""
    from lab.minisd.publish import run

    run(cfg)


ACTIONS = {"report": report, "leaderboard": leaderboards, "compare": comparison, "status": status, "train": train}
