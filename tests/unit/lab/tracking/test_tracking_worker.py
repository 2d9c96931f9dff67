"""The process that feeds a tracker: none can stop a run or hold it up."""

import json
import os
import queue
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tracking_runs import CONFIG, KEY, TRACKIO, WANDB, track, wandb_messages

from lab.core import record as records
from lab.core.errors import UserError
from lab.tracking import Trackers, client, worker
from lab.tracking.wandb_backend import NOTICE, WandbBackend, has_key

pytestmark = pytest.mark.usefixtures("no_key")


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
    monkeypatch.setattr(
        client.subprocess, "Popen", lambda command, **kw: real([sys.executable, str(script)], **kw)
    )


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
    [
        ({}, "logged offline"),
        ({"crash": True}, "failed (exit code 1"),
        ({"sleep": 60}, "was ended"),
    ],
)
def test_a_tracker_that_fell_back_says_so_once_however_it_ends(
    how, told, folder, tmp_path, monkeypatch, caplog
):
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


def test_live_points_give_way_to_the_end_and_the_start_does_not():
    child = object.__new__(client._Child)
    child.timeout, child.lost, child._queue = 1.0, 0, queue.Queue(3)
    for event in ("start", "log", "log"):
        child.send({"event": event})
    child.close({"event": "finish"})
    left = [child._queue.get_nowait() for _ in range(3)]
    assert [line and json.loads(line)["event"] for line in left] == ["start", "finish", None]
    assert child.lost == 2


def test_the_end_reaches_a_tracker_that_is_far_behind(folder, tmp_path, monkeypatch, caplog):
    script, heard = tmp_path / "late.py", tmp_path / "heard"
    script.write_text(
        f"import sys, time\ntime.sleep(2)\nopen({str(heard)!r}, 'w').write(sys.stdin.read())"
    )
    real = client.subprocess.Popen
    monkeypatch.setattr(
        client.subprocess, "Popen", lambda command, **kw: real([sys.executable, str(script)], **kw)
    )
    monkeypatch.setattr(client, "_QUEUE", 50)
    track(folder, {"wandb": WANDB}, live=3000)
    events = [json.loads(line)["event"] for line in heard.read_text().splitlines()]
    assert events[0] == "start"
    assert events[-1] == "finish"
    assert len(events) < 3000
    assert "messages lost" in caplog.text


@pytest.mark.parametrize(
    ("url", "host", "found"),
    [
        ("", "api.wandb.ai", True),
        ("", "localhost", False),
        ("http://localhost:8080", "localhost:8080", True),  # what `wandb login` writes
        ("http://localhost:8080", "localhost", False),  # wandb finds no key there
        ("http://[::1", "localhost", False),
    ],
)
def test_a_key_in_the_netrc_file_is_found(tmp_path, monkeypatch, url, host, found):
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert has_key() is found


@pytest.mark.slow
def test_a_killed_run_ends_the_tracker_as_crashed(folder, monkeypatch):
    cfg = OmegaConf.create(CONFIG | {"tracker": {"wandb": WANDB}})
    trackers = Trackers(cfg, folder)
    trackers.log("x", 0, {"v": 1.0})
    child = trackers._children[0]
    child._queue.put(None)  # what the end of the parent does: stdin closes without `finish`
    child._thread.join(300)
    assert child._process.wait(300) == 0
    codes = [
        m.exit.exit_code
        for m in wandb_messages(next(folder.rglob("run-*.wandb")))
        if m.HasField("exit")
    ]
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
