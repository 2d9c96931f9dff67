"""One immutable record per run: built, hashed, validated on write and on read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from omegaconf import DictConfig, OmegaConf

from lab.core.errors import UserError, as_user_error
from lab.core.hashing import write_atomically
from lab.core.images import png
from lab.core.migration import migrate
from lab.core.types import ImageGrid, Score, Scores

SCHEMA_VERSION = "2.5"  # older records: `lab.core.migration`
READABLE = ("1.0", "1.1", "1.2", "1.3", "2.0", "2.1", "2.2", "2.3", "2.4", SCHEMA_VERSION)
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")
# what may differ between two runs of the same thing
VOLATILE_CONFIG = (
    "paths",
    "tracker",
    "force",
    "dry_run",
    "action",
    "records",
    "threads",
    "sweep",
    "name",
    "path",
    "concepts",
    "group",
    "kind",
    "fail_on",
    "verbose",
    "remark",
    "push_to",  # of records that were made when the option existed
    "export",
    "launch",
    "search",
)
_LASTING = (
    "schema",
    "status",
    "scenario",
    "backbone",
    "immunizer",
    "attacks",
    "seeds",
    "metrics",
    "curves",
    "tables",
    "notes",
    "error",
    "skipped",
)

Record = dict[str, Any]


@cache
def _schema() -> dict[str, Any]:
    return json.loads(SCHEMA_FILE.read_text())


def validate(record: Record, source: str) -> None:
    """Check against the schema.

    Raises:
        UserError: names the first violation and, for another version, what to do.
    """
    version = record.get("schema") if isinstance(record, dict) else None
    if version not in READABLE:
        fix = f"has schema {version!r}, none of {', '.join(READABLE)}: run it again."
        raise UserError("records", source, fix)
    with as_user_error("records", source, "is no valid record"):
        migrated = migrate(record)
    if reason := violation(migrated, list(_schema()["required"])):
        raise UserError("records", source, f"is no valid record: at {reason}")


def violation(part: Record, required: Sequence[str] = ()) -> str | None:
    """Return where and how ``part`` of a record violates the schema, None where it does not."""
    validator = jsonschema.Draft202012Validator(_schema() | {"required": required})
    error = jsonschema.exceptions.best_match(validator.iter_errors(part))
    if error is None:
        return None
    return f"{'/'.join(map(str, error.absolute_path)) or 'the top level'}: {error.message[:300]}"


def clean(value: Any) -> Any:
    """Return ``value`` as JSON has it: texts as keys, lists, and null for nan and inf."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def merged(scores: Iterable[Scores], part: str) -> dict[str, Any]:
    """Return one part of several metric families, e.g. ``images``, as one mapping.

    Raises:
        ValueError: two families use one name.
    """
    out: dict[str, Any] = {}
    for family in scores:
        if twice := out.keys() & getattr(family, part).keys():
            raise ValueError(f"two metric families write {part}.{min(twice)}")
        out |= getattr(family, part)
    return out


def scores_json(scores: Sequence[Scores]) -> dict[str, Any]:
    """Return ``metrics``, ``curves`` and ``tables`` of several metric families.

    Raises:
        ValueError: two families use one name.
    """
    out = {part: merged(scores, part) for part in ("metrics", "curves", "tables")}
    # the table `seed_values` has the values of each seed
    names = [field.name for field in dataclasses.fields(Score) if field.name != "per_seed"]
    for name, item in out["metrics"].items():
        out["metrics"][name] = {field: getattr(item, field) for field in names}
    return clean(out)


def seed_values(scores: Sequence[Scores], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return one row per metric that has a value in every seed; none for a single seed.

    A row is ``metric`` and a column per seed.
    """
    return [
        {"metric": name, **dict(zip(map(str, sorted(seeds)), item.per_seed, strict=True))}
        for name, item in merged(scores, "metrics").items()
        if len(item.per_seed) == len(seeds) > 1
    ]


def write_images(folder: Path, images: dict[str, ImageGrid]) -> dict[str, dict[str, str]]:
    """Write each grid to ``folder/images/NAME.png``; return a record's ``images``.

    Paths are relative to ``folder``.
    """
    out = {}
    for name, grid in images.items():
        data, path = png(grid), Path("images") / f"{name}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / path, data)
        sha = hashlib.sha256(data).hexdigest()
        out[name] = {"path": path.as_posix(), "caption": grid.caption, "sha256": sha}
    return out


def _lasting(config: Any) -> dict[str, Any]:
    """Return what of a configuration says which run it is."""
    return {k: v for k, v in config.items() if k not in VOLATILE_CONFIG}


def content_hash(record: Record) -> str:
    """Return the SHA-256 of what two runs of the same thing share.

    No times, host, memory, paths or cache keys.
    """
    name = "stages" if "stages" in record else "cells"  # up to schema 2.4
    stages = [
        {k: v for k, v in stage.items() if k not in ("key", "seconds", "weights")}
        for stage in record[name]
    ]
    body = {
        **{key: record[key] for key in _LASTING},
        **{key: record["provenance"][key] for key in ("data_hash", "weight_hash")},
        "config": _lasting(record["config"]),
        name: stages,
    }
    if "images" in record:  # absent in 1.0, whose hashes stay as they are
        body["images"] = {
            name: {k: image[k] for k in ("caption", "sha256")}
            for name, image in record["images"].items()
        }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write(record: Record, path: Path) -> None:
    """Validate and write once."""
    record["content_hash"] = content_hash(record)
    validate(record, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def is_immunized(record: Record) -> bool:
    """Return whether the run had an immunizer; without one it holds the baseline alone."""
    return bool(record["immunizer"] != "none")


def refuse_other(path: Path, cfg: DictConfig) -> None:
    """A finished record stays where it is unless the same configuration is run again.

    Raises:
        UserError: ``path`` holds the record of another configuration, which a run there would
            replace.
    """
    new = clean(OmegaConf.to_container(cfg, resolve=True))
    others, _ = readable([path] if path.is_file() else [])  # a damaged one is of no use
    for other in others:
        if other["status"] in ("ok", "diverged") and _lasting(new) != _lasting(other["config"]):
            fix = f"holds the record of another run ({other['name']}); choose another folder."
            raise UserError("hydra.run.dir", path.parent, fix)


class Stored(dict[str, Any]):
    """A record that was read, with the ``folder`` that its images lie below."""

    def __init__(self, content: Record, folder: Path) -> None:
        super().__init__(content)
        self.folder = folder


def read(path: Path) -> Stored:
    """Read and validate one record; its content hash must match its content.

    Raises:
        UserError: unreadable, invalid or altered.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError("records", path, f"cannot be read as JSON ({error}).") from error
    validate(record, str(path))
    if content_hash(record) != record["content_hash"]:
        raise UserError(
            "records", path, "was altered after it was written (content_hash does not match)."
        )
    return Stored(migrate(record), path.parent)


def readable(paths: Iterable[Path]) -> tuple[list[Stored], list[UserError]]:
    """Return the records among ``paths`` that can be read, and what is wrong with the others."""
    valid, errors = [], []
    for path in paths:
        try:
            valid.append(read(path))
        except UserError as error:
            errors.append(error)
    return valid, errors


def distinct(records: Iterable[Stored]) -> list[Stored]:
    """Return records without repetitions: of equal content hashes, the run that started last."""
    everything = list(records)
    by_start = sorted(everything, key=lambda record: record["provenance"]["started"])
    newest = {record["content_hash"]: record for record in by_start}
    return [record for record in everything if newest[record["content_hash"]] is record]


def find(places: Iterable[str], default: Path) -> list[Path]:
    """Return the record files named by ``places``, or below ``default`` when there are none.

    In folders these are called ``record.json``; below a folder ``records`` any name will do.
    """
    chosen = [Path(place) for place in places] or [default]
    paths: list[Path] = []
    for place in chosen:
        if not place.exists() and place != default:
            fix = "does not exist: give record.json files or folders that hold them."
            raise UserError("records", place, fix)
        below = [path for path in sorted(place.rglob("*.json")) if _is_record(path)]
        paths += [place] if place.is_file() else below
    if not paths:
        where = " ".join(map(str, chosen))
        raise UserError("records", where, "holds no record.json: run `python run.py` first.")
    return list(dict.fromkeys(paths))


def _is_record(path: Path) -> bool:
    if path.name == "record.json" or "records" not in path.parts:
        return path.name == "record.json"
    text = path.read_text(encoding="utf-8", errors="replace")
    return '"schema"' in text and '"provenance"' in text
