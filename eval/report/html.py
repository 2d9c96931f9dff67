"""The report: one self-contained HTML file from any set of records."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.report.leaderboard import LEGEND, Row, columns, leader_blocks, leaderboard, sections
from eval.report.outcomes import TONES, check_word, outcome
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
    Metric,
    Record,
    bound,
    capitalized,
    counted,
    figure,
    heading,
    interval,
    measured,
)
from lab.core.hashing import write_atomically

IMAGE_BYTES = 24_000_000  # of one page; further images are only named
ROWS = 100  # of a table in the page; the record holds all
_PLOTTED = ("spectrum", "principal_angles", "pencil", "verdict", "transfer_cases")
_ABOUT = ("concept", "case", "task", "attack", "model")  # first columns of a table
_GLOSSARY = {
    "baseline": "the same model, not immunized; it meets the same attacks, data and seeds",
    "passes": "harmful fine-tuning gets harder and benign fine-tuning does not, on the same "
    "weights, against the strongest attack",
    "inconclusive": "not measured, a limit that leaves it open, or an attack too weak to work on "
    "the baseline",
    "attack success rate": "share of images in which a detector sees the target after the attack",
    "relearning slowdown": "steps until the target is relearned ÷ the baseline's, for the "
    "least-protected target",
    "benign cost": "the same ratio for what should stay easy to learn, for the worst concept",
    "1×, 5×": "the step at which both models are compared (budget.horizon), and five times as far",
    "SGR, MSGR": "similarity to the concept's images lost relative to the baseline; its mean over "
    "targets",
    "κ, RIR": "condition number of a linear probe's Hessian; how much it rose on the harmful task "
    "÷ on the benign one",
}


def render(records: Sequence[Record], out: Path) -> Path:
    """Write the report of ``records`` to ``out`` and return its path.

    Records are grouped by scenario, backbone and trial, since only those are comparable. Of each
    scenario and backbone the largest group is open, the others are collapsed. Images of a record
    that `lab.core.record.read` gave are looked for beside it, those of any other beside ``out``.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("a report needs at least one record")
    groups = sections(leaderboard(records))
    scenes: dict[tuple[str, str], list[str]] = {}  # (scenario, backbone) → titles of its groups
    for title, rows in groups.items():
        scenes.setdefault((rows[0]["scenario"], rows[0]["backbone"]), []).append(title)
    blocks: list[Block] = []
    for names in scenes.values():
        names.sort(key=lambda title: -len(groups[title]))
        for title in names:
            rows = groups[title]
            parts = group_blocks(rows, out.parent, IMAGE_BYTES // len(groups))
            if title == names[0]:
                blocks += [{"heading": title, "tooltip": rows[0]["trial"], "level": 2}, *parts]
            else:
                blocks += collapsed(f"{title}: {parts[0]['outcome'].headline}", parts)
    studies = dict.fromkeys(r["name"].split("/")[0] for r in records)
    blocks += collapsed("What the words mean", [{"facts": _GLOSSARY}])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page(f"Model immunization: {', '.join(studies)}", blocks).encode())
    return out


def group_blocks(rows: Sequence[Row], beside: Path, room: int) -> list[Block]:
    """Return everything about comparable records; the outcome comes first."""
    records, names = [row["record"] for row in rows], [row["label"] for row in rows]
    notes = list(dict.fromkeys(note for record in records for note in record["notes"]))
    blocks = leader_blocks(rows)
    blocks += collapsed("All metrics", [{"text": LEGEND}, _metrics_table(rows)])
    blocks += check_blocks(rows) + image_blocks(rows, beside, room)
    blocks += curve_blocks(records, names) + spectrum_blocks(records, names)
    blocks += pair_blocks(records, names) + transfer_blocks(records, names) + option_blocks(records)
    blocks += collapsed("Notes on the data", [{"list": notes}] if notes else [])
    each: list[Block] = [
        {"summary": f"{row['label']}: {row['outcome']}", "blocks": _record_blocks(row)}
        for row in rows
    ]
    title = "Provenance, tables and configuration"
    return blocks + collapsed(title, each if len(each) > 1 else each[0]["blocks"])


def _metrics_table(rows: Sequence[Row]) -> Block:
    """Return one row per metric and one column per method."""

    def cell(metric: Metric | None, name: str) -> str:
        text, note = measured(metric, name), (metric or {}).get("note") or ""
        return f"{text} {note}".strip() if text == UNMEASURED or len(rows) == 1 else text

    known = [name for row in rows for name in row["record"]["metrics"]]
    names = [n for n in dict.fromkeys([*columns(known), *known]) if n != "verdict"]
    lines = [
        [heading(name), *(cell(row["record"]["metrics"].get(name), name) for row in rows)]
        for name in names
    ]
    return {"table": [["metric", *(row["label"] for row in rows)], *lines], "label": "All metrics"}


def check_blocks(rows: Sequence[Row]) -> list[Block]:
    """Return tiles of the first method's checks; those of the others are collapsed."""
    groups_of_tiles: list[list[Block]] = []
    for row in rows:
        tiles = [
            _tile(check, len(row["record"]["seeds"]))
            for check in row["record"]["tables"].get("verdict", [])
        ]
        tiles.sort(key=lambda tile: bool(tile["word"] == "passes"))
        title = f"Checks of {row['label']}: {row['checks'][0]} of {row['checks'][1]} pass"
        groups_of_tiles += [[{"heading": title}, {"tiles": tiles}]] if tiles else []
    more = [block for group in groups_of_tiles[1:] for block in group]
    first = groups_of_tiles[0] if groups_of_tiles else []
    return first + collapsed(f"Checks of {counted(len(more) // 2, 'other method')}", more)


def _tile(check: dict[str, Any], seeds: int) -> dict[str, Any]:
    word = check_word(check)
    certain = ("significant" if check["sure"] else "not significant") if seeds > 2 else ""
    return {
        "word": word,
        "tone": TONES[word],
        "check": f"{check.get('concept') or check['side']}: {check['check']}",
        "required": check["required"],
        "measured": f"{bound(check)} {figure(check['value'])} {interval(check)}".strip(),
        "note": "; ".join(filter(None, (certain, check["note"]))),
    }


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
    missing: dict[str, list[str]] = {}  # why → images
    for row in rows:
        others: list[Block] = []
        for name, image in row["record"].get("images", {}).items():
            folder = getattr(row["record"], "folder", beside)
            source = _read_image(folder / image["path"], folder, image["sha256"], room)
            title = capitalized(name.partition("_")[2].replace("_", " ") or name)
            block = {
                "image": f"{row['label']}: {title}",
                "caption": image["caption"],
                "src": source,
            }
            if source.startswith("data:"):
                room -= len(source)
                is_open = name.startswith("comparison_") and not more
                (first if is_open else others).append(block)
            else:
                missing.setdefault(f"{row['label']}: {source}", []).append(image["path"])
        more += others
    blocks = [{"heading": "Images of both models after the attack"}, *first] if first else []
    blocks += collapsed(f"{len(more)} more image grids", more)
    return blocks + collapsed(
        f"{sum(map(len, missing.values()))} image grids not shown",
        [{"list": [f"{why}: {', '.join(names)}" for why, names in missing.items()]}]
        * bool(missing),
    )


def _read_image(path: Path, folder: Path, sha256: str, room: int) -> str:
    """Return an image as a data URL, or why it is not shown."""
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
        data = path.read_bytes() if is_inside else b""
    except OSError:
        return "not beside the record"
    if hashlib.sha256(data).hexdigest() != sha256 or not data.startswith(b"\x89PNG\r\n"):
        return "not the image that the record names (SHA-256 differs)"
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return source if len(source) <= room else "too large for this page"


# ---- records


def _record_blocks(row: Row) -> list[Block]:
    """Return troubles, tables, provenance and configuration of one record."""
    record = row["record"]
    result = outcome(record)
    troubles = [*result.details, *_troubles(record)]
    blocks: list[Block] = [{"text": result.headline, "style": "headline"}, {"list": troubles}]
    for name, lines in record["tables"].items():
        if lines and name not in _PLOTTED:
            left = f"{len(lines) - ROWS} more rows in the record."
            more = [{"text": left}] if len(lines) > ROWS else []
            blocks += collapsed(f"Table {name}", [{"table": _table(lines), "label": name}, *more])
    blocks += [{"heading": "Provenance", "level": 4}, {"facts": _provenance(record)}]
    config = json.dumps(record["config"], indent=2, ensure_ascii=False)
    return blocks + collapsed("Configuration", [{"code": config}])


def _table(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Return head and rows: what a row is about, then words, then figures."""
    keys = dict.fromkeys(key for row in rows for key in row)
    is_word = {key: any(isinstance(row.get(key), str) for row in rows) for key in keys}
    head = sorted(keys, key=lambda key: (key not in _ABOUT, not is_word[key]))
    return [head, *([row.get(key) for key in head] for row in rows[:ROWS])]


def _troubles(record: Record) -> list[str]:
    """Return everything that did not go well, as sentences."""
    error, cells = record["error"], record.get("cells", [])
    out = [f"{error['type']}: {error['message']} ({error['key']})"] if error else []
    totals = Counter(cell["stage"] for cell in cells)
    failed = Counter((c["stage"], c["status"], c["model"]) for c in cells if c["status"] != "ok")
    out += [
        f"{count} of {totals[stage]} stages {stage} {status}, {model or 'both models'}"
        for (stage, status, model), count in failed.items()
    ]
    skipped = record.get("skipped", {}).items()
    return out + [f"Metric {name} was skipped: {reason}" for name, reason in skipped]


def _provenance(record: Record) -> dict[str, Any]:
    p = record.get("provenance", {})
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
        "schema": record.get("schema"),
        "git": f"{p['git_sha']}{dirty}" if p.get("git_sha") else "no git checkout",
        "started": p.get("started"),
        "wall time": f"{p.get('wall_time_s', 0):,.0f} s",
        "peak memory": f"{p.get('peak_memory_mb', 0):,.0f} MB",
        "device": f"{p.get('device')}, {p.get('threads')} threads, host {p.get('host')}",
        "seeds": ", ".join(map(str, record["seeds"])),
        "attacks": ", ".join(record["attacks"]),
        "stages": f"{len(record.get('cells', []))} ({p.get('cache_hits', 0)} from the cache)",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        **{
            key.replace("_", " "): ", ".join(f"seed {s}: {v[:12]}" for s, v in values.items())
            for key, values in hashes.items()
        },
    }
