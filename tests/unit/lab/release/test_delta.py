import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusion import tiny_diffusion

from lab.core.errors import UserError
from lab.core.types import same_weights
from lab.release.delta import FORMAT, load_delta, save_delta, state_hash

MOVED = ("conv_in.bias", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")


def moved(model, amount=0.1):
    other = model.copy()
    for name, p in other.unet.named_parameters():
        if name in MOVED:
            p.data += amount
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_is_bit_for_bit_and_compact(tmp_path, dtype):
    base = tiny_diffusion(dtype=dtype)
    after = moved(base)
    before = state_hash(base.unet.state_dict())
    file = save_delta(base, after, tmp_path / "new" / "delta.safetensors")
    assert sorted(load_file(file)) == sorted(MOVED)
    again = load_delta(tiny_diffusion(dtype=dtype), file)
    assert same_weights(again, after)
    assert state_hash(base.unet.state_dict()) == before


def test_no_change_gives_an_empty_delta(tmp_path):
    base = tiny_diffusion()
    assert same_weights(load_delta(base, save_delta(base, base.copy(), tmp_path / "d")), base)


def test_a_wrong_base_is_refused(tmp_path):
    base = tiny_diffusion()
    file = save_delta(base, moved(base), tmp_path / "d")
    with pytest.raises(UserError, match="belongs to the base"):
        load_delta(tiny_diffusion(seed=1), file)
    with pytest.raises(UserError, match="belongs to the base"):
        load_delta(moved(base), file)


def test_files_that_are_no_delta(tmp_path):
    base = tiny_diffusion()
    with pytest.raises(UserError, match="cannot be read"):
        load_delta(base, tmp_path / "missing")
    (tmp_path / "junk").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_delta(base, tmp_path / "junk")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(UserError, match="no immunization delta"):
        load_delta(base, tmp_path / "other")
    for metadata in ({}, {"tensors": "not json"}, {"tensors": '["a"]'}):
        save_file({"a": torch.zeros(1)}, tmp_path / "poor", {"format": FORMAT, **metadata})
        with pytest.raises(UserError, match="delta"):
            load_delta(base, tmp_path / "poor")


def test_models_of_other_shapes_are_refused(tmp_path):
    base, other = tiny_diffusion(), tiny_diffusion().to(torch.float16)
    with pytest.raises(UserError, match=r"conv_in|same kind"):
        save_delta(base, other, tmp_path / "d")


def test_the_hash_knows_names_shapes_and_dtypes():
    a = torch.arange(4, dtype=torch.float32)
    hashes = [
        state_hash(s)
        for s in (
            {"a": a},
            {"b": a},
            {"a": a.view(2, 2)},
            {"a": a.view(torch.int32)},
            {"a": a, "b": a},
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert state_hash({"b": a, "a": a}) == state_hash({"a": a, "b": a})
