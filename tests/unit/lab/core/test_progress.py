"""Progress off a terminal: a line a minute in the log, none for short work."""

from __future__ import annotations

import logging

import pytest

from lab.cluster.status import last_stage
from lab.core import progress as module


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: False, raising=False)
    return now


def walked(clock, items, seconds, total=None):
    seen = []
    for item in module.progress(items, "train", total):
        seen.append(item)
        clock[0] += seconds
    return seen


def test_long_work_tells_the_log_once_a_minute_how_far_it_is_and_what_is_left(clock, caplog):
    caplog.set_level(logging.INFO)
    assert walked(clock, range(8), 25.0) == list(range(8))
    assert [r.getMessage() for r in caplog.records] == [
        "train: 3 of 8 in 01:15, about 02:05 left",
        "train: 6 of 8 in 02:30, about 00:50 left",
    ]


def test_short_work_is_silent(clock, caplog):
    caplog.set_level(logging.INFO)
    walked(clock, range(5), 10.0)
    assert not caplog.records


def test_status_reads_the_stage_or_how_far_it_is_from_the_log(tmp_path):
    line = "2026-01-01 00:00:00,000 INFO lab.core.progress: lora on neon: 9 of 35 in 01:01"
    (tmp_path / "run.log").write_text(f"an earlier line\n{line}\n")
    assert last_stage(tmp_path) == "lora on neon: 9 of 35 in 01:01"
