"""Records: validated on write and on read, one hash for two runs of the same thing."""

import copy
import hashlib
import json
import math

import pytest
import torch

from lab.core import record as records
from lab.core.errors import UserError
from lab.core.types import ImageGrid, Score, Scores


@pytest.fixture
def body():
    scores = Scores(
        {"rir": Score(12.5, 10.0, 14.0, 3, "higher", "across_seeds")},
        {"rir": {"step": [0, 1], "kappa": [1.0, math.inf], "x": "step", "y": "RIR", "log": "y"}},
        {"pairs": [{"case": "3-8", "rir": 2.0}]},
    )
    return {
        "schema": records.SCHEMA_VERSION,
        "name": "study/kappa",
        "status": "ok",
        "scenario": "house_price",
        "backbone": "linear",
        "immunizer": "kappa",
        "attacks": ["linear_probe"],
        "seeds": [0, 1, 2],
        "config": {"seeds": [0, 1, 2], "paths": {"runs": "a"}, "immunize": {"lr": 0.1}},
        "notes": ["2 columns were dropped."],
        "error": None,
        "skipped": {},
        "stages": [
            {
                "kind": "immunize",
                "model": "kappa",
                "case": "c",
                "seed": 0,
                "attack": None,
                "task": None,
                "key": "abc",
                "status": "ok",
            }
        ],
        "provenance": {
            "started": "2026-01-01T00:00:00+00:00",
            "wall_time_s": 1.0,
            "peak_memory_mb": 2.0,
            "host": "h",
            "device": "cpu",
            "threads": 2,
            "python": "3.11",
            "versions": {"torch": "2"},
            "git_sha": None,
            "git_dirty": None,
            "data_hash": {"0": "d"},
            "weight_hash": {"0": "w"},
            "cache_hits": 0,
            "cache_misses": 1,
        },
        **records.scores_json([scores]),
    }


def test_a_written_record_reads_back_unless_it_was_altered(tmp_path, body):
    path = tmp_path / "run" / "record.json"
    records.write(body, path)
    read = records.read(path)
    assert (read["metrics"]["rir"]["value"], read["curves"]["rir"]["kappa"]) == (12.5, [1.0, None])
    altered = json.loads(path.read_text())
    altered["metrics"]["rir"]["value"] = 99.0
    path.write_text(json.dumps(altered))
    with pytest.raises(UserError, match="altered"):
        records.read(path)


def test_content_hash_leaves_out_time_host_paths_and_keys_but_not_results(body):
    same = copy.deepcopy(body)
    same["provenance"] |= {
        "wall_time_s": 9.0,
        "host": "other",
        "cache_hits": 5,
        "started": "2027-01-01T00:00:00+00:00",
    }
    same["config"]["paths"]["runs"] = "b"
    same["stages"][0] |= {"key": "def", "seconds": 3.5}
    assert records.content_hash(same) == records.content_hash(body)
    for change in (
        lambda r: r["metrics"]["rir"].update(value=12.6),
        lambda r: r["config"]["immunize"].update(lr=0.2),
        lambda r: r["provenance"]["data_hash"].update({"0": "e"}),
        lambda r: r["stages"][0].update(status="diverged"),
    ):
        other = copy.deepcopy(body)
        change(other)
        assert records.content_hash(other) != records.content_hash(body)


IMAGE = {"caption": "", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema="0.9"), "0.9"),
        (lambda r: r.pop("metrics"), "metrics"),
        (lambda r: r.update(status="fine"), "status"),
        (lambda r: r["metrics"]["rir"].update(value=None), "metrics/rir/note"),
        (lambda r: r["metrics"].update({"Bad Name": r["metrics"]["rir"]}), "Bad Name"),
        (lambda r: r["stages"][0].update(extra=1), "stages/0"),
        (lambda r: r.update(images={"a": IMAGE | {"path": "/etc/a.png"}}), "images/a/path"),
        (lambda r: r.update(images={"a": IMAGE | {"path": "../a.png"}}), "images/a/path"),
    ],
)
def test_schema_violations_are_named(body, change, message):
    body["content_hash"] = records.content_hash(body)
    records.validate(body, "x.json")
    change(body)
    with pytest.raises(UserError, match=message):
        records.validate(body, "x.json")


def image_grid(value=7, caption="Two steps of an attack."):
    return ImageGrid(
        torch.full((1, 2, 3, 4, 4), value, dtype=torch.uint8), ("none",), ("0", "1"), caption
    )


def test_images_are_written_beside_the_record_and_named_in_it(tmp_path, body):
    body["images"] = records.write_images(tmp_path, {"attack_lora": image_grid()})
    entry = body["images"]["attack_lora"]
    assert entry["sha256"] == hashlib.sha256((tmp_path / entry["path"]).read_bytes()).hexdigest()
    records.write(body, tmp_path / "record.json")
    assert records.read(tmp_path / "record.json")["images"] == body["images"]
    assert records.write_images(tmp_path / "b", {"attack_lora": image_grid()}) == body["images"]


def test_content_hash_sees_images_but_not_where_they_lie(tmp_path, body):
    body["images"] = records.write_images(tmp_path, {"a": image_grid()})
    first = records.content_hash(body)
    body["images"]["a"]["path"] = "elsewhere/a.png"
    assert records.content_hash(body) == first
    body["images"]["a"]["sha256"] = "0" * 64
    assert records.content_hash(body) != first


@pytest.mark.parametrize("body", [[], {"schema": "1.0"}, {"schema": "2.4"}])
def test_what_is_no_record_is_refused(body):
    with pytest.raises(UserError, match="records=other"):
        records.validate(body, "other.json")


def test_each_seed_gets_its_own_value_whatever_the_order_of_the_run():
    scores = Scores({"rir": Score(2.0, per_seed=(1.0, 2.0, 3.0))})  # of seeds 0, 1, 2
    (row,) = records.seed_values([scores], (2, 0, 1))
    assert row == {"metric": "rir", "0": 1.0, "1": 2.0, "2": 3.0}


def test_find(tmp_path, body):
    with pytest.raises(UserError, match=r"holds no record\.json"):
        records.find([], tmp_path)
    records.write(body, tmp_path / "a" / "record.json")
    records.write(body, tmp_path / "records" / "table.json")
    assert len(records.find([], tmp_path)) == 2
    assert records.find([str(tmp_path / "a")], tmp_path) == [tmp_path / "a" / "record.json"]
