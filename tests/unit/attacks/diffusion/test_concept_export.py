"""What an attacker ends with, loaded by plain diffusers, makes the images of its last
snapshot.
"""

import pytest
from concept_examples import SAMPLING, fresh_pipeline, model, task, unbroken
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
    assert (
        found - samples[-1]
    ).abs().max() <= 1  # another order of additions may round a pixel the other way
    assert (found - samples[0]).abs().max() > 3


@pytest.mark.parametrize("name", ["lora", "lora_text"])
def test_lora_loads_by_load_lora_weights(name, tmp_path):
    (written,) = export(unbroken(name), tmp_path / "attack")
    assert written.name == "pytorch_lora_weights.safetensors"
    pipe = fresh_pipeline(tmp_path / "base")
    pipe.load_lora_weights(str(tmp_path / "attack"), weight_name=written.name)
    assert_same_images(pipe, name)


def test_textual_inversion_loads_by_load_textual_inversion(tmp_path):
    (written,) = export(unbroken("textual_inversion"), tmp_path / "attack")
    pipe = fresh_pipeline(tmp_path / "base")
    pipe.load_textual_inversion(str(tmp_path / "attack"), weight_name=written.name)
    assert_same_images(pipe, "textual_inversion")


def test_full_weights_load_by_from_pretrained(tmp_path):
    from diffusers import UNet2DConditionModel

    export(unbroken("full_finetune"), tmp_path / "attack")
    pipe = fresh_pipeline(tmp_path / "base")
    pipe.unet = UNet2DConditionModel.from_pretrained(str(tmp_path / "attack"), subfolder="unet")
    assert_same_images(pipe, "full_finetune")


@pytest.mark.parametrize("name", ["custom_diffusion", "curriculum"])
def test_changed_weights_load_by_load_state_dict(name, tmp_path):
    pipe = fresh_pipeline(tmp_path / "base")
    for path in export(unbroken(name), tmp_path / "attack"):
        if path.name.startswith("learned_embeds"):
            pipe.load_textual_inversion(load_file(path))
        else:
            part = getattr(pipe, path.name.removesuffix("_delta.safetensors"))
            assert not part.load_state_dict(load_file(path), strict=False).unexpected_keys
    assert_same_images(pipe, name)


def test_nothing_to_export_is_said(tmp_path):
    with pytest.raises(UserError, match=r"attacks\.lora\.keep_weights=diverged"):
        export(Trajectory([0], {}, "diverged", {"attack": "lora", "form": "lora"}), tmp_path)
