"""The report: one self-contained HTML file from any set of records."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from eval.report.leaderboard import LEGEND, Row, columns, leader_blocks, leaderboard, sections
from eval.report.page import Block, collapsed, page
from eval.report.studies import (
    curve_blocks,
    option_blocks,
    pair_blocks,
    spectrum_blocks,
    transfer_blocks,
)
from eval.report.words import (
    UNMEASURED,
    Record,
    capitalized,
    counted,
    heading,
    measured,
    percent,
)
from lab.core.hashing import write_atomically

IMAGE_BYTES = 24_000_000  # of one page; further images are only named
_GLOSSARY = {
    "baseline": "the same model, not immunized; it meets the same attacks, data and seeds",
    "passes": "harmful fine-tuning gets harder and benign fine-tuning does not, on the same "
    "weights, against the strongest attack",
    "inconclusive": "not measured, a limit that leaves it open, or an attack too weak to work on "
    "the baseline",
    "attack success rate": "share of images in which a detector sees the target after the attack",
    "relearning slowdown": "steps until the target is relearned ÷ the baseline's, for the "
    "least-protected target",
    "benign cost": "the same ratio for what should stay easy to learn, for the slowest concept",
    "1×, 5×": "the step at which both models are compared (budget.horizon), and five times as far",
    "SGR, MSGR": "similarity to the concept's images lost relative to the baseline; its mean over "
    "targets",
    "κ, RIR": "condition number of a linear probe's Hessian; how much it rose on the harmful task "
    "÷ on the benign one",
}


def render(records: Sequence[Record], out: Path) -> Path:
    """Write the report of ``records`` to ``out`` and return its path.

    Records, at least one, are grouped by scenario, backbone and trial, since only those are
    comparable. Of each scenario and backbone the largest group is open, the others are collapsed.
    Images of a record that `lab.core.record.read` gave are looked for beside it, those of any other
    beside ``out``.
    """
    groups = sections(leaderboard(records)).values()
    room = IMAGE_BYTES // len(groups)
    scenes: dict[tuple[str, str], list[list[Row]]] = {}
    for rows in groups:
        record = rows[0].record
        scenes.setdefault((record["scenario"], record["backbone"]), []).append(rows)
    blocks: list[Block] = []
    for scene in scenes.values():
        largest, *others = sorted(scene, key=len, reverse=True)
        title = {"heading": largest[0].title, "tooltip": largest[0].trial, "level": 2}
        blocks += [title, *group_blocks(largest, out.parent, room)]
        for rows in others:
            parts = group_blocks(rows, out.parent, room)
            blocks += collapsed(f"{rows[0].title}: {parts[0]['outcome'].headline}", parts)
    studies = dict.fromkeys(r["name"].split("/")[0] for r in records)
    blocks += collapsed("What the words mean", [{"facts": _GLOSSARY}])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page(f"Model immunization: {', '.join(studies)}", blocks).encode())
    return out


def group_blocks(rows: Sequence[Row], beside: Path, room: int) -> list[Block]:
    """Return everything about comparable records; the outcome comes first."""
    records = [row.record for row in rows]
    named = [(row.label, row.record) for row in rows]
    notes = list(dict.fromkeys(note for record in records for note in record["notes"]))
    details: list[Block] = [
        {
            "row": row,
            "troubles": _troubles(row.record),
            "facts": _provenance(row.record),
            "config": json.dumps(row.record["config"], indent=2, ensure_ascii=False),
        }
        for row in rows
    ]
    each = [
        {"summary": f"{d['row'].label}: {d['row'].outcome.label}", "blocks": [d]} for d in details
    ]
    return [
        *leader_blocks(rows),
        *collapsed("All metrics", [{"text": LEGEND}, _metrics_table(rows)]),
        *check_blocks(rows),
        *attack_blocks(rows),
        *image_blocks(rows, beside, room),
        *curve_blocks(named),
        *spectrum_blocks(named),
        *pair_blocks(named),
        *transfer_blocks(named),
        *option_blocks(records),
        *collapsed("Notes on the data", [{"list": notes}] if notes else []),
        *collapsed("Provenance, tables and configuration", each if len(each) > 1 else details),
    ]


def _metrics_table(rows: Sequence[Row]) -> Block:
    """Return one row per metric and one column per method."""

    def cell(row: Row, name: str) -> str:
        metric = row.record["metrics"].get(name)
        text, note = measured(metric, name), (metric or {}).get("note") or ""
        return f"{text} {note}".strip() if text == UNMEASURED or len(rows) == 1 else text

    known = [name for row in rows for name in row.record["metrics"]]
    names = [name for name in dict.fromkeys([*columns(known), *known]) if name != "verdict"]
    cells = {"metric": list(map(heading, names))}
    cells |= {row.label: [cell(row, name) for name in names] for row in rows}
    return {"table": pd.DataFrame(cells), "label": "All metrics"}


def check_blocks(rows: Sequence[Row]) -> list[Block]:
    """Return tiles of the first method's checks; those of the others are collapsed."""
    groups: list[list[Block]] = []
    for row in rows:
        checks, seeds = row.record["tables"].get("verdict", []), len(row.record["seeds"])
        title = "Checks of {}: {} of {} pass".format(row.label, *row.checks)
        if checks:
            tiles = sorted(checks, key=lambda check: bool(check["passed"]))
            groups.append([{"heading": title}, {"tiles": tiles, "seeds": seeds}])
    first, *others = groups or [[]]
    title = f"Checks of {counted(len(others), 'other method')}"
    return first + collapsed(title, list(chain.from_iterable(others)))


def attack_blocks(rows: Sequence[Row]) -> list[Block]:
    """Return the success of every attack on every concept and model, collapsed."""
    frames = {row.label: pd.DataFrame(row.record["tables"].get("attacks", [])) for row in rows}
    blocks: list[Block] = []
    for label, frame in frames.items():
        steps = [name for name in frame if name.startswith("at_")]
        if not steps:
            continue
        keys = ["role", "concept", "attack", "model"]
        means = frame.groupby(keys, sort=False)[steps].mean().reset_index()
        means[steps] = means[steps].map(lambda x: UNMEASURED if pd.isna(x) else percent(x))
        names = {name: f"after {int(name.removeprefix('at_'))}" for name in steps}
        table: Block = {"table": means.rename(columns=names), "label": f"Attacks on {label}"}
        blocks += [{"heading": label}, table] if len(frames) > 1 else [table]
    return collapsed("Every attack on every concept: images that show it", blocks)


# ---- images


def image_blocks(rows: Sequence[Row], beside: Path, room: int) -> list[Block]:
    """Return the image grids of both models at 1×, of the first record that has any; full grids and
    other records' are collapsed, and images that are not shown are named.

    Args:
        beside: where images of a record lie that was not read from a file.
        room: bytes for images.
    """
    first: list[Block] = []
    more: list[Block] = []
    missing: list[str] = []
    for row in rows:
        is_first, folder = not (first or more), getattr(row.record, "folder", beside)
        for name, image in row.record.get("images", {}).items():
            source = _read_image(folder / image["path"], image["sha256"])
            if not 0 < len(source) <= room:
                missing.append(f"{row.label}: {image['path']}")
                continue
            room -= len(source)
            title = capitalized(name.partition("_")[2].replace("_", " ") or name)
            block = {"image": f"{row.label}: {title}", "caption": image["caption"], "src": source}
            is_open = is_first and name.startswith("comparison_")
            (first if is_open else more).append(block)
    blocks = [{"heading": "Images of both models after the attack"}, *first] if first else []
    blocks += collapsed(f"{len(more)} more image grids", more)
    title = f"{len(missing)} image grids not shown: too large for this page, not beside the "
    title += "record, or not the file that it names (SHA-256 differs)"
    return blocks + collapsed(title, [{"list": missing}] if missing else [])


def _read_image(path: Path, sha256: str) -> str:
    """Return an image as a data URL; empty where the file is not what the record names."""
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != sha256 or not data.startswith(b"\x89PNG\r\n"):
        return ""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


# ---- records


def _troubles(record: Record) -> list[str]:
    """Return everything that did not go well, as sentences."""
    error, stages = record["error"], record["stages"]
    out = [f"{error['type']}: {error['message']} ({error['key']})"] if error else []
    totals = Counter(stage["kind"] for stage in stages)
    failed = Counter((s["kind"], s["status"], s["model"]) for s in stages if s["status"] != "ok")
    out += [
        f"{count} of {totals[kind]} stages {kind} {status}, {model or 'both models'}"
        for (kind, status, model), count in failed.items()
    ]
    skipped = record["skipped"].items()
    return out + [f"Metric {name} was skipped: {reason}" for name, reason in skipped]


def _provenance(record: Record) -> dict[str, Any]:
    p = record["provenance"]
    dirty = {True: " with uncommitted changes", False: ", clean"}.get(p.get("git_dirty"), "")
    folder: Path | None = getattr(record, "folder", None)
    offline = sorted(folder.glob("wandb/offline-run-*")) if folder else []
    versions = {"python": p.get("python"), **p.get("versions", {})}
    hashes = {key: p.get(key) or {} for key in ("data_hash", "weight_hash")}
    return {
        "record": record["name"],
        "folder": folder,
        "W&B": ", ".join(f"wandb sync {run}" for run in offline),
        "content hash": record["content_hash"],
        "schema": record["schema"],
        "git": f"{p['git_sha']}{dirty}" if p.get("git_sha") else "no git checkout",
        "started": p.get("started"),
        "wall time": f"{p.get('wall_time_s', 0):,.0f} s",
        "peak memory": f"{p.get('peak_memory_mb', 0):,.0f} MB",
        "device": f"{p.get('device')}, {p.get('threads')} threads, host {p.get('host')}",
        "seeds": ", ".join(map(str, record["seeds"])),
        "attacks": ", ".join(record["attacks"]),
        "stages": f"{len(record['stages'])} ({p.get('cache_hits', 0)} from the cache)",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        **{
            key.replace("_", " "): ", ".join(f"seed {s}: {v[:12]}" for s, v in values.items())
            for key, values in hashes.items()
        },
    }
