"""A run folder with a record, tracked; and what wandb has written, read back."""

import json
import struct

from omegaconf import OmegaConf
from PIL import Image

from lab.core import record as records
from lab.core.types import Score, Scores
from lab.tracking import Trackers

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
    cell = {
        "stage": "immunize",
        "model": "kappa",
        "case": "c",
        "seed": 0,
        "attack": None,
        "task": None,
        "key": "1234",
    }
    body = {
        "schema": "1.1",
        "status": "ok",
        "attacks": ["linear_probe"],
        "seeds": [0],
        "notes": [],
        "config": {},
        "images": {"grid": {"path": "images/grid.png", "caption": "a grid", "sha256": "0" * 64}},
        "name": "study/kappa",
        "scenario": "house_price",
        "backbone": "linear",
        "immunizer": "kappa",
        "error": None,
        "skipped": {},
        "cells": [{**cell, "status": "ok"}],
        "provenance": {
            "started": "2026-01-01T00:00:00+00:00",
            "wall_time_s": 1.0,
            "peak_memory_mb": 2.0,
            "host": "h",
            "device": "cpu",
            "threads": 2,
            "python": "3.11",
            "versions": {},
            "git_sha": None,
            "git_dirty": None,
            "data_hash": {},
            "weight_hash": {},
            "cache_hits": 0,
            "cache_misses": 1,
        },
        **records.scores_json([scores]),
    }
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
