"""Trackers: what they write is read back from disk; none can stop a run or hold it up."""

import json
import sqlite3
import struct
import sys
import time

import psutil
import pytest
from fake_records import record
from omegaconf import OmegaConf
from PIL import Image

from lab.core import record as records
from lab.core.errors import UserError
from lab.core.types import Score, Scores
from lab.tracking import trackers, views
from lab.tracking.trackers import Tracker, Trackers
from lab.tracking.wandb_backend import has_key

pytestmark = pytest.mark.usefixtures("no_key")


CONFIG = {
    "name": "study",
    "immunize": {"name": "kappa"},
    "scenario": {"name": "house_price"},
    "backbone": {"name": "linear"},
    "attacks": {"linear_probe": {}},
    "seeds": [0],
}
WANDB = {
    "_target_": "lab.tracking.wandb_backend.WandbTracker",
    "mode": "auto",
    "project": "p",
    "entity": None,
    "init_timeout_s": 5,
    "timeout_s": 300,
}
TRACKIO = {
    "_target_": "lab.tracking.trackio_backend.TrackioTracker",
    "project": "p",
    "timeout_s": 300,
}
KEY = "5ec2e7" * 6 + "c0de"  # 40 characters that occur nowhere else


def run_folder(tmp_path):
    """Makes ``tmp_path`` a run folder with a record in it."""
    scores = Scores(
        {"rir": Score(12.5, 10.0, 14.0, 3, "higher", "across_seeds")},
        {
            "loss": {
                "step": [0, 1, 2],
                "baseline": [3.0, 2.0, 1.0],
                "immunized": [3.0, None, 2.5],
                "x": "steps of the attack",
                "y": "loss",
                "log": "",
            },
            "sgr": {
                "step": [2, 4],
                "immunized": [0.2, 0.3],
                "immunized:low": [0.1, 0.2],
                "immunized:high": [0.3, 0.4],
                "x": "steps of the attack",
                "y": "SGR",
                "log": "",
            },
            "kappa_benign": {
                "step": [0, 10],
                "immunized": [9.0, 4.0],
                "x": "immunization step",
                "y": "κ",
                "log": "y",
            },
        },
        {"pairs": [{"case": "a", "rir": 2.0}, {"case": "b", "rir": None}]},
    )
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 4)).save(tmp_path / "images" / "grid.png")
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text(
        "- immunize=kappa\n- immunize.lr=0.05\n- seeds=[0]\n"
    )
    image = {"path": "images/grid.png", "caption": "a grid", "sha256": "0" * 64}
    parts = {"name": "study/kappa", "attacks": ["linear_probe"], "images": {"grid": image}}
    body = record("kappa", **parts, **records.scores_json([scores]))
    records.write(body, tmp_path / "record.json")
    (tmp_path / "report.html").write_text("<html></html>")
    return tmp_path


def forget_key(monkeypatch, home):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(home / "no-netrc"))
    monkeypatch.setenv("HOME", str(home))


def track(folder, tracker, live=3):
    cfg = OmegaConf.create(CONFIG | {"paths": {"outputs": str(folder)}, "tracker": tracker})
    trackers = Trackers(cfg, folder)
    for step in range(live):
        trackers.log("immunize/c/seed0", step, {"rir": 1.0 + step, "bad": float("nan")})
    trackers.finish(folder / "record.json", folder / "report.html")


def wandb_chunks(path):
    """Serialized records of an offline run file: a 7-byte header, then LevelDB log blocks of 32
    KiB.

    wandb no longer has a reader in Python; the `DataStore` of its 0.19.11 finds the same.
    """
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
            yield parts
            parts = b""


def wandb_messages(path):
    from wandb.proto import wandb_internal_pb2

    for data in wandb_chunks(path):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(data)
        yield message


def read_offline_run(folder):
    """(run, history, summary, config, artifacts) of the only offline run below ``folder``."""
    (path,) = folder.rglob("offline-run-*/run-*.wandb")
    run, history, summary, config, artifacts = None, {}, {}, {}, []
    for message in wandb_messages(path):
        kind = message.WhichOneof("record_type")
        run = message.run if kind == "run" else run
        artifacts += [message.artifact] if kind == "artifact" else []
        if message.request.HasField("log_artifact"):
            artifacts += [message.request.log_artifact.artifact]
        for item in [*message.run.config.update, *message.config.update]:
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        for item in message.history.item:
            key = item.key or ".".join(item.nested_key)
            history.setdefault(key, []).append(json.loads(item.value_json))
        for item in message.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return run, history, summary, config, artifacts


@pytest.fixture
def folder(tmp_path):
    return run_folder(tmp_path)


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    forget_key(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run that W&B and trackio have logged offline."""
    home = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        forget_key(patch, home)
        patch.setenv("TRACKIO_DIR", str(home / "trackio"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            patch.delitem(sys.modules, name)  # it reads the variable when it is imported
        track(run_folder(home), {"wandb": WANDB, "trackio": TRACKIO})
    return home


def messages_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("lab.tracking")]


# ── what they write


def test_wandb_offline_without_a_key(offline):
    run, _, summary, config, artifacts = read_offline_run(offline)
    assert (run.project, run.run_group, run.run_id) == ("p", "house_price", views.run_id(offline))
    assert "tracker" not in config
    assert (summary["rir"], summary["rir_low"], summary["rir_high"]) == (12.5, 10.0, 14.0)
    assert summary["content_hash"] == records.read(offline / "record.json")["content_hash"]
    (artifact,) = [a for a in artifacts if a.type == "record"]
    assert {e.path for e in artifact.manifest.contents} == {"record.json", "report.html"}


def test_curves_of_a_stage_share_one_axis_and_do_not_name_the_immunizer(offline):
    _, history, _, _, _ = read_offline_run(offline)
    assert history["immunize/c/seed0/rir"] == [1.0, 2.0, 3.0]
    assert "immunize/c/seed0/bad" not in history
    assert history["immunize/kappa_benign/immunized"] == [9.0, 4.0]
    assert history["attack/step"] == [0, 1, 2, 4]
    assert history["attack/loss/baseline"] == [3.0, 2.0, 1.0]


def test_trackio_has_the_same_view(offline):
    database = sqlite3.connect(next((offline / "trackio").glob("*.db")))
    deadline = time.monotonic() + 60  # trackio writes on a thread of its own
    logged: list[dict] = []
    while not any("rir" in m for m in logged) and time.monotonic() < deadline:
        logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
        time.sleep(0.2)
    key = "attack/loss/baseline"
    assert [m[key] for m in logged if key in m] == [3.0, 2.0, 1.0]
    assert [m["rir"] for m in logged if "rir" in m] == [12.5]
    configs = [json.loads(row[0]) for row in database.execute("select config from configs")]
    assert [c["_Group"] for c in configs] == ["house_price"]


def test_a_failed_run_is_marked(folder):
    body = dict(
        records.read(folder / "record.json"),
        status="failed",
        metrics={},
        curves={},
        error={"type": "ValueError", "message": "no", "key": None, "last_good_step": None},
    )
    records.write(body, folder / "record.json")
    track(folder, {"wandb": WANDB})
    messages = wandb_messages(next(folder.rglob("run-*.wandb")))
    assert [m.exit.exit_code for m in messages if m.HasField("exit")] == [1]


# ── keys and servers


@pytest.mark.slow  # waits for a server
def test_a_wrong_key_and_no_network_log_offline_and_say_so_once(folder, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    track(folder, {"wandb": WANDB})
    assert read_offline_run(folder)[1]["attack/loss/baseline"] == [3.0, 2.0, 1.0]
    (message,) = messages_of(caplog)
    assert "cannot be reached or refuses the key" in message
    assert f"`wandb sync {folder}/wandb/offline-run-*`" in message
    assert KEY not in caplog.text
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_auto_follows_the_mode_of_the_environment_whatever_the_key(folder, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(folder, {"wandb": WANDB})
    assert not messages_of(caplog), "no server was asked"
    assert read_offline_run(folder)[0].project == "p"


@pytest.mark.parametrize(
    ("url", "host", "found"),
    [
        ("", "api.wandb.ai", True),
        ("", "localhost", False),
        ("http://localhost:8080", "localhost:8080", True),  # what `wandb login` writes
        ("http://[::1", "localhost", False),
    ],
)
def test_a_key_in_the_netrc_file_is_found(tmp_path, monkeypatch, url, host, found):
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert has_key() is found


# ── trackers that fail


class Failing(Tracker):
    """Raises or hangs where it is told to, and counts its calls."""

    def __init__(self, call="", hangs=False, timeout_s=60.0):
        self.timeout_s, self.call, self.hangs = timeout_s, call, hangs

    def _do(self, call):
        if call == self.call and self.hangs:
            time.sleep(60)
        if call == self.call:
            raise ConnectionError(f"Authorization: {KEY}")

    def start(self, config, folder):
        self._do("start")

    def log(self, prefix, step, values):
        self._do("log")

    def publish(self, record, report):
        self._do("publish")


def failing(**options):
    return {"_target_": f"{__name__}.Failing", **options}


@pytest.mark.parametrize("call", ["start", "log", "publish"])
def test_a_tracker_that_raises_costs_one_warning(call, folder, caplog):
    track(folder, {"mine": failing(call=call)}, live=3000)
    (message,) = messages_of(caplog)
    assert message.startswith("tracker mine failed (ConnectionError)")
    assert KEY not in message


@pytest.mark.parametrize("call", ["start", "log", "publish"])
def test_a_tracker_that_hangs_costs_its_timeout_and_one_warning(call, folder, caplog):
    began = time.monotonic()
    track(folder, {"mine": failing(call=call, hangs=True, timeout_s=0.5)}, live=3000)
    assert time.monotonic() - began < 10
    (message,) = messages_of(caplog)
    assert message.startswith("tracker mine took longer than tracker.mine.timeout_s=0.5")


@pytest.mark.slow
def test_wandbs_service_killed_in_the_middle_costs_a_warning(folder, caplog):
    cfg = OmegaConf.create(CONFIG | {"paths": {}, "tracker": {"wandb": WANDB | {"timeout_s": 30}}})
    run = Trackers(cfg, folder)
    for step in range(50):
        run.log("immunize/c/seed0", step, {"rir": 1.0 + step})

    def services():
        children = psutil.Process().children(recursive=True)
        return [child for child in children if "wandb" in child.name()]

    def is_logged():
        return any(b"seed0/rir" in path.read_bytes() for path in folder.rglob("run-*.wandb"))

    deadline = time.monotonic() + 120
    while not (services() and is_logged()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for service in services():
        service.kill()
    began = time.monotonic()
    run.finish(folder / "record.json", folder / "report.html")
    assert time.monotonic() - began < 60
    assert caplog.text.count("tracker wandb") == 1
    assert is_logged(), "what was logged is lost"


@pytest.mark.parametrize(("option", "value"), [("timeout_s", 0), ("mode", "onlin")])
def test_a_bad_value_is_named_before_any_tracker_starts(option, value, folder, monkeypatch):
    monkeypatch.setattr(trackers, "_TrackerThread", lambda *_: pytest.fail("a tracker was started"))
    with pytest.raises(UserError) as error:
        track(folder, {"trackio": TRACKIO, "wandb": WANDB | {option: value}})
    assert (error.value.key, error.value.value) == (f"tracker.wandb.{option}", value)
