"""The checks of tests/benchmarks/first_run.py, on records that meet the bar of the default study
and that miss it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import pytest
from benchmarks.first_run import LIMIT, printed, recorded, told

from eval.report.outcomes import outcome
from lab.core.types import Score

FINE: dict[str, Any] = {
    "status": "ok",
    "error": None,
    "immunizer": "mima_deep_quick",
    "config": {"experiment_name": "first_run"},
    "tables": {},
    "seeds": [0],
    "metrics": {
        "verdict": asdict(Score(0.0, note="targets not held back")),
        "msgr_clip": asdict(Score(0.3, 0.1, 0.5, interval="within_seed")),
    },
}


def write(folder, *, body=FINE, grid=b"pixels", **changes):
    (folder / "grid.png").write_bytes(grid)
    (folder / "report.html").write_text("<html>")
    images = {
        "g": {"path": "grid.png", "sha256": hashlib.sha256(b"pixels").hexdigest(), "caption": ""}
    }
    record = {**body, "images": images, **changes}
    (folder / "record.json").write_text(json.dumps(record))
    return record


def failed(folder):
    return [
        name.partition(" (")[0]
        for name, fine in recorded(folder / "record.json").items()
        if not fine
    ]


def test_a_run_that_meets_the_bar(tmp_path, capsys) -> None:
    record = write(tmp_path)
    assert failed(tmp_path) == []
    assert told(LIMIT - 1, recorded(tmp_path / "record.json")) == 0
    assert told(LIMIT + 1, recorded(tmp_path / "record.json")) == 1
    assert (
        "301.0 s, 1.00 of 300 s\nFAILED  under 300 s\nok      status ok" in capsys.readouterr().out
    )
    out = f"✗ {outcome(record).headline}\nreport: report.html\nrecord: record.json\n"
    assert set(printed(out, tmp_path).values()) == {True}
    assert not printed(out + "more\n", tmp_path)["last line names the record"]
    assert set(printed("", tmp_path).values()) == {False}


def protection(**changes):
    metrics = FINE["metrics"]
    return {"metrics": {**metrics, "msgr_clip": {**metrics["msgr_clip"], **changes}}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"status": "diverged"}, "status ok"),
        ({"config": {"experiment_name": "relearn"}}, "it is the default study"),
        (protection(low=-0.01), "msgr_clip.low > 0"),
        (protection(low=None), "msgr_clip.low > 0"),
        (protection(interval="point"), "its interval is within_seed"),
        ({"images": {}}, "picture grids as recorded"),
        ({"grid": b"others"}, "picture grids as recorded"),
        ({"metrics": {**FINE["metrics"], "verdict": None}}, "verdict has a value"),
    ],
)
def test_a_run_that_misses_it(tmp_path, changes, told) -> None:
    write(tmp_path, **changes)
    assert failed(tmp_path) == [told]
