"""What an attacker ends with, loaded by plain diffusers, makes the images of its last
snapshot.
"""

import pytest
from concept_examples import SAMPLING, fresh_pipeline, model, task, unbroken
from diffusers import UNet2DConditionModel
from marks import with_slow
from safetensors.torch import load_file

from attacks.diffusion.export import export
from lab.core.errors import UserError
from lab.core.types import Trajectory
from lab.models.diffusion import DiffusionModel


def assert_same_images(pipe, name):
    net = DiffusionModel(pipe.unet, pipe.vae, [pipe.text_encoder], [pipe.tokenizer], pipe.scheduler)
    latents = model().latents(SAMPLING.count, 0, task().name, "name")
    found = net.generate(unbroken(name).info["prompts"]["name"], latents, SAMPLING).int()
    samples = unbroken(name).samples["name"].int()
    # another order of additions may round a pixel the other way
    assert (found - samples[-1]).abs().max() <= 1
    assert (found - samples[0]).abs().max() > 3


FILES = {
    "lora": {"pytorch_lora_weights"},
    "lora_text": {"pytorch_lora_weights"},
    "textual_inversion": {"learned_embeds"},
    "full_finetune": {"diffusion_pytorch_model", "config"},
    "custom_diffusion": {"unet_delta", "learned_embeds"},
    "curriculum": {"unet_delta", "text_encoder_delta", "learned_embeds"},
}


@pytest.mark.parametrize("name", with_slow(FILES, ("curriculum", "full_finetune")))
def test_diffusers_loads_every_file_of_an_attack(name, tmp_path):
    folder = tmp_path / "attack"
    written = export(unbroken(name), folder)
    assert {path.stem for path in written} == FILES[name]
    pipe = fresh_pipeline(tmp_path / "base")
    for path in written:
        if path.stem == "pytorch_lora_weights":
            pipe.load_lora_weights(str(folder), weight_name=path.name)
        elif path.stem == "learned_embeds":
            pipe.load_textual_inversion(str(folder), weight_name=path.name)
        elif path.stem == "config":
            pipe.unet = UNet2DConditionModel.from_pretrained(str(folder), subfolder="unet")
        elif path.stem.endswith("_delta"):
            part = getattr(pipe, path.stem.removesuffix("_delta"))
            assert not part.load_state_dict(load_file(path), strict=False).unexpected_keys
    assert_same_images(pipe, name)


def test_nothing_to_export_is_said(tmp_path):
    with pytest.raises(UserError, match=r"attacks\.lora\.keep_weights=diverged"):
        export(Trajectory([0], {}, "diverged", {"attack": "lora", "form": "lora"}), tmp_path)
