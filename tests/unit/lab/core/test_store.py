"""The stage cache: once, checked, resumable, and one writer at a time."""

import json
import multiprocessing
import os
import shutil
import time

import pytest
import torch

from lab.core.cache import Artifact, StageCache, StageCheckpoint
from lab.core.errors import UserError
from lab.core.hashing import stage_key, write_atomically


def make(value=1.0):
    return lambda checkpoint: Artifact(
        {"value": value, "nan": float("nan")}, {"w": torch.full((3, 2), value).double()}
    )


def never(checkpoint):
    raise AssertionError("must not be computed")


def test_first_call_computes_second_reads(tmp_path):
    store = StageCache(tmp_path)
    first, hit = store.get("immunize", "k1", make(2.0))
    again, hit_again = StageCache(tmp_path).get("immunize", "k1", never)
    assert (hit, hit_again) == (False, True)
    assert again.values["value"] == 2.0
    assert again.values["nan"] != again.values["nan"]
    assert torch.equal(again.tensors["w"], first.tensors["w"])
    assert again.tensors["w"].dtype == torch.float64


@pytest.mark.parametrize("name", ["values.json", "tensors.safetensors", "meta.json"])
def test_a_flipped_byte_is_noticed_and_rebuilt(tmp_path, caplog, name):
    store = StageCache(tmp_path)
    store.get("attack", "k", make(1.0))
    path = store.folder("attack", "k") / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    rebuilt, hit = store.get("attack", "k", make(5.0))
    assert not hit
    assert rebuilt.values["value"] == 5.0
    assert "computed again" in caplog.text
    assert store.get("attack", "k", never)[1]


@pytest.mark.parametrize(
    "text", ["null", "[]", "{}", '{"sha256": {}}', '{"sha256": null}', '{"sha256": ["a"]}']
)
def test_facts_that_are_none_are_noticed_and_rebuilt(tmp_path, caplog, text):
    store = StageCache(tmp_path)
    store.get("attack", "k", make(1.0))
    (store.folder("attack", "k") / "meta.json").write_text(text)
    assert not store.get("attack", "k", make(5.0))[1]
    assert "computed again" in caplog.text
    assert store.get("attack", "k", never)[0].values["value"] == 5.0


def test_a_truncated_artefact_is_rebuilt(tmp_path, caplog):
    store = StageCache(tmp_path)
    store.get("eval", "k", make())
    path = store.folder("eval", "k") / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:10])
    assert not store.get("eval", "k", make())[1]
    assert "checksum" in caplog.text


def test_force_computes_once_per_process(tmp_path):
    StageCache(tmp_path).get("attack", "k", make(1.0))
    store = StageCache(tmp_path, force=["attack"])
    assert not store.has("attack", "k")
    artifact, hit = store.get("attack", "k", make(7.0))
    assert not hit
    assert artifact.values["value"] == 7.0
    assert store.get("attack", "k", never)[1]
    with pytest.raises(UserError, match="atack"):
        StageCache(tmp_path, force=["atack"])


ROOT = [("immunize", "k")]


def test_what_was_made_from_a_result_is_made_again_once_that_comes_out_otherwise(tmp_path, caplog):
    store = StageCache(tmp_path)
    store.get("immunize", "k", make(1.0))
    store.get("attack", "k", make(2.0), ROOT)
    store.get("eval", "k", make(3.0), [*ROOT, ("attack", "k")])
    forced = StageCache(tmp_path, force="immunize")
    forced.get("immunize", "k", make(1.0))
    assert forced.has("attack", "k", ROOT)
    assert forced.get("eval", "k", never, [*ROOT, ("attack", "k")])[1]
    assert not caplog.text
    shutil.rmtree(store.folder("immunize", "k"))
    assert store.has("attack", "k", ROOT)  # nothing contradicts it
    store.get("immunize", "k", make(1.5))
    assert not store.has("attack", "k", ROOT)
    assert not store.get("attack", "k", make(2.0), ROOT)[1]
    assert "not made from the result that there is now" in caplog.text
    assert not store.has("eval", "k", [*ROOT, ("attack", "k")])
    assert store.has("eval", "k", [("attack", "k")])  # the attack's own result is as it was


def test_an_artefact_that_names_no_origin_counts_for_none(tmp_path):
    store = StageCache(tmp_path)
    store.get("immunize", "k", make(1.0))
    store.get("attack", "k", make(2.0))
    assert store.has("attack", "k")
    assert not store.has("attack", "k", ROOT)
    assert not store.get("attack", "k", make(2.0), ROOT)[1]
    assert store.get("attack", "k", never, ROOT)[1]


def test_a_stage_that_computes_what_it_is_made_from_knows_it_afterwards(tmp_path):
    store = StageCache(tmp_path)

    def compute(checkpoint):
        store.get("immunize", "k", make(1.0))
        return Artifact({"value": 2.0})

    store.get("attack", "k", compute, ROOT)
    assert store.get("attack", "k", never, ROOT)[1]


@pytest.mark.parametrize(("value", "step"), [(1.0, 4), (1.5, None)])
def test_a_checkpoint_goes_on_only_from_what_it_began_at(tmp_path, caplog, value, step):
    def dies(checkpoint):
        checkpoint.save({"w": torch.ones(2)}, {"step": 4})
        raise RuntimeError("killed")

    def resumes(checkpoint):
        found = checkpoint.load()
        return Artifact({"from": found and found[1]["step"]})

    store = StageCache(tmp_path)
    store.get("immunize", "k", make(1.0))
    with pytest.raises(RuntimeError):
        store.get("attack", "k", dies, ROOT)
    assert store.checkpointed("attack", "k") == 4
    StageCache(tmp_path, force="immunize").get("immunize", "k", make(value))
    assert store.get("attack", "k", resumes, ROOT)[0].values["from"] == step
    assert ("did not begin at the result" in caplog.text) == (step is None)


def test_an_exception_leaves_no_artefact_but_the_checkpoint(tmp_path):
    store = StageCache(tmp_path)

    def dies(checkpoint):
        checkpoint.save({"w": torch.ones(2)}, {"step": 4})
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        store.get("immunize", "k", dies)
    assert not store.has("immunize", "k")

    def resumes(checkpoint):
        tensors, values = checkpoint.load()
        return Artifact({"from": values["step"]}, tensors)

    artifact, _ = store.get("immunize", "k", resumes)
    assert artifact.values["from"] == 4
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_damaged_checkpoint_is_ignored(tmp_path, caplog):
    checkpoint = StageCheckpoint(tmp_path / "a.ckpt")
    assert checkpoint.load() is None
    checkpoint.save({"w": torch.arange(3.0)}, {"step": 1})
    assert checkpoint.load()[1] == {"step": 1}
    data = bytearray(checkpoint.path.read_bytes())
    data[-1] ^= 1
    checkpoint.path.write_bytes(data)
    assert checkpoint.load() is None
    assert "damaged" in caplog.text


def test_an_artefact_knows_the_seconds_that_it_took(tmp_path):
    def slow(_):
        time.sleep(0.05)
        return Artifact()

    computed, _ = StageCache(tmp_path).get("attack", "k", slow)
    assert computed.seconds >= 0.05
    again, hit = StageCache(tmp_path).get("attack", "k", never)
    assert hit
    assert again.seconds == computed.seconds


def test_a_stage_that_was_resumed_counts_every_sitting(tmp_path):
    store = StageCache(tmp_path)

    def dies(checkpoint):
        time.sleep(0.05)
        checkpoint.save({"w": torch.ones(2)}, {"step": 4})
        raise RuntimeError("killed")

    for key in ("resumed", "anew"):
        with pytest.raises(RuntimeError):
            store.get("attack", key, dies)
    resumed, _ = store.get("attack", "resumed", lambda checkpoint: Artifact(checkpoint.load()[1]))
    anew, _ = store.get("attack", "anew", lambda _: Artifact())
    assert resumed.seconds >= 0.05 > anew.seconds
    assert resumed.values == {"step": 4}


def test_an_artefact_of_an_older_version_has_no_seconds(tmp_path):
    store = StageCache(tmp_path)
    store.get("eval", "k", make())
    path = store.folder("eval", "k") / "meta.json"
    path.write_text(json.dumps({"sha256": json.loads(path.read_text())["sha256"]}))
    assert store.get("eval", "k", never)[0].seconds is None


def test_key_depends_on_content_not_on_order():
    assert stage_key(a=1, b=[1, 2]) == stage_key(b=[1, 2], a=1)
    assert stage_key(a=1) != stage_key(a=2)


def test_failed_write_keeps_the_old_bytes(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def _compute_slowly(root, counter):
    def compute(_):
        with open(counter, "a") as handle:
            handle.write("x")
        time.sleep(0.5)
        return Artifact({"ok": True})

    StageCache(root).get("immunize", "shared", compute)


def test_two_processes_want_one_stage_and_one_computes(tmp_path):
    counter = tmp_path / "count"
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_compute_slowly, args=(tmp_path / "cache", counter))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert counter.read_text() == "x"


def test_meta_lists_checksums_of_both_files(tmp_path):
    store = StageCache(tmp_path)
    store.get("eval", "k", make())
    meta = json.loads((store.folder("eval", "k") / "meta.json").read_text())
    assert sorted(meta["sha256"]) == ["tensors.safetensors", "values.json"]
