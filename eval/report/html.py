"""One self-contained HTML file from any set of records: nothing is loaded from anywhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.report import leaderboard as board
from eval.report.charts import swatch
from eval.report.figures import comparison_curves, has_bands, heat_maps, spectra, trajectories
from eval.report.labels import labels as labels_of
from eval.report.options import by_option, transfer
from eval.report.outcomes import outcome
from eval.report.page import page
from eval.report.pictures import pictures
from eval.report.trials import groups
from eval.report.words import Record
from lab.core.hashing import write_atomically
from lab.core.record import is_immunized

_LABELS = ("model", "case", "attack", "task", "metric")  # of a stage
_ABOUT = ("concept", "case", "task", "attack", "model")  # first columns of a table
_PLOTTED = (
    "spectrum",
    "principal_angles",
    "pencil",
    "verdict",
    "transfer_cases",
)  # tables that are shown elsewhere
_ROWS = 200  # of a table in the page; the record holds all


def render(records: Sequence[Record], out: Path) -> Path:
    """Write the report of ``records`` to ``out`` and return its path.

    Args:
        records: one or more; grouped by scenario, backbone and trial, since only those are
            comparable. Pictures of a record that `lab.core.record.read` gave are looked for beside
            it, those of any other beside ``out``.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("a report needs at least one record")
    sections = [
        _section(place.title, f"s{i}", found, out.parent)
        for i, (place, found) in enumerate(groups(records).items())
    ]
    names = list(dict.fromkeys(r["name"].split("/")[0] for r in records))
    title = f"Model immunization: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
    out.parent.mkdir(parents=True, exist_ok=True)
    text = page(
        "report.html", title=title, sections=sections, footnote=board.LEGEND, count=len(records)
    )
    write_atomically(out, text.encode())
    return out


def _section(title: str, anchor: str, records: list[Record], folder: Path) -> dict[str, Any]:
    labels = labels_of(records)
    index, shown = {}, 0
    for record, label in zip(records, labels, strict=True):
        shown += is_immunized(record)
        index[label] = shown if is_immunized(record) else 0
    legend = [(swatch(0), "baseline (not immunized)")]
    drawn = {label for r, label in zip(records, labels, strict=True) if r["curves"] or r["tables"]}
    legend += [(swatch(i), label) for label, i in index.items() if i > 0 and label in drawn]
    main, more = trajectories(records, labels, index)
    return {
        "title": title,
        "anchor": anchor,
        "runs": [
            _run(r, label, f"{anchor}-{i}")
            for i, (r, label) in enumerate(zip(records, labels, strict=True))
        ],
        "boards": board.boards(board.leaderboard(records)),
        "legend": legend,
        "pictures": pictures(records, labels, folder),
        "options": by_option(records),
        "transfer": transfer(records, labels),
        "bands": has_bands(records),
        "generated": any("msgr_clip" in r["metrics"] or "asr" in r["metrics"] for r in records),
        "curves": comparison_curves(records, labels, index),
        "trajectories": main,
        "more_trajectories": more,
        "spectra": spectra(records, labels, index),
        "heat_maps": heat_maps(records, labels),
        "notes": list(dict.fromkeys(n for r in records for n in r["notes"])),
    }


def _run(record: Record, label: str, anchor: str) -> dict[str, Any]:
    found = outcome(record)
    tables = [
        {
            "name": name,
            "head": _columns(rows),
            "rows": _cells(rows[:_ROWS]),
            "left_out": max(len(rows) - _ROWS, 0),
        }
        for name, rows in record["tables"].items()
        if rows and name not in _PLOTTED
    ]
    return {
        "record": record,
        "label": label,
        "anchor": anchor,
        "outcome": found,
        "checks": record["tables"].get("verdict", []),
        "tables": tables,
        "troubles": _troubles(record),
        "facts": _facts(record),
        "config": json.dumps(record["config"], indent=2, ensure_ascii=False),
    }


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """What a row is about, in words, before its figures: stages keep their columns in the order of
    the alphabet.
    """
    names = dict.fromkeys(key for row in rows for key in row)
    return sorted(
        names,
        key=lambda name: (
            name not in _ABOUT,
            not any(isinstance(row.get(name), str) for row in rows),
        ),
    )


def _cells(rows: list[dict[str, Any]]) -> list[list[Any]]:
    columns = _columns(rows)
    return [[row.get(c) for c in columns] for row in rows]


def _troubles(record: Record) -> list[str]:
    """Everything that did not go well, as sentences."""
    out = []
    counts = Counter((c["stage"], c["status"]) for c in record["cells"] if c["status"] != "ok")
    for (stage, status), count in counts.items():
        total = sum(c["stage"] == stage for c in record["cells"])
        where = [
            " ".join(str(c[k]) for k in _LABELS if c.get(k) is not None) + f" seed {c['seed']}"
            for c in record["cells"]
            if (c["stage"], c["status"]) == (stage, status)
        ]
        more = " …" if len(where) > 4 else ""
        out.append(f"{count} of {total} {stage} stages {status}: {'; '.join(where[:4])}{more}.")
    out += [f"Metric {name} was skipped: {reason}." for name, reason in record["skipped"].items()]
    out += [
        f"{name} has no value: {m['note']}."
        for name, m in record["metrics"].items()
        if m["value"] is None
    ]
    return [re.sub(r"\.\.$", ".", text) for text in out]


def _facts(record: Record) -> list[tuple[str, Any]]:
    """Provenance, readable."""
    p = record["provenance"]
    dirty = {True: " with uncommitted changes", False: ", clean", None: ""}[p.get("git_dirty")]
    facts = [
        ("record", record["name"]),
        ("content hash", record["content_hash"]),
        ("git", f"{p['git_sha']}{dirty}" if p.get("git_sha") else "no git checkout"),
        ("started", p.get("started")),
        ("wall time", f"{p['wall_time_s']:.1f} s"),
        ("peak memory", f"{p['peak_memory_mb']:.0f} MB"),
        ("device", f"{p.get('device')}, {p.get('threads')} threads, host {p.get('host')}"),
        ("seeds", ", ".join(map(str, record["seeds"]))),
        ("attacks", ", ".join(record["attacks"]) or "none"),
        (
            "stages",
            f"{len(record['cells'])} ({p.get('cache_hits', 0)} from the cache, "
            f"{p.get('cache_misses', 0)} computed)",
        ),
        (
            "versions",
            ", ".join(
                f"{k} {v}" for k, v in {"python": p.get("python"), **p.get("versions", {})}.items()
            ),
        ),
    ]
    for kind in ("data_hash", "weight_hash"):
        hashes = p.get(kind) or {}
        text = (
            ", ".join(f"seed {k}: {v[:12]}" for k, v in hashes.items())
            if isinstance(hashes, dict)
            else hashes
        )
        if text:
            facts.append((kind.replace("_", " "), text))
    return facts
