"""The stage cache: once, checked, resumable, and one writer at a time."""

import os
import shutil

import pytest
import torch

from lab.core.cache import Artifact, StageCache, StageCheckpoint
from lab.core.errors import UserError
from lab.core.hashing import write_atomically


def make(value=1.0):
    return lambda checkpoint: Artifact(
        {"value": value, "nan": float("nan")}, {"w": torch.full((3, 2), value).double()}
    )


def never(checkpoint):
    raise AssertionError("must not be computed")


@pytest.fixture
def store(tmp_path):
    return StageCache(tmp_path)


def test_first_call_computes_second_reads(tmp_path):
    first, hit = StageCache(tmp_path).get("immunize", "k1", make(2.0))
    again, hit_again = StageCache(tmp_path).get("immunize", "k1", never)
    assert (hit, hit_again, again.values["value"]) == (False, True, 2.0)
    assert torch.equal(again.tensors["w"], first.tensors["w"])


@pytest.mark.parametrize("name", ["values.json", "tensors.safetensors", "meta.json"])
def test_a_flipped_byte_is_noticed_and_rebuilt(store, name):
    store.get("attack", "k", make(1.0))
    path = store.folder("attack", "k") / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    rebuilt, hit = store.get("attack", "k", make(5.0))
    assert not hit
    assert rebuilt.values["value"] == 5.0
    assert store.get("attack", "k", never)[1]


def test_force_computes_once_per_process(tmp_path):
    StageCache(tmp_path).get("attack", "k", make(1.0))
    store = StageCache(tmp_path, force=["attack"])
    assert not store.has("attack", "k")
    assert store.get("attack", "k", make(7.0))[0].values["value"] == 7.0
    assert store.get("attack", "k", never)[1]
    with pytest.raises(UserError, match="atack"):
        StageCache(tmp_path, force=["atack"])


ROOT = [("immunize", "k")]


def test_what_was_made_from_a_result_is_made_again_once_that_comes_out_otherwise(tmp_path, store):
    store.get("immunize", "k", make(1.0))
    store.get("attack", "k", make(2.0), ROOT)
    store.get("eval", "k", make(3.0), [*ROOT, ("attack", "k")])
    forced = StageCache(tmp_path, force="immunize")
    forced.get("immunize", "k", make(1.0))
    assert forced.has("attack", "k", ROOT)
    assert forced.get("eval", "k", never, [*ROOT, ("attack", "k")])[1]
    shutil.rmtree(store.folder("immunize", "k"))
    assert store.has("attack", "k", ROOT)  # nothing contradicts it
    store.get("immunize", "k", make(1.5))
    assert not store.has("attack", "k", ROOT)
    assert not store.get("attack", "k", make(2.0), ROOT)[1]
    assert not store.has("eval", "k", [*ROOT, ("attack", "k")])
    assert store.has("eval", "k", [("attack", "k")])  # the attack's own result is as it was


def test_a_stage_that_computes_what_it_is_made_from_knows_it_afterwards(store):
    def compute(checkpoint):
        store.get("immunize", "k", make(1.0))
        return Artifact({"value": 2.0})

    store.get("attack", "k", compute, ROOT)
    assert store.get("attack", "k", never, ROOT)[1]


@pytest.mark.parametrize(("value", "step"), [(1.0, 4), (1.5, None)])
def test_a_checkpoint_goes_on_only_from_what_it_began_at(tmp_path, store, value, step):
    def dies(checkpoint):
        checkpoint.save({"w": torch.ones(2)}, {"step": 4})
        raise RuntimeError("killed")

    def resumes(checkpoint):
        found = checkpoint.load()
        return Artifact({"from": found and found[1]["step"]})

    store.get("immunize", "k", make(1.0))
    with pytest.raises(RuntimeError):
        store.get("attack", "k", dies, ROOT)
    assert store.checkpointed("attack", "k") == 4
    StageCache(tmp_path, force="immunize").get("immunize", "k", make(value))
    assert store.get("attack", "k", resumes, ROOT)[0].values["from"] == step


def test_a_damaged_checkpoint_is_ignored(tmp_path):
    checkpoint = StageCheckpoint(tmp_path / "a.ckpt")
    assert checkpoint.load() is None
    checkpoint.save({"w": torch.arange(3.0)}, {"step": 1})
    assert checkpoint.load()[1] == {"step": 1}
    data = bytearray(checkpoint.path.read_bytes())
    data[-1] ^= 1
    checkpoint.path.write_bytes(data)
    assert checkpoint.load() is None


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
