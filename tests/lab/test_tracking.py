"""Trackers: what they write is read back from disk; none can stop a run or hold it up."""

import json
import logging
import os
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf
from PIL import Image

from lab import record as records
from lab.errors import UserError
from lab.tracking import Trackers, client, views, worker
from lab.tracking.wandb_backend import NOTICE, WandbBackend
from lab.types import Score, Scores

CONFIG = {
    "name": "study", "immunize": {"name": "kappa"}, "scenario": {"name": "house_price"}, "backbone": {"name": "linear"},
    "attacks": {"linear_probe": {}}, "seeds": [0],
}  # fmt: skip
WANDB = {"name": "wandb", "mode": "auto", "project": "p", "entity": None, "init_timeout_s": 5, "timeout_s": 300}
TRACKIO = {"name": "trackio", "project": "p", "timeout_s": 300}
KEY = "5ec2e7" * 6 + "c0de"  # 40 characters that occur nowhere else


def run_folder(tmp_path):
    """Makes ``tmp_path`` a run folder with a record in it."""
    scores = Scores(
        {"rir": Score(12.5, 10.0, 14.0, 3, "higher", "across_seeds")},
        {"loss": {"step": [0, 1, 2], "none": [3.0, 2.0, 1.0], "kappa": [3.0, None, 2.5],
                  "x": "steps of the attack", "y": "loss", "log": ""},
         "sgr": {"step": [2, 4], "kappa": [0.2, 0.3], "kappa:low": [0.1, 0.2], "kappa:high": [0.3, 0.4],
                 "x": "steps of the attack", "y": "SGR", "log": ""},
         "kappa_benign": {"step": [0, 10], "kappa": [9.0, 4.0], "x": "immunization step", "y": "κ", "log": "y"}},
        {"pairs": [{"case": "a", "rir": 2.0}, {"case": "b", "rir": None}]},
    )  # fmt: skip
    weights = tmp_path / "cache" / "immunize" / "12" / "1234"
    weights.mkdir(parents=True)
    (weights / "tensors.safetensors").write_bytes(b"weights")
    (weights / "meta.json").write_text(json.dumps({"sha256": {"tensors.safetensors": "ab" * 32}}))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 4)).save(tmp_path / "images" / "grid.png")
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- immunize=kappa\n- immunize.eta=0.05\n- seeds=[0]\n")
    cell = {"stage": "immunize", "arm": "kappa", "case": "c", "seed": 0, "attack": None, "task": None, "key": "1234"}
    body = {
        "schema": "1.1", "status": "ok", "attacks": ["linear_probe"], "seeds": [0], "notes": [],
        "config": {"paths": {"cache": str(tmp_path / "cache")}},
        "images": {"grid": {"path": "images/grid.png", "caption": "a grid", "sha256": "0" * 64}},
        "name": "study/kappa", "scenario": "house_price", "backbone": "linear", "immunizer": "kappa",
        "error": None, "skipped": {}, "cells": [{**cell, "status": "ok"}],
        "provenance": {"started": "2026-01-01T00:00:00+00:00", "wall_time_s": 1.0, "peak_memory_mb": 2.0, "host": "h",
                       "device": "cpu", "threads": 2, "python": "3.11", "versions": {}, "git_sha": None,
                       "git_dirty": None, "data_hash": {}, "weight_hash": {}, "cache_hits": 0, "cache_misses": 1},
        **records.scores_json([scores]),
    }  # fmt: skip
    records.write(body, tmp_path / "record.json")
    (tmp_path / "report.html").write_text("<html></html>")
    return tmp_path


def forget_key(monkeypatch, home):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(home / "no-netrc"))
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture
def folder(tmp_path):
    return run_folder(tmp_path)


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    forget_key(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run that W&B and trackio have logged offline, and whether the run warned."""
    home = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch, warnings_of(client.log) as warned:
        forget_key(patch, home)
        patch.setenv("TRACKIO_DIR", str(home / "trackio"))
        track(run_folder(home), {"wandb": WANDB, "trackio": TRACKIO})
    assert not warned
    return home


@contextmanager
def warnings_of(log):
    """Messages of ``log`` from a warning on."""
    handler, found = logging.Handler(logging.WARNING), []
    handler.emit = found.append
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)


def track(folder, tracker, live=3):
    cfg = OmegaConf.create(CONFIG | {"paths": {"outputs": str(folder)}, "tracker": tracker})
    trackers = Trackers(cfg, folder)
    for step in range(live):
        trackers.log("immunize/c/seed0", step, {"rir": 1.0 + step, "bad": float("nan")})
    began = time.monotonic()
    trackers.finish(folder / "record.json", folder / "report.html")
    return time.monotonic() - began


def wandb_messages(path):
    """Records of an offline run file: a 7-byte header, then LevelDB log blocks of 32 KiB.

    wandb no longer has a reader in Python; the `DataStore` of its 0.19.11 finds the same messages in these files.
    """
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


def read_offline_run(folder, stage):
    """(run, history, summary, config, artifacts) of the offline run of one job type."""
    for path in sorted(folder.rglob("offline-run-*/run-*.wandb")):
        run, history, summary, config, artifacts = None, {}, {}, {}, []
        for message in wandb_messages(path):
            kind = message.WhichOneof("record_type")
            run = message.run if kind == "run" else run
            artifacts += [message.artifact] if kind == "artifact" else []
            artifacts += [message.request.log_artifact.artifact] if message.request.HasField("log_artifact") else []
            for item in [*message.run.config.update, *message.config.update]:
                config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            for item in message.history.item:
                key = item.key or ".".join(item.nested_key)
                history.setdefault(key, []).append(json.loads(item.value_json))
            for item in message.summary.update:
                summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        if run.job_type == stage:
            return run, history, summary, config, artifacts
    raise AssertionError(f"no offline run of {stage}")


@pytest.mark.slow
def test_wandb_offline_without_a_key(offline):
    folder = offline
    runs = {stage: read_offline_run(folder, stage) for stage in ("immunize", "attack", "eval")}
    assert len(list(folder.rglob("offline-run-*"))) == 3
    for stage, (run, _, _, config, _) in runs.items():
        assert (run.project, run.run_group, run.job_type) == ("p", "house_price", stage)
        assert run.display_name == f"kappa eta=0.05 on house_price · {stage}"
        assert set(run.tags) == {"study", "kappa", "linear", "linear_probe"}
        assert run.run_id == views.run_id(folder, stage)
        assert config["immunize"] == {"name": "kappa"}
        assert "tracker" not in config


@pytest.mark.slow
def test_curves_of_a_stage_share_one_axis_and_do_not_name_the_immunizer(offline):
    folder = offline
    _, live, _, _, _ = read_offline_run(folder, "immunize")
    assert live["immunize/c/seed0/rir"] == [1.0, 2.0, 3.0]
    assert "immunize/c/seed0/bad" not in live
    assert live["immunize/step"] == [0, 1, 2, 0, 10]
    assert live["immunize/kappa_benign/immunized"] == [9.0, 4.0]
    _, history, _, _, _ = read_offline_run(folder, "attack")
    assert history["attack/step"] == [0, 1, 2, 4]
    assert history["attack/loss/control"] == [3.0, 2.0, 1.0]
    assert history["attack/loss/immunized"] == [3.0, 2.5]
    assert history["attack/sgr/immunized_low"] == [0.1, 0.2]
    path = next(p for p in folder.rglob("*.wandb") if p.stem.endswith("-attack"))
    defined = [m.metric for m in wandb_messages(path) if m.HasField("metric")]
    assert {(m.glob_name or m.name, m.step_metric) for m in defined} >= {("attack/*", "attack/step")}


@pytest.mark.slow
def test_figures_tables_pictures_and_references_are_in_the_eval_run(offline):
    folder = offline
    _, history, summary, _, artifacts = read_offline_run(folder, "eval")
    assert (summary["rir"], summary["rir_low"], summary["rir_high"]) == (12.5, 10.0, 14.0)
    assert summary["status"] == "ok"
    assert summary["content_hash"] == records.read(folder / "record.json")["content_hash"]
    assert history["tables/pairs.nrows"] == [2]
    assert history["tables/metrics.nrows"] == [1]
    assert history["plots/loss.format"] == ["png"]
    assert (history["images/grid.width"], history["images/grid.caption"]) == ([8], ["a grid"])
    found = {a.type: a for a in artifacts}
    entries = {e.path: e for e in found["record"].manifest.contents}
    assert set(entries) == {"record.json", "report.html", "images/grid.png"}
    assert entries["record.json"].ref == (folder / "record.json").as_uri()
    weights = found["immunized-weights"]
    assert [e.path for e in weights.manifest.contents] == ["c/seed0.safetensors"]
    assert json.loads(weights.metadata) == {"sha256": {"c/seed0": "ab" * 32}}


@pytest.mark.slow
def test_two_records_overlay_in_the_same_panels(folder, tmp_path):
    record = records.read(folder / "record.json")
    other = dict(record, immunizer="mima")
    other["curves"] = {"loss": {**record["curves"]["loss"], "mima": [3.0, 2.9, 2.8]}}
    del other["curves"]["loss"]["kappa"]
    keys = [{k for _, values in views.curve_rows(r, "attack") for k in values} for r in (record, other)]
    assert keys[0] & keys[1] == {"loss/control", "loss/immunized"}


@pytest.mark.slow
def test_a_failed_run_is_marked_in_every_stage(folder):
    body = dict(records.read(folder / "record.json"), status="failed", metrics={}, curves={}, tables={}, images={})
    body["error"] = {"type": "ValueError", "message": "no", "key": None, "last_good_step": None}
    records.write(body, folder / "record.json")
    track(folder, {"wandb": WANDB})
    exits = [m.exit.exit_code for p in folder.rglob("run-*.wandb") for m in wandb_messages(p) if m.HasField("exit")]
    assert exits == [1, 1]  # immunize and eval; nothing was attacked


@pytest.mark.slow
def test_wandb_with_a_wrong_key_and_no_network_logs_offline_and_says_so(folder, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SERVICE", "3-1-tcp-localhost-9")  # of a W&B in this very process: not the tracker's
    track(folder, {"wandb": WANDB})
    assert read_offline_run(folder, "attack")[1]["attack/loss/control"] == [3.0, 2.0, 1.0]
    log = folder / "tracker-wandb.log"
    assert log.read_text().count("logged offline") == 1
    (told,) = [r.getMessage() for r in caplog.records if r.name == client.log.name]
    for part in ("cannot be reached or refuses the key (CommError)", "WANDB_API_KEY", "tracker.wandb.mode=offline",
                 f"`wandb sync {folder}/wandb/offline-run-*`", str(log)):  # fmt: skip
        assert part in told
    assert KEY not in caplog.text
    assert KEY not in "".join(p.read_text(errors="ignore") for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_trackio_has_the_same_view(offline):
    database = sqlite3.connect(next((offline / "trackio").glob("*.db")))
    logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
    key = "attack/loss/control"
    assert [m[key] for m in logged if key in m] == [3.0, 2.0, 1.0]
    assert [m["rir"] for m in logged if "rir" in m] == [12.5]
    configs = [json.loads(row[0]) for row in database.execute("select config from configs")]
    assert [c["_Group"] for c in configs] == ["house_price"]


CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


def dashboard(folder, port):
    """trackio's local dashboard in a process of its own."""
    code = "import sys, trackio; trackio.show('p', open_browser=False, block_thread=True, server_port=int(sys.argv[1]))"
    env = os.environ | {"TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder)}
    return subprocess.Popen([sys.executable, "-c", code, str(port)], env=env, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_dashboard_of_trackio_shows_the_run_in_a_browser(offline, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = dashboard(offline, port)
    address = f"http://127.0.0.1:{port}/?project=p"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--virtual-time-budget=20000", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", address,
    ]  # fmt: skip
    try:
        assert waits_for(lambda: process.poll() is not None or answers(address)), "the dashboard does not start"
        assert process.poll() is None
        page = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    finally:
        process.kill()
        process.wait()
    assert "kappa eta=0.05 on house_price" in page
    assert "attack/loss" in page


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def waits_for(condition, seconds=300):
    """Whether ``condition`` comes true; machines that run tests may be slow."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())


@pytest.mark.slow
def test_wandbs_service_killed_in_the_middle_costs_a_warning_at_most(folder, caplog):
    cfg = OmegaConf.create(CONFIG | {"tracker": {"wandb": WANDB | {"timeout_s": 60}}})
    before = (folder / "record.json").read_bytes()
    trackers = Trackers(cfg, folder)
    for step in range(50):
        trackers.log("immunize/c/seed0", step, {"rir": 1.0 + step})
    worker_process = psutil.Process(trackers._children[0]._process.pid)

    def services():
        return [p for p in worker_process.children(recursive=True) if "wandb-core" in p.name()]

    def logged():
        return [p for p in folder.rglob("run-*.wandb") if b"seed0/rir" in p.read_bytes()]

    assert waits_for(lambda: services() and logged())
    for service in services():
        service.kill()
    trackers.log("immunize/c/seed0", 50, {"rir": 0.0})
    began = time.monotonic()
    trackers.finish(folder / "record.json", folder / "report.html")
    assert time.monotonic() - began < 120
    assert "tracker wandb" in caplog.text
    assert "the record is complete" in caplog.text
    assert (folder / "record.json").read_bytes() == before
    history = [i for p in logged() for m in wandb_messages(p) for i in m.history.item]
    assert any("seed0/rir" in (item.key or ".".join(item.nested_key)) for item in history), "what was logged is lost"


FAKE = """
import sys, time
if {fallback}:
    print("a line of W&B's own", "{notice}logged offline", "another one", sep="\\n", file=sys.stderr, flush=True)
if {crash}:
    sys.exit("the service crashed")
for line in sys.stdin:
    pass
time.sleep({sleep})
"""


def fake_worker(tmp_path, monkeypatch, *, crash=False, sleep=0, fallback=False):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(crash=crash, sleep=sleep, fallback=fallback, notice=NOTICE))
    real = client.subprocess.Popen
    monkeypatch.setattr(client.subprocess, "Popen", lambda command, **kw: real([sys.executable, str(script)], **kw))


def test_a_tracker_that_crashes_costs_a_warning(folder, tmp_path, monkeypatch, caplog):
    fake_worker(tmp_path, monkeypatch, crash=True)
    track(folder, {"wandb": WANDB}, live=3000)
    assert "tracker wandb: failed" in caplog.text
    assert records.read(folder / "record.json")["status"] == "ok"


def test_a_tracker_that_hangs_is_ended_after_its_timeout(folder, tmp_path, monkeypatch, caplog):
    fake_worker(tmp_path, monkeypatch, sleep=60)
    waited = track(folder, {"wandb": WANDB | {"timeout_s": 1}})
    assert waited < 20
    assert "was ended" in caplog.text
    assert "tracker.wandb.timeout_s" in caplog.text


@pytest.mark.parametrize(
    ("how", "told"),
    [({}, "logged offline"), ({"crash": True}, "failed (exit code 1"), ({"sleep": 60}, "was ended")],
)
def test_a_tracker_that_fell_back_says_so_once_however_it_ends(how, told, folder, tmp_path, monkeypatch, caplog):
    fake_worker(tmp_path, monkeypatch, fallback=True, **how)
    track(folder, {"wandb": WANDB | {"timeout_s": 5 if "sleep" in how else 60}})
    (message,) = [r.getMessage() for r in caplog.records if r.name == client.log.name]
    assert told in message
    assert message.count("logged offline") == 1
    assert message.endswith(f"see {folder / 'tracker-wandb.log'}")
    assert "W&B's own" not in message


def test_why_wandb_fell_back_names_no_secret(folder, monkeypatch):
    backend = WandbBackend({**WANDB, "folder": str(folder)})
    error = ConnectionError(f"Authorization: {KEY}")
    assert "needs a key to be online (ConnectionError)" in backend._fell_back(error)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    told = backend._fell_back(error)
    assert "cannot be reached or refuses the key (ConnectionError)" in told
    assert KEY not in told
    assert "\n" not in told


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


@pytest.mark.slow
def test_a_killed_run_ends_the_tracker_as_crashed(folder, monkeypatch):
    cfg = OmegaConf.create(CONFIG | {"tracker": {"wandb": WANDB}})
    trackers = Trackers(cfg, folder)
    trackers.log("x", 0, {"v": 1.0})
    child = trackers._children[0]
    child._queue.put(None)  # what the end of the parent does: stdin closes without `finish`
    child._thread.join(300)
    assert child._process.wait(300) == 0
    codes = [m.exit.exit_code for m in wandb_messages(next(folder.rglob("run-*.wandb"))) if m.HasField("exit")]
    assert codes == [1]


@pytest.mark.parametrize(
    ("option", "value", "fix"),
    [
        ("timeout_s", 0, "must be a number > 0"),
        ("mode", "onlin", "did you mean online"),
        ("mode", False, "choose one of auto, offline, online"),  # what YAML makes of `off`
        ("init_timeout_s", 0, "must be a number > 0"),
        ("init_timeout_s", "20 s", "must be a number > 0"),
    ],
)
def test_a_bad_value_is_named_before_any_tracker_starts(option, value, fix, folder, monkeypatch):
    monkeypatch.setattr(client, "_Child", lambda *_: pytest.fail("a tracker was started"))
    with pytest.raises(UserError, match=fix) as found:
        track(folder, {"trackio": TRACKIO, "wandb": WANDB | {option: value}})
    assert (found.value.key, found.value.value) == (f"tracker.wandb.{option}", value)


def test_the_worker_module_knows_both_backends():
    assert set(worker.BACKENDS) == {"wandb", "trackio"}
    assert Path(worker.__file__).is_file()
    assert os.environ.get("WANDB_API_KEY") is None
