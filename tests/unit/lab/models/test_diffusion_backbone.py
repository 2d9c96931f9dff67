"""`backbone=sd` and `backbone=minisd`: what is loaded, and what is refused."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from assertions import same_weights
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_diffusion import tiny_case
from tiny_sd import tiny_pipeline

from lab.core.data import Sampling
from lab.core.errors import UserError
from lab.core.types import Backbone
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import DiffusionBackbone

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for layout in ("sd1", "sd2", "xl"):
        tiny_pipeline(layout).save_pretrained(root / layout)
    return root


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the SD 1.x folder that a test may spoil."""
    return Path(shutil.copytree(saved / "sd1", tmp_path / "model"))


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def load(path, **options):
    return DiffusionBackbone(path=str(path), **options).build(None, 0)


def refused(key, message, path, **options):
    with pytest.raises(UserError, match=message) as caught:
        load(path, **options)
    assert caught.value.key == key


# ---- what is loaded


@pytest.mark.parametrize("layout", ["sd1", "sd2", "xl"])
def test_every_layout_loads_and_generates(saved, layout):
    backbone = DiffusionBackbone(path=str(saved / layout), name=layout)
    assert isinstance(backbone, Backbone)
    model = backbone.build(None, 0)
    assert same_weights(model, DiffusionModel.from_pipeline(tiny_pipeline(layout)))
    assert (model.prediction, model.xl) == (
        "v_prediction" if layout == "sd2" else "epsilon",
        layout == "xl",
    )
    assert model.generate(["a fox"], model.latents(1, 0), Sampling(steps=2)).shape == (1, 3, 64, 64)


def test_half_precision_files_run_in_float32(tmp_path):
    pipe = tiny_pipeline("sd1").to(torch.float16)
    pipe.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert same_weights(model, DiffusionModel.from_pipeline(pipe.to(torch.float32)))


def test_bfloat16_and_a_variant(tmp_path):
    tiny_pipeline("sd1").to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    refused("backbone.path", "backbone.variant=bf16", tmp_path, variant="bf16")
    model = load(tmp_path, variant="fp16", dtype="bf16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_resolution(folder):
    edit_json(
        folder / "unet/config.json", _diffusers_version="0.6.0", sample_size=64
    )  # as SD v1-4's is
    model = load(folder, resolution=80)
    model.pipeline()  # diffusers takes a small sample_size in an old config for a mistake
    assert (model.image_size, model.latent_size) == (80, 10)
    assert model.generate(["a fox"], model.latents(1, 0), Sampling(steps=1)).shape == (1, 3, 80, 80)


def test_images_of_another_size_are_refused(saved):
    backbone = DiffusionBackbone(path=str(saved / "sd1"))
    with pytest.raises(UserError, match=r"64 × 64 pixels, the images of case tiny have 32 × 32"):
        backbone.build(tiny_case(), 0)


def test_attention_weights_under_their_old_names_load(folder):
    """The autoencoder of SD v1-4 is published with ``query``, ``key``, ``value`` and
    ``proj_attn``.
    """
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_file(file).items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = tensor
    save_file(old, file, {"format": "pt"})
    assert same_weights(load(folder), DiffusionModel.from_pipeline(tiny_pipeline("sd1")))


# ---- what is refused


def test_missing_folders_and_files(saved, tmp_path):
    (tmp_path / "sd.ckpt").write_bytes(b"x")
    for path in (saved / "sd11", saved, tmp_path / "sd.ckpt"):
        refused("backbone.path", "no such folder in diffusers layout.*from_single_file", path)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "unet/diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    refused("backbone.path", "unet: cannot be loaded", folder)


def test_missing_and_surplus_keys(folder):
    state = load_file(folder / WEIGHTS)
    missing = dict(list(state.items())[1:])
    for wrong in (missing, {**state, "extra.weight": torch.zeros(1)}):
        save_file(wrong, folder / WEIGHTS, {"format": "pt"})
        refused("backbone.path", "unet", folder)


def test_parts_of_other_packages_are_refused(folder):
    index = folder / "model_index.json"
    edit_json(index, _class_name="StableDiffusionPipeline", text_encoder=["evil", "CLIPTextModel"])
    refused("backbone.path", "its text_encoder must be transformers.CLIPTextModel", folder)


def test_options(saved):
    path = saved / "sd1"
    with pytest.raises(ValidationError, match="dtype"):
        load(path, dtype="fp61")
    refused("backbone.dtype", "on a CPU; use fp32", path, dtype="fp16", device="cpu")


# ---- the hub


def test_a_hub_name_downloads_safetensors_only_and_loads_the_folder(monkeypatch, saved):
    from diffusers import DiffusionPipeline

    download = Mock(return_value=str(saved / "sd1"))
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    model = load("some-owner/a-model", revision="abc")
    assert download.call_args.args == ("some-owner/a-model",)
    options = download.call_args.kwargs
    assert (options["use_safetensors"], options["revision"]) == (True, "abc")
    assert same_weights(model, DiffusionModel.from_pipeline(tiny_pipeline("sd1")))
