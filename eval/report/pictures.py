"""Pictures of records as part of the page: read, checked against their hash, embedded."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.report.words import Record

LIMIT = 24_000_000  # bytes of pictures in one page; the others are named
_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Picture = dict[
    str, Any
]  # title, caption, alt; src, width, height, or missing: why there is no picture


def pictures(records: Sequence[Record], labels: Sequence[str], beside: Path) -> list[Picture]:
    """Every picture of ``records``; one that is not there, or not what the record says, becomes a
    sentence.

    Args:
        beside: where the pictures of a record lie that was not read from a file (it is being
            written there).
    """
    out: list[Picture] = []
    room = LIMIT
    for record, label in zip(records, labels, strict=True):
        for name, image in record.get("images", {}).items():
            title = name.replace("_", " ")
            shown = {
                "title": title if len(records) == 1 else f"{label}: {title}",
                "caption": image["caption"],
            }
            shown["alt"] = f"Picture grid {shown['title']}. {image['caption']}".strip()
            found = _embedded(getattr(record, "folder", beside), image)
            room -= len(found.get("src", ""))
            if room < 0:
                found = {
                    "missing": f"Left out to keep this page small: {image['path']} lies "
                    "beside the record."
                }
            out.append(shown | found)
    return out


def _embedded(folder: Path, image: dict[str, str]) -> dict[str, Any]:
    path = folder / image["path"]
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        data = path.read_bytes() if inside else b""
    except OSError:
        return {"missing": f"{image['path']} is not beside the record."}
    if (
        hashlib.sha256(data).hexdigest() != image["sha256"]
        or data[:8] != _SIGNATURE
        or len(data) < 24
    ):
        return {
            "missing": f"{image['path']} is not the picture that the record names (SHA-256 "
            "differs)."
        }
    width, height = struct.unpack(">II", data[16:24])
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"missing": "", "src": source, "width": width, "height": height}
