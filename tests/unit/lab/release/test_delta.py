"""A delta and its base give the immunized weights, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_diffusion import tiny_diffusion

from lab.core.errors import UserError
from lab.core.hashing import state_hash
from lab.core.types import same_weights
from lab.release.verify import load_delta, save_delta

MOVED = ("conv_in.bias", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")


def moved(model):
    other = model.copy()
    for name, p in other.unet.named_parameters():
        if name in MOVED:
            p.data += 0.1
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_is_bit_for_bit_and_compact(tmp_path, dtype):
    base = tiny_diffusion(dtype=dtype)
    file = save_delta(base, moved(base), tmp_path / "new" / "delta.safetensors")
    assert sorted(load_file(file)) == sorted(MOVED)
    assert same_weights(load_delta(tiny_diffusion(dtype=dtype), file), moved(base))
    assert same_weights(base, tiny_diffusion(dtype=dtype))


def test_a_wrong_base_is_refused(tmp_path):
    base = tiny_diffusion()
    file = save_delta(base, moved(base), tmp_path / "d")
    for other in (tiny_diffusion(seed=1), moved(base)):
        with pytest.raises(UserError, match="belongs to the base"):
            load_delta(other, file)


def test_the_hash_knows_names_shapes_and_dtypes():
    a = torch.arange(4, dtype=torch.float32)
    states = [{"a": a}, {"b": a}, {"a": a.view(2, 2)}, {"a": a.view(torch.int32)}]
    hashes = {state_hash(state) for state in [*states, {"a": a, "b": a}]}
    assert len(hashes) == 5
