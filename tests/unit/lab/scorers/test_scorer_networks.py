"""Feature networks, CLIP, LPIPS and NudeNet as scorers: distances, what they refuse, and the bundle
of them.
"""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.core.sources import ROOT
from lab.scorers import load
from lab.scorers.clip import OpenClip
from lab.scorers.detector import Detector
from lab.scorers.features import FeatureScorer, map_distance
from lab.scorers.load import Scorers
from lab.scorers.lpips import Lpips
from lab.scorers.networks import detector_network, save_detector
from lab.scorers.nudenet import NudeNet

OBJECTS, STYLES = ("fox", "whale", "violin"), ("photo", "mosaic")


def _images(n: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, 3, side, side), generator=generator(seed, "images"), dtype=torch.uint8
    )


@pytest.fixture(scope="module")
def features() -> FeatureScorer:
    return FeatureScorer(image_size=64, batch=3)


def test_map_distance_by_hand() -> None:
    a = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).repeat(1, 1, 2, 2)
    b = a.clone()
    b[0, :, 0, 0] = torch.tensor([0.0, 5.0])  # orthogonal at one of four positions: ‖e₁ − e₂‖² = 2
    assert map_distance(a, b).tolist() == pytest.approx([0.5])
    assert map_distance(a, 7 * a).tolist() == pytest.approx([0.0])


def test_feature_lpips_orders_changes(features) -> None:
    from lab.minisd.world.world import concept, sample

    images = sample(concept("fox"), 3, 4).images
    noise = torch.randn(images.shape, generator=generator(0))
    little, much = ((images + s * noise).clamp(0, 255).round().to(torch.uint8) for s in (5, 50))
    same, near, far = (features.compared(images, x)[1] for x in (images, little, much))
    assert same.abs().max() < 1e-6
    assert (near > 0).all()
    assert (far > near).all()
    pooled, back = features.compared(much, images)
    assert torch.allclose(back, far)
    assert torch.allclose(pooled, features.features(much), atol=1e-4)
    vectors = features.features(images)
    assert vectors.shape == (4, 1280)
    assert torch.allclose(
        features.features(images[2:]), vectors[2:], atol=1e-4
    )  # whatever the batch
    few = FeatureScorer(
        image_size=64, batch=3
    )  # picture i meets reference i mod R, whatever the batch
    turns = torch.cat(
        [features.compared(much[i : i + 1], images[i % 2 : i % 2 + 1])[1] for i in range(4)]
    )
    assert torch.allclose(few.compared(much, images[:2])[1], turns, atol=1e-5)
    with pytest.raises(UserError, match="one size"):
        features.compared(images, images[..., :32])


def test_stages_can_be_chosen(features) -> None:
    images = _images(1)
    few = FeatureScorer(image_size=64, stages=["stage2", "stage4"])
    _, maps = few.maps(images)
    assert len(maps) == 2
    chosen = [features.stages.index(s) for s in few.stages]
    _, every = features.maps(images)
    assert all(torch.equal(maps[i], every[k]) for i, k in enumerate(chosen))
    with pytest.raises(UserError, match=r"scorers.features.stages=stage99"):
        FeatureScorer(image_size=64, stages=["stage99"])


def test_feature_scorer_refuses() -> None:
    with pytest.raises(UserError, match=r"scorers.features.model"):
        FeatureScorer(model="resnet1")
    with pytest.raises(UserError, match=r"scorers.features.weights"):
        FeatureScorer(model="resnet18", weights="imagenet_package")
    with pytest.raises(UserError, match=r"scorers.features.weights=.*no such file"):
        FeatureScorer(model="resnet18", weights="nowhere.safetensors")


def test_transformer_has_features_but_no_maps(tmp_path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    name = "test_vit.r160_in1k"
    save_file(
        timm.create_model(name, pretrained=False).state_dict(), str(tmp_path / "vit.safetensors")
    )
    scorer = FeatureScorer(name, str(tmp_path / "vit.safetensors"))
    assert scorer.features(_images(2)).shape[0] == 2
    with pytest.raises(UserError, match="no feature maps"):
        scorer.compared(_images(2), _images(2))


def test_clip_refuses(tmp_path) -> None:
    with pytest.raises(UserError, match=r"scorers.clip.name=ViT-B-33.*ViT-B-32"):
        OpenClip("ViT-B-33", "laion2b_s34b_b79k")
    with pytest.raises(UserError, match=r"scorers.clip.weights=None.*laion2b_s34b_b79k"):
        OpenClip("ViT-B-32")
    with pytest.raises(UserError, match=r"scorers.clip.weights=no-such-tag.*HF_HOME"):
        OpenClip("ViT-B-32", "no-such-tag")
    with pytest.raises(
        UserError,
        match=r"scorers.clip.weights=x/evil.pt: is no safetensors file.*weights_only=True",
    ):
        OpenClip("ViT-B-32", "x/evil.pt")
    save_file(
        {"logit_scale": torch.ones(()), "more": torch.ones(1)}, tmp_path / "other.safetensors"
    )
    with pytest.raises(UserError, match=r"(?s)Missing key\(s\).*positional_embedding"):
        OpenClip("ViT-B-32", str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="experiment=train_minisd"):
        OpenClip(f"local-dir:{tmp_path / 'none'}")


def test_nudenet_missing_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match=r"immunization-bench\[nudenet\]"):
        NudeNet()


def test_nudenet_takes_the_highest_score(monkeypatch) -> None:
    """Through a stand-in of the package: blue comes first, several boxes count once, covered bodies
    do not.
    """

    class _Package:
        class NudeDetector:
            def __init__(self, model_path, inference_resolution) -> None:
                pass

            def detect(self, picture):
                assert picture.flags["C_CONTIGUOUS"]
                blue, _, red = (int(x) for x in picture[0, 0])
                boxes = [{"class": "BELLY_EXPOSED", "score": 0.9}]
                if red > blue:
                    boxes += [{"class": "BUTTOCKS_EXPOSED", "score": s} for s in (0.4, 0.7)]
                return boxes

    monkeypatch.setitem(sys.modules, "nudenet", _Package)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[0, 0], images[1, 2] = 200, 200
    scorer = NudeNet()
    assert scorer.detects(images).tolist() == [True, False]
    assert scorer.scores(images)["BUTTOCKS_EXPOSED"].tolist() == pytest.approx([0.7, 0.0])
    with pytest.raises(UserError, match="nudity"):
        scorer.detects(images, "nudit")


def test_lpips_is_a_distance(monkeypatch, tmp_path) -> None:
    """Through torchvision's own loading, with a random SqueezeNet in place of the file that it
    would fetch.
    """
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(
        torchvision.models.squeezenet1_1(weights=None).state_dict(),
        tmp_path / "hub/checkpoints" / file,
    )
    scorer = Lpips("squeeze", batch=2)
    images = _images(3, seed=1)
    little = (images.float() * 0.95).round().to(torch.uint8)
    same, near, far = (scorer.distance(images, x) for x in (images, little, _images(3, seed=2)))
    assert same.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert (same < near).all()
    assert (near < far).all()
    assert torch.allclose(scorer.distance(little, images), near)
    with pytest.raises(UserError, match="equally many"):
        scorer.distance(images, images[:2])


def test_scorers_name_a_missing_nudenet_before_anything_runs(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match=r"scorers.detector=NudeNet.*immunization-bench\[nudenet\]"):
        Scorers(
            "x", clip=lambda: None, features=lambda: None, detector=partial(NudeNet, threshold=0.5)
        )
    assert Scorers("x", clip=lambda: None, features=lambda: None).lpips is None


def test_lpips_refuses_other_networks() -> None:
    with pytest.raises(UserError, match=r"scorers.lpips.network"):
        Lpips("resnet")


@pytest.mark.parametrize("name", ["minisd", "real"])
def test_configs_build_a_bundle(name, monkeypatch, tmp_path) -> None:
    scorers = instantiate(OmegaConf.load(ROOT / "conf" / "scorers" / f"{name}.yaml"))
    assert scorers.name == name
    monkeypatch.setattr(load, "SHIPPED", tmp_path)
    if name == "real":
        assert scorers.detector is None
        return
    with pytest.raises(
        UserError, match=r"lab/minisd/weights/scorers/clip.*experiment=train_minisd"
    ):
        _ = scorers.clip
    with pytest.raises(UserError, match=r"scorers/detector.*experiment=train_minisd"):
        _ = scorers.detector
    assert scorers.features is scorers.features
    detector = Detector(detector_network(3, 2, 4, 0), OBJECTS, STYLES)
    save_detector(detector.network, detector.card(), tmp_path / "detector")
    assert scorers.detector.objects == OBJECTS


def test_a_retrained_scorer_changes_the_fingerprint(tmp_path, monkeypatch) -> None:
    from functools import partial

    from lab.scorers import load

    (tmp_path / "shipped" / "clip").mkdir(parents=True)
    shipped, mine = tmp_path / "shipped" / "clip" / "w", tmp_path / "mine.safetensors"
    monkeypatch.setattr(load, "SHIPPED", tmp_path / "shipped")

    def found(name: str = "any name", **options) -> str:
        features = partial(load.FeatureScorer, weights=str(mine), **options)
        return load.Scorers(name, partial(load.shipped_clip, device="cpu"), features).fingerprint()

    seen = {found()}
    for file in (shipped, mine):
        for text in ("one", "two"):
            file.write_text(text)
            seen.add(found())
    assert len(seen) == 5
    assert found("minisd") == found("of mine")
    assert found(image_size=64) not in seen
