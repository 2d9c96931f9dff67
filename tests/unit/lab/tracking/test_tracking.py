"""Trackers: what they write is read back from disk; none can stop a run or hold it up."""

import hashlib
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import venv
from contextlib import contextmanager

import psutil
import pytest
from omegaconf import OmegaConf
from tracking_runs import (
    CONFIG,
    KEY,
    TRACKIO,
    WANDB,
    forget_key,
    read_offline_run,
    run_folder,
    track,
    wandb_chunks,
    wandb_messages,
)

from lab.core import record as records
from lab.tracking import Trackers, client, views

pytestmark = pytest.mark.usefixtures("no_key")


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


@pytest.mark.slow
def test_wandb_offline_without_a_key(offline):
    folder = offline
    runs = {stage: read_offline_run(folder, stage) for stage in ("immunize", "attack", "eval")}
    assert len(list(folder.rglob("offline-run-*"))) == 3
    for stage, (run, _, _, config, _) in runs.items():
        assert (run.project, run.run_group, run.job_type) == ("p", "house_price", stage)
        assert run.display_name == f"kappa lr=0.05 on house_price · {stage}"
        assert set(run.tags) == {"study", "kappa", "linear", "linear_probe"}
        assert run.run_id == views.run_id(folder, stage)
        assert config["immunize"] == {"name": "kappa"}
        assert "tracker" not in config


OWN_READER = """
import hashlib, json, sys
from wandb.proto import wandb_internal_pb2 as messages
from wandb.sdk.internal.datastore import DataStore
store, found = DataStore(), []
store.open_for_scan(sys.argv[1])
while (data := store.scan_data()) is not None:
    messages.Record().ParseFromString(data)
    found.append(hashlib.sha256(data).hexdigest())
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(
    not os.environ.get("CLEAN_INSTALL"),
    reason="installs wandb 0.19.11 from the package index: CLEAN_INSTALL=1 pytest -m network",
)
def test_wandbs_own_reader_finds_the_messages_that_these_tests_read(offline, tmp_path):
    """0.19.11 is the last one that has the reader in Python; it checks the checksum of every chunk,
    too.
    """
    venv.create(tmp_path / ".venv", with_pip=True)
    python = tmp_path / ".venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "wandb==0.19.11"], check=True)
    files = sorted(offline.rglob("offline-run-*/run-*.wandb"))
    assert len(files) == 3
    for file in files:
        out = subprocess.run(
            [python, "-c", OWN_READER, str(file)], capture_output=True, text=True, check=True
        ).stdout
        ours = [hashlib.sha256(data).hexdigest() for data in wandb_chunks(file)]
        assert json.loads(out) == ours
        assert len(ours) > 5


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
    assert history["attack/loss/baseline"] == [3.0, 2.0, 1.0]
    assert history["attack/loss/immunized"] == [3.0, 2.5]
    assert history["attack/sgr/immunized_low"] == [0.1, 0.2]
    path = next(p for p in folder.rglob("*.wandb") if p.stem.endswith("-attack"))
    defined = [m.metric for m in wandb_messages(path) if m.HasField("metric")]
    assert {(m.glob_name or m.name, m.step_metric) for m in defined} >= {
        ("attack/*", "attack/step")
    }


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
    keys = [
        {k for _, values in views.curve_rows(r, "attack") for k in values} for r in (record, other)
    ]
    assert keys[0] & keys[1] == {"loss/baseline", "loss/immunized"}


@pytest.mark.slow
def test_a_failed_run_is_marked_in_every_stage(folder):
    body = dict(
        records.read(folder / "record.json"),
        status="failed",
        metrics={},
        curves={},
        tables={},
        images={},
    )
    body["error"] = {"type": "ValueError", "message": "no", "key": None, "last_good_step": None}
    records.write(body, folder / "record.json")
    track(folder, {"wandb": WANDB})
    exits = [
        m.exit.exit_code
        for p in folder.rglob("run-*.wandb")
        for m in wandb_messages(p)
        if m.HasField("exit")
    ]
    assert exits == [1, 1]  # immunize and eval; nothing was attacked


@pytest.mark.slow
def test_wandb_with_a_wrong_key_and_no_network_logs_offline_and_says_so(
    folder, monkeypatch, caplog
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(
        "WANDB_SERVICE", "3-1-tcp-localhost-9"
    )  # of a W&B in this very process: not the tracker's
    track(folder, {"wandb": WANDB})
    assert read_offline_run(folder, "attack")[1]["attack/loss/baseline"] == [3.0, 2.0, 1.0]
    log = folder / "tracker-wandb.log"
    assert log.read_text().count("logged offline") == 1
    (told,) = [r.getMessage() for r in caplog.records if r.name == client.log.name]
    for part in (
        "cannot be reached or refuses the key (CommError)",
        "WANDB_API_KEY",
        "tracker.wandb.mode=offline",
        f"`wandb sync {folder}/wandb/offline-run-*`",
        str(log),
    ):
        assert part in told
    assert KEY not in caplog.text
    assert KEY not in "".join(
        p.read_text(errors="ignore") for p in folder.rglob("*") if p.is_file()
    )


@pytest.mark.slow
def test_auto_follows_the_mode_of_the_environment_whatever_the_key(folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings_of(client.log) as warned:
        track(folder, {"wandb": WANDB})
    assert not warned, "no server was asked"
    assert read_offline_run(folder, "immunize")[0].job_type == "immunize"


@pytest.mark.slow
def test_trackio_has_the_same_view(offline):
    database = sqlite3.connect(next((offline / "trackio").glob("*.db")))
    logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
    key = "attack/loss/baseline"
    assert [m[key] for m in logged if key in m] == [3.0, 2.0, 1.0]
    assert [m["rir"] for m in logged if "rir" in m] == [12.5]
    configs = [json.loads(row[0]) for row in database.execute("select config from configs")]
    assert [c["_Group"] for c in configs] == ["house_price"]


CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)


def dashboard(folder, port):
    """trackio's local dashboard in a process of its own."""
    code = (
        "import sys, trackio; trackio.show('p', open_browser=False, block_thread=True, "
        "server_port=int(sys.argv[1]))"
    )
    env = os.environ | {"TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(port)], env=env, stdout=subprocess.DEVNULL
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_dashboard_of_trackio_shows_the_run_in_a_browser(offline, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = dashboard(offline, port)
    address = f"http://127.0.0.1:{port}/?project=p"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}",
        address,
    ]
    try:
        assert waits_for(lambda: process.poll() is not None or answers(address)), (
            "the dashboard does not start"
        )
        assert process.poll() is None
        page = subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=True
        ).stdout
    finally:
        process.kill()
        process.wait()
    assert "kappa lr=0.05 on house_price" in page
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
    assert any("seed0/rir" in (item.key or ".".join(item.nested_key)) for item in history), (
        "what was logged is lost"
    )
