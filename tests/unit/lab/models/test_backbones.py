"""Chains against timm's own forward pass, and weights from every source."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
from assertions import same_weights
from PIL import Image, ImageOps
from pydantic import ValidationError
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from lab.core.data import Case, Split, Task
from lab.core.errors import UserError
from lab.core.images import stack
from lab.models.vision import PACKAGE_MODEL, VisionBackbone, VisionModel, chain, imagenet_package

TRANSFORMER = ("embed", *(f"block{i}" for i in range(12)), "norm")


def case(shape: tuple[int, ...] = (4, 3, 64, 64)) -> Case:
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(x, torch.arange(shape[0]) % 2)
    return Case("tiny", Task("benign", "benign", "classification", split, split, 2), ())


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("tf_efficientnet_lite0", {}, ("stem", *(f"stage{i}" for i in range(7)), "head")),
        ("resnet18", {}, ("stem", "layer1", "layer2", "layer3", "layer4")),
        ("vit_tiny_patch16_224", {"img_size": 64}, TRANSFORMER),
        ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg"}, TRANSFORMER),
        ("mobilenetv3_small_050", {}, ("body",)),
    ],
)
def test_chain_equals_timm(name: str, options: dict, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=0, **options).eval()
    side = options.get("img_size", 64)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
    model = VisionModel(chain(network), expected.shape[1], (0.0,) * 3, (1.0,) * 3, None)
    assert model.block_names == names
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        middle = len(model.blocks) // 2
        kept = model.run(model.inputs(x), 0, middle)
        before = kept.clone()
        assert torch.equal(model.run(kept, middle), expected)
    assert torch.equal(kept, before)  # no block changes what it was given: prefixes are shared


def test_inputs_scale_resize_and_normalise() -> None:
    backbone = VisionBackbone(model="tf_efficientnet_lite0", weights="random", image_size=32)
    model = backbone.build(case(), 0)
    x = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    assert torch.allclose(model.inputs(x), torch.ones(1, 3, 32, 32))  # (1 - 0.5) / 0.5
    assert torch.equal(model.inputs(x), model.inputs(torch.ones(1, 3, 64, 64)))


def test_random_weights_follow_the_seed_and_leave_the_global_stream_alone() -> None:
    backbone = VisionBackbone(model="resnet18", weights="random")
    state = torch.get_rng_state()
    assert not same_weights(backbone.build(case(), 0), backbone.build(case(), 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_package_weights_recognise_photographs() -> None:
    """Order-mapped weights classify real photographs as people do: the mapping is right."""
    portrait = Image.open(
        Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    ).convert("RGB")
    palace, daisy = (
        Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")
    )
    images = {652: portrait, 698: palace, 985: daisy}  # ImageNet: military uniform, palace, daisy
    network = timm.create_model(PACKAGE_MODEL, pretrained=False)
    network.load_state_dict(imagenet_package())
    x = stack(
        [
            np.asarray(ImageOps.fit(image, (224, 224), Image.Resampling.BICUBIC))
            for image in images.values()
        ]
    )
    with torch.no_grad():
        top = network.eval()((x / 255.0 - 0.5) / 0.5).argmax(1)
    assert top.tolist() == list(images)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    """With a classifier in it, or as this project saves a chain."""
    torch.manual_seed(3)
    network = timm.create_model("resnet18", pretrained=False, num_classes=7)
    save = save_file if suffix == ".safetensors" else torch.save
    path = tmp_path / f"network{suffix}"
    save(network.state_dict(), path)
    model = VisionBackbone(model="resnet18", weights=str(path)).build(case(), 0)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(
            model(x),
            network.eval().forward_head(network.forward_features(model.inputs(x)), pre_logits=True),
        )
    path = tmp_path / f"chain{suffix}"
    save(model.state_dict(), path)
    assert same_weights(VisionBackbone(model="resnet18", weights=str(path)).build(case(), 0), model)


def test_checkpoints_that_cannot_be_loaded_show_before_any_data(tmp_path: Path) -> None:
    other = timm.create_model("resnet34", pretrained=False)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    torch.save({"w": other}, tmp_path / "code.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    for path in (*tmp_path.iterdir(), tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match="cannot be loaded into resnet18") as refused:
            VisionBackbone(model="resnet18", weights=str(path))
        assert (refused.value.key, refused.value.value) == ("backbone.weights", str(path))


def test_a_missing_file_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is made by `python run"):
        VisionBackbone(
            model="resnet18",
            weights=str(tmp_path / "none.safetensors"),
            made_by="python run.py experiment=train_extractor",
        )


def test_options_that_cannot_work() -> None:
    with pytest.raises(ValidationError, match="image_size"):
        VisionBackbone(model="resnet18", weights="random", image_size=8)


def test_timm_weights_are_loaded_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub answers with a state dict that has a classifier; the features carry its weights."""
    from timm.models import _builder

    source = timm.create_model("resnet18", pretrained=False)
    monkeypatch.setattr(
        _builder, "load_state_dict_from_hf", lambda *a, **k: dict(source.state_dict())
    )
    model = VisionBackbone(model="resnet18", weights="timm").build(case(), 0)
    assert torch.equal(next(model.parameters()), source.conv1.weight)
