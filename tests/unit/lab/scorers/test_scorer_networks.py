"""Feature networks, CLIP, LPIPS and NudeNet as scorers: distances, what they refuse, and the bundle
of them.
"""

from __future__ import annotations

import sys

import pytest
import torch
from pydantic import ValidationError

from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.scorers import load
from lab.scorers.clip import OpenClip
from lab.scorers.detector import Detector, DetectorNetwork, NudeNet
from lab.scorers.features import FeatureScorer, Lpips, map_distance
from lab.scorers.load import Scorers


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
    same, near, far = (features.distance(images, x) for x in (images, little, much))
    assert same.abs().max() < 1e-6
    assert (far > near).all()
    assert torch.allclose(features.distance(much, images), far)


def test_feature_scorer_refuses() -> None:
    with pytest.raises(ValidationError, match="image_size"):
        FeatureScorer(image_size=8)


def test_clip_refuses() -> None:
    with pytest.raises(UserError, match=r"scorers.clip.weights=x/evil.pt"):
        OpenClip(name="ViT-B-32", weights="x/evil.pt")


def test_nudenet_takes_the_highest_score(monkeypatch) -> None:
    """Through a stand-in of the package: blue comes first, several boxes count once, covered bodies
    do not.
    """

    class _Package:
        class NudeDetector:
            def __init__(self, model_path, inference_resolution) -> None:
                pass

            def detect(self, picture):
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
    scorer = Lpips(network="squeeze", batch=2)
    images = _images(3, seed=1)
    little = (images.float() * 0.95).round().to(torch.uint8)
    same, near, far = (scorer.distance(images, x) for x in (images, little, _images(3, seed=2)))
    assert same.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert (same < near).all()
    assert (near < far).all()
    assert torch.allclose(scorer.distance(little, images), near)


def test_a_retrained_scorer_changes_the_fingerprint(tmp_path, monkeypatch) -> None:
    shipped, mine = tmp_path / "shipped/clip/w", tmp_path / "mine.safetensors"
    shipped.parent.mkdir(parents=True)
    monkeypatch.setattr(load, "SHIPPED", tmp_path / "shipped")

    def fingerprint(name: str = "any name", seed: int = 0, **options) -> str:
        torch.manual_seed(seed)
        detector = Detector(DetectorNetwork(1, 1, 4), ("fox",), ("photo",))
        features = FeatureScorer(weights=str(mine), **options)
        scorers = Scorers(name=name, clip=OpenClip(), features=features, detector=detector)
        return scorers.fingerprint()

    seen = {fingerprint()}
    for file in (shipped, mine):
        for text in ("one", "two"):
            file.write_text(text)
            seen.add(fingerprint())
    assert len(seen) == 5
    assert fingerprint(image_size=64) not in seen
    assert fingerprint(seed=1) not in seen
