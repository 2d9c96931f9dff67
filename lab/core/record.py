"""One immutable record per run: built, hashed, validated on write and on read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from omegaconf import DictConfig, OmegaConf

from lab.core.cache import write_atomically
from lab.core.errors import UserError
from lab.core.images import png
from lab.core.migration import migrate
from lab.core.types import ImageGrid, Score, Scores, SeedScore

SCHEMA_VERSION = "2.0"  # 1.x: other names and no ``bound``; `lab.core.migration` brings them to 2.0
READABLE = ("1.0", "1.1", "1.2", "1.3", SCHEMA_VERSION)
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")
# what may differ between two runs of the same thing
_VOLATILE_CONFIG = (
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
    "push_to",
    "export",
    "launch",
    "search",
)

Record = dict[str, Any]


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))


def validate(record: Record, source: str) -> None:
    """Check against the schema.

    Raises:
        UserError: names the first violation and, for another version, what to do.
    """
    version = record.get("schema")
    if version not in READABLE:
        told = f"has schema {version!r}, none of {', '.join(READABLE)}: run it again."
        raise UserError("records", source, told)
    error = jsonschema.exceptions.best_match(_validator().iter_errors(migrate(record)))
    if error is not None:
        where = "/".join(map(str, error.absolute_path)) or "the top level"
        raise UserError("records", source, f"is no valid record: at {where}: {error.message[:300]}")


def clean(value: Any) -> Any:
    """JSON without nan and inf: they become null."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def scores_json(scores: Iterable[Scores]) -> dict[str, Any]:
    """``metrics``, ``curves`` and ``tables`` of several metric families as one mapping each.

    Raises:
        ValueError: two families use one name, or a missing value has no reason.
    """
    out: dict[str, dict[str, Any]] = {"metrics": {}, "curves": {}, "tables": {}}
    for family in scores:
        for part in out:
            for name, item in getattr(family, part).items():
                if name in out[part]:
                    raise ValueError(f"two metric families write {part}.{name}")
                out[part][name] = clean(_plain(item) if part == "metrics" else item)
    for name, item in out["metrics"].items():
        if item["value"] is None and not item["note"]:
            raise ValueError(f"metric {name} has no value and no reason")
    return out


def _plain(score: Score) -> dict[str, Any]:
    return {f.name: getattr(score, f.name) for f in dataclasses.fields(Score)}


def seed_values(scores: Iterable[Scores], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row per metric that has a value in every seed: ``metric`` and a column per seed; none for
    a single seed.
    """
    if len(seeds) < 2:
        return []
    found = {
        name: item
        for family in scores
        for name, item in family.metrics.items()
        if isinstance(item, SeedScore)
    }
    return [
        {"metric": name, **{str(s): v for s, v in zip(seeds, item.per_seed, strict=True)}}
        for name, item in found.items()
        if len(item.per_seed) == len(seeds)
    ]


def images_of(scores: Iterable[Scores]) -> dict[str, ImageGrid]:
    """The pictures of several metric families as one mapping.

    Raises:
        ValueError: two families use one name.
    """
    out: dict[str, ImageGrid] = {}
    for family in scores:
        for name, picture in family.images.items():
            if name in out:
                raise ValueError(f"two metric families write images.{name}")
            out[name] = picture
    return out


def write_images(folder: Path, images: dict[str, ImageGrid]) -> dict[str, dict[str, str]]:
    """Write each picture to ``folder/images/NAME.png``; returns a record's ``images``, paths
    relative to ``folder``.

    Raises:
        ValueError: a name that is no snake case.
    """
    out = {}
    for name, picture in images.items():
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"image {name!r}: names are snake case")
        data, path = png(picture), Path("images") / f"{name}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / path, data)
        out[name] = {
            "path": path.as_posix(),
            "caption": picture.caption,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    return out


def _lasting(config: Any) -> dict[str, Any]:
    """What of a configuration says which run it is."""
    return {k: v for k, v in config.items() if k not in _VOLATILE_CONFIG}


def content_hash(record: Record) -> str:
    """SHA-256 over what two runs of the same thing share: no times, host, memory, paths or cache
    keys.
    """
    config = _lasting(record["config"])
    cells = [
        {k: v for k, v in cell.items() if k not in ("key", "seconds", "weights")}
        for cell in record["cells"]
    ]
    kept = (
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
    )
    body = {k: record[k] for k in (*kept, "notes", "error", "skipped")} | {
        "config": config,
        "cells": cells,
    }
    body |= {k: record["provenance"][k] for k in ("data_hash", "weight_hash")}
    if "images" in record:  # absent in 1.0, whose hashes stay as they are
        body["images"] = {
            name: {k: v for k, v in image.items() if k != "path"}
            for name, image in record["images"].items()
        }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write(record: Record, path: Path) -> None:
    """Validate and write once."""
    record["content_hash"] = content_hash(record)
    validate(record, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def refuse_other(path: Path, cfg: DictConfig) -> None:
    """A finished record stays where it is unless the same configuration is run again.

    Raises:
        UserError: ``path`` holds the record of another configuration, which a run there would
            replace.
    """
    if not path.is_file():
        return
    try:
        other = read(path)
    except UserError:  # of another version, or cut off: nothing that somebody could still use
        return
    mine = clean(OmegaConf.to_container(cfg, resolve=True))
    if other["status"] in ("ok", "diverged") and _lasting(mine) != _lasting(other["config"]):
        told = (
            f"holds the record of another run ({other['name']}, "
            f"{other['content_hash'][:8]}); choose another folder."
        )
        raise UserError("hydra.run.dir", path.parent, told)


class Stored(dict[str, Any]):
    """A record that was read, with the ``folder`` that its pictures lie below."""

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
    """The records among ``paths`` that can be read, and what is wrong with the others."""
    found: list[Stored] = []
    broken: list[UserError] = []
    for path in paths:
        try:
            found.append(read(path))
        except UserError as error:
            broken.append(error)
    return found, broken


def distinct(found: Iterable[Stored]) -> list[Stored]:
    """Of records with one content hash, a command that was repeated, the one that began last, where
    the first stood.
    """
    newest: dict[str, Stored] = {}
    for record in found:
        other = newest.get(record["content_hash"])
        if other is None or record["provenance"]["started"] > other["provenance"]["started"]:
            newest[record["content_hash"]] = record
    return list(newest.values())


def find(places: Iterable[str], default: Path) -> list[Path]:
    """Record files named by ``places`` (files or folders), or below ``default`` when there are
    none.

    In folders these are called ``record.json``; below a folder ``records`` any name will do.
    """
    given = [Path(p) for p in places]
    chosen = given or [default]
    paths: list[Path] = []
    for place in chosen:
        if place.is_dir():
            paths.extend(
                sorted(p for p in place.rglob("*.json") if p.name == "record.json" or _is_kept(p))
            )
        elif place.is_file():
            paths.append(place)
        elif given:
            raise UserError(
                "records",
                place,
                "does not exist: give record.json files or folders that hold them.",
            )
    if not paths:
        raise UserError(
            "records",
            " ".join(map(str, chosen)),
            "holds no record.json: run `python run.py` first.",
        )
    return list(dict.fromkeys(paths))


def _is_kept(path: Path) -> bool:
    """Whether ``path`` lies below a folder ``records`` and holds a record, in whatever state."""
    if "records" not in path.parts:
        return False
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(content, dict) and {"schema", "content_hash"} <= content.keys()
