"""Trackers: what they write is read back from disk; none can stop a run or hold it up."""

import json
import os
import sqlite3
import struct
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lab import record as records
from lab.errors import UserError
from lab.tracking import Trackers, client, worker
from lab.types import Score, Scores

CONFIG = {
    "name": "study", "immunize": {"name": "kappa"}, "scenario": {"name": "house_price"}, "backbone": {"name": "linear"},
    "attacks": {"linear_probe": {}}, "seeds": [0],
}  # fmt: skip
WANDB = {"name": "wandb", "mode": "auto", "project": "p", "entity": None, "init_timeout_s": 5, "timeout_s": 90}


@pytest.fixture
def folder(tmp_path):
    """A run folder with a record in it."""
    scores = Scores(
        {"rir": Score(12.5, 10.0, 14.0, 3, "higher", "across_seeds")},
        {"loss": {"step": [0, 1, 2], "none": [3.0, 2.0, 1.0], "kappa": [3.0, None, 2.5],
                  "x": "step", "y": "loss", "log": ""}},
        {"pairs": [{"case": "a", "rir": 2.0}, {"case": "b", "rir": None}]},
    )  # fmt: skip
    body = {
        "schema": "1.0", "status": "ok", "attacks": ["linear_probe"], "seeds": [0], "config": {}, "notes": [],
        "name": "study/kappa", "scenario": "house_price", "backbone": "linear", "immunizer": "kappa",
        "error": None, "skipped": {}, "cells": [],
        "provenance": {"started": "2026-01-01T00:00:00+00:00", "wall_time_s": 1.0, "peak_memory_mb": 2.0, "host": "h",
                       "device": "cpu", "threads": 2, "python": "3.11", "versions": {}, "git_sha": None,
                       "git_dirty": None, "data_hash": {}, "weight_hash": {}, "cache_hits": 0, "cache_misses": 1},
        **records.scores_json([scores]),
    }  # fmt: skip
    records.write(body, tmp_path / "record.json")
    (tmp_path / "report.html").write_text("<html></html>")
    return tmp_path


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def track(folder, tracker, live=3):
    cfg = OmegaConf.create(CONFIG | {"paths": {"outputs": str(folder)}, "tracker": tracker})
    trackers = Trackers(cfg, folder)
    for step in range(live):
        trackers.log("immunize/c/seed0", step, {"rir": 1.0 + step, "bad": float("nan")})
    began = time.monotonic()
    trackers.finish(folder / "record.json", folder / "report.html")
    return time.monotonic() - began


def wandb_messages(path):
    """Records of an offline run file: a 7-byte header, then LevelDB log blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, last
            message = wandb_internal_pb2.Record()
            message.ParseFromString(parts)
            parts = b""
            yield message


def read_offline_run(folder):
    path = next(folder.rglob("offline-run-*/run-*.wandb"))
    run, history, summary = None, {}, {}
    for message in wandb_messages(path):
        if message.WhichOneof("record_type") == "run":
            run = message.run
        for item in message.history.item:
            key = item.key or ".".join(item.nested_key)
            history.setdefault(key, []).append(json.loads(item.value_json))
        for item in message.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return run, history, summary


def test_wandb_offline_without_a_key(folder, caplog):
    track(folder, {"wandb": WANDB})
    run, history, summary = read_offline_run(folder)
    assert (run.project, run.run_group, run.job_type) == ("p", "study", "house_price")
    assert run.display_name == "kappa on house_price"
    assert set(run.tags) == {"kappa", "linear", "linear_probe"}
    assert history["immunize/c/seed0/rir"] == [1.0, 2.0, 3.0]
    assert "immunize/c/seed0/bad" not in history
    assert history["curves/loss/none"] == [3.0, 2.0, 1.0]
    assert history["curves/loss/kappa"] == [3.0, 2.5]
    assert history["curves/loss/step"] == [0, 1, 2]
    assert history["tables/pairs.nrows"] == [2]
    assert history["images/loss.format"] == ["png"]
    assert (summary["rir"], summary["rir_low"], summary["rir_high"]) == (12.5, 10.0, 14.0)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_wandb_with_a_wrong_key_and_no_network_logs_offline(folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    track(folder, {"wandb": WANDB})
    _, history, _ = read_offline_run(folder)
    assert history["curves/loss/none"] == [3.0, 2.0, 1.0]
    log = (folder / "tracker-wandb.log").read_text()
    assert "logging offline" in log
    assert "0" * 40 not in "".join(p.read_text(errors="ignore") for p in folder.rglob("*") if p.is_file())


def test_trackio_and_wandb_at_once(folder, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    track(folder, {"wandb": WANDB, "trackio": {"name": "trackio", "project": "p", "timeout_s": 90}})
    database = sqlite3.connect(next((folder / "trackio").glob("*.db")))
    logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
    assert [m["curves/loss/none"] for m in logged if "curves/loss/none" in m] == [3.0, 2.0, 1.0]
    assert [m["rir"] for m in logged if "rir" in m] == [12.5]
    assert read_offline_run(folder)[0].project == "p"


FAKE = """
import sys, time
if {crash}:
    sys.exit("the service crashed")
for line in sys.stdin:
    pass
time.sleep({sleep})
"""


def fake_worker(tmp_path, monkeypatch, *, crash=False, sleep=0):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(crash=crash, sleep=sleep))
    real = client.subprocess.Popen
    monkeypatch.setattr(client.subprocess, "Popen", lambda command, **kw: real([sys.executable, str(script)], **kw))


def test_a_tracker_that_crashes_costs_a_warning(folder, tmp_path, monkeypatch, caplog):
    fake_worker(tmp_path, monkeypatch, crash=True)
    track(folder, {"wandb": WANDB}, live=3000)
    assert "tracker wandb failed" in caplog.text
    assert records.read(folder / "record.json")["status"] == "ok"


def test_a_tracker_that_hangs_is_ended_after_its_timeout(folder, tmp_path, monkeypatch, caplog):
    fake_worker(tmp_path, monkeypatch, sleep=60)
    waited = track(folder, {"wandb": WANDB | {"timeout_s": 1}})
    assert waited < 20
    assert "was ended" in caplog.text


def test_a_tracker_that_cannot_start_costs_a_warning(folder, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise OSError("no more processes")

    monkeypatch.setattr(client.subprocess, "Popen", refuse)
    track(folder, {"wandb": WANDB})
    assert "goes on without it" in caplog.text


def test_logging_never_waits_for_a_slow_tracker(folder, tmp_path, monkeypatch):
    fake_worker(tmp_path, monkeypatch, sleep=0)
    monkeypatch.setattr(client, "_QUEUE", 5)
    cfg = OmegaConf.create(CONFIG | {"tracker": {"wandb": WANDB | {"timeout_s": 2}}})
    trackers = Trackers(cfg, folder)
    began = time.monotonic()
    for step in range(20_000):
        trackers.log("x", step, {"v": 1.0})
    assert time.monotonic() - began < 5
    trackers.finish(folder / "record.json", folder / "report.html")


def test_a_killed_run_ends_the_tracker_as_crashed(folder, monkeypatch):
    cfg = OmegaConf.create(CONFIG | {"tracker": {"wandb": WANDB}})
    trackers = Trackers(cfg, folder)
    trackers.log("x", 0, {"v": 1.0})
    child = trackers._children[0]
    child._queue.put(None)  # what the end of the parent does: stdin closes without `finish`
    child._thread.join(20)
    assert child._process.wait(30) == 0
    codes = [m.exit.exit_code for m in wandb_messages(next(folder.rglob("run-*.wandb"))) if m.HasField("exit")]
    assert codes == [1]


def test_timeout_must_be_positive(folder):
    with pytest.raises(UserError, match=r"tracker\.wandb\.timeout_s"):
        track(folder, {"wandb": WANDB | {"timeout_s": 0}})


def test_the_worker_module_knows_both_backends():
    assert set(worker.BACKENDS) == {"wandb", "trackio"}
    assert Path(worker.__file__).is_file()
    assert os.environ.get("WANDB_API_KEY") is None
