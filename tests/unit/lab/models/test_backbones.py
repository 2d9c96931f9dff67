"""Chains against timm's own forward pass, and weights from every source."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from lab.core.data import Case, Split, Task
from lab.core.errors import UserError
from lab.core.image_files import crop, stack
from lab.core.types import same_weights
from lab.models.activations import features, prefix
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
    count = sum(p.numel() for p in network.parameters())
    width = expected.shape[1]
    model = VisionModel(chain(network), width, (0.0,) * 3, (1.0,) * 3, None)
    assert model.block_names == names
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(any(True for _ in block.parameters()) for block in model.blocks)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        middle = len(model.blocks) // 2
        kept = model.run(model.inputs(x), 0, middle)
        before = kept.clone()
        assert torch.equal(model.run(kept, middle), expected)
    assert torch.equal(kept, before)  # no block changes what it was given: prefixes are shared


def test_published_resnet18_and_vit_b16_feature_widths() -> None:
    for name, width, parameters in (
        ("resnet18", 512, 11_176_512),
        ("vit_base_patch16_224", 768, 85_798_656),
    ):
        model = VisionBackbone(model=name, weights="random", name=name).build(case(), 0)
        assert model.feature_dim == width
        assert (
            sum(p.numel() for p in model.parameters()) == parameters
        )  # published size without the classifier


def test_inputs_scale_resize_and_normalise() -> None:
    backbone = VisionBackbone(model="tf_efficientnet_lite0", weights="random", image_size=32)
    model = backbone.build(case(), 0)
    x = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    assert torch.allclose(model.inputs(x), torch.ones(1, 3, 32, 32))  # (1 - 0.5) / 0.5
    assert torch.allclose(model.inputs(torch.zeros(1, 3, 32, 32)), -torch.ones(1, 3, 32, 32))
    assert torch.equal(model.inputs(x), model.inputs(torch.ones(1, 3, 64, 64)))


def test_builds_are_equal_and_independent() -> None:
    backbone = VisionBackbone(model="tf_efficientnet_lite0", weights="imagenet_package")
    first, second = backbone.build(case(), 0), backbone.build(case(), 1)
    assert same_weights(first, second)
    with torch.no_grad():
        next(first.parameters()).add_(1.0)
    assert not same_weights(first, second)
    assert same_weights(backbone.build(case(), 0), second)
    assert not first.train().training


def test_random_weights_follow_the_seed_and_leave_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make = lambda seed: VisionBackbone(model="resnet18", weights="random").build(case(), seed)  # noqa: E731
    a, b, c = make(0), make(0), make(1)
    assert torch.equal(torch.rand(3), expected)
    assert same_weights(a, b)
    assert not same_weights(a, c)


def test_features_do_not_depend_on_the_batch() -> None:
    model = VisionBackbone(model="tf_efficientnet_lite0", weights="imagenet_package").build(
        case(), 0
    )
    x = case((5, 3, 64, 64)).benign.train.x
    together, alone = (
        features(model, x),
        torch.cat([features(model, x[i : i + 1]) for i in range(5)]),
    )
    assert together.shape == (5, 1280)
    assert torch.allclose(together, alone, atol=1e-5)
    stop = len(model.blocks) - 2
    with torch.no_grad():
        assert torch.equal(model.run(prefix(model, x, stop), stop), together)


def test_package_weights_recognise_photographs() -> None:
    """Order-mapped weights classify real photographs as people do: the mapping is right."""
    portrait = Image.open(
        Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    ).convert("RGB")
    palace, daisy = (
        Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")
    )
    pictures = {652: portrait, 698: palace, 985: daisy}  # ImageNet: military uniform, palace, daisy
    network = timm.create_model(PACKAGE_MODEL, pretrained=False)
    network.load_state_dict(imagenet_package())
    x = stack([np.asarray(crop(picture, 224)) for picture in pictures.values()])
    with torch.no_grad():
        top = network.eval()((x / 255.0 - 0.5) / 0.5).argmax(1)
    assert top.tolist() == list(pictures)


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
        expected = network.eval().forward_head(
            network.forward_features(model.inputs(x)), pre_logits=True
        )
        assert torch.equal(model(x), expected)
    path = tmp_path / f"chain{suffix}"
    save(model.state_dict(), path)
    assert same_weights(VisionBackbone(model="resnet18", weights=str(path)).build(case(), 0), model)


class _Rude:
    def __reduce__(self):
        return (os.getcwd, ())


def test_checkpoints_that_cannot_be_loaded_show_before_any_data(tmp_path: Path) -> None:
    other = timm.create_model("resnet34", pretrained=False)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    grey = timm.create_model("resnet18", pretrained=False, in_chans=1)
    save_file(grey.state_dict(), tmp_path / "grey.safetensors")
    torch.save({"w": _Rude()}, tmp_path / "rude.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, content in (
        ("pickle.pth", pickle.dumps({"w": _Rude()}, protocol=2)),
        ("cut.safetensors", b"123"),
        ("cut.pth", b"PK\x03\x04broken"),
    ):
        (tmp_path / name).write_bytes(content)
    for path in (*tmp_path.iterdir(), tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match="cannot be loaded into resnet18") as refused:
            VisionBackbone(model="resnet18", weights=str(path))
        assert (refused.value.key, refused.value.value) == ("backbone.weights", str(path))


def test_options_that_cannot_work() -> None:
    with pytest.raises(ValidationError, match="image_size"):
        VisionBackbone(model="resnet18", weights="random", image_size=8)
    with pytest.raises(UserError, match=r"backbone\.model=resnet81: did you mean .*resnet18"):
        VisionBackbone(model="resnet81", weights="random").build(case(), 0)
    with pytest.raises(UserError, match=r"backbone\.weights=imagenet_package"):
        VisionBackbone(model="resnet18", weights="imagenet_package")
    with pytest.raises(UserError, match="takes images"):
        VisionBackbone(model="resnet18", weights="random").build(case((4, 10)), 0)


def test_hub_failure_names_the_key_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own loader runs; only its last step, the download, is cut off."""
    from timm.models import _builder

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", offline)
    monkeypatch.setattr(_builder, "load_state_dict_from_url", offline, raising=False)
    monkeypatch.setattr(_builder, "load_state_dict_from_hub", offline, raising=False)
    with pytest.raises(
        UserError, match=r"backbone\.weights=timm: .*ConnectionError: no route to host"
    ):
        VisionBackbone(model="resnet18", weights="timm").build(case(), 0)


def test_timm_weights_are_loaded_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub answers with a state dict that has a classifier; the features carry its weights."""
    from timm.models import _builder

    source = timm.create_model("resnet18", pretrained=False)
    monkeypatch.setattr(
        _builder, "load_state_dict_from_hf", lambda *a, **k: dict(source.state_dict())
    )
    model = VisionBackbone(model="resnet18", weights="timm").build(case(), 0)
    assert torch.equal(next(model.parameters()), source.conv1.weight)
