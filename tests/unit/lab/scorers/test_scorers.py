"""The scorers: detectors, feature networks, CLIP, LPIPS and the Fréchet distance."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from scipy.linalg import sqrtm

from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.scorers import load
from lab.scorers.clip import OpenClip
from lab.scorers.detector import Detector, DetectorNetwork, NudeNet, corrected_share, load_detector
from lab.scorers.features import (
    FeatureScorer,
    Lpips,
    floor,
    frechet_distance,
    kernel_distance,
    map_distance,
)
from lab.scorers.load import Scorers

OBJECTS, STYLES = ("fox", "whale", "violin"), ("photo", "mosaic")


def _images(n: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, 3, side, side), generator=generator(seed, "images"), dtype=torch.uint8
    )


class _FirstPixel(DetectorNetwork):
    """Says what the first pixel says: object index in red, style index in green."""

    def forward(self, images):
        x = (images[:, :, 0, 0] * 255).round().long()
        return 9.0 * F.one_hot(x[:, 0], 3), 9.0 * F.one_hot(x[:, 1], 2)


def _coded(objects: list[int], styles: list[int]) -> torch.Tensor:
    images = torch.zeros(len(objects), 3, 64, 64, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 1, 0, 0] = torch.tensor(objects), torch.tensor(styles)
    return images


@pytest.fixture
def detector() -> Detector:
    rates = {"fox": {"false_positive": 0.1, "false_negative": 0.2}}
    return Detector(_FirstPixel(3, 2, 4), OBJECTS, STYLES, rates=rates)


# ---- detector


@pytest.mark.parametrize(
    ("share", "false_positive", "false_negative", "true"),
    [
        (
            0.1 * 0.6 + 0.8 * 0.4,
            0.1,
            0.2,
            0.4,
        ),  # 40 % show it: 80 % of these are seen, and 10 % of the others
        (0.5, 0.0, 0.0, 0.5),
        (0.05, 0.1, 0.2, 0.0),  # fewer than the false alarms alone
        (0.95, 0.1, 0.2, 1.0),
    ],
)
def test_rogan_gladen(share, false_positive, false_negative, true) -> None:
    assert corrected_share(np.array([share]), false_positive, false_negative) == pytest.approx(
        [true]
    )


def test_a_coin_corrects_nothing() -> None:
    assert np.isnan(corrected_share(np.array([0.5, 1.0]), 0.6, 0.4)).all()


def test_detections(detector) -> None:
    images = _coded([0, 0, 0, 1, 2], [0, 1, 0, 1, 0])
    assert detector.detects(images, "fox").tolist() == [True, True, True, False, False]
    assert detector.detects(images, "mosaic").tolist() == [False, True, False, True, False]
    # softmax(9, 0, 0) is 0.99975
    assert not dataclasses.replace(detector, threshold=0.9999).detects(images, "fox").any()


def test_probabilities_are_calibrated_softmax() -> None:
    network = DetectorNetwork(3, 2, 4)
    temperature = {"object": 2.0, "style": 0.5}
    detector = Detector(network, OBJECTS, STYLES, temperature=temperature, batch=2)
    images = _images(5)
    logits, found = detector.logits(images), detector.probabilities(images)
    for head, t in temperature.items():
        assert torch.allclose(found[head], (logits[head] / t).softmax(1))
    whole = Detector(network, OBJECTS, STYLES, batch=5).logits(images)
    assert torch.allclose(whole["object"], logits["object"], atol=1e-5)


def test_detector_folder(tmp_path) -> None:
    detector = Detector(DetectorNetwork(3, 2, 4), OBJECTS, STYLES, threshold=0.3)
    folder = detector.save(tmp_path / "detector")
    again = load_detector(folder).save(tmp_path / "again")
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    facts = json.loads((folder / "detector.json").read_text())
    for damage in ({"width": 8}, {"temperature": {"object": 0, "style": 1}}, {"objects": 5}):
        (folder / "detector.json").write_text(json.dumps({**facts, **damage}))
        with pytest.raises(UserError, match=r"scorers.detector.folder=.*holds no detector"):
            load_detector(folder)
    (folder / "detector.json").write_text(json.dumps(facts))


# ---- Fréchet distance


def test_frechet_of_equal_sets_is_zero() -> None:
    for n in (40, 8):  # more and fewer vectors than dimensions
        x = torch.randn(n, 12, generator=generator(0, n))
        assert frechet_distance(x, x[torch.randperm(n, generator=generator(1))]) == pytest.approx(
            0, abs=1e-6
        )


def test_frechet_against_the_definition() -> None:
    a = torch.randn(50, 6, generator=generator(0), dtype=torch.float64) @ torch.diag(
        torch.arange(1.0, 7.0).double()
    )
    b = torch.randn(30, 6, generator=generator(1), dtype=torch.float64) + 2
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = np.real(sqrtm(cov_a @ cov_b))
    oracle = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(oracle, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(oracle, rel=1e-9)


def test_kernel_distance_by_hand() -> None:
    a, b = (torch.randn(n, 5, generator=generator(n), dtype=torch.float64) for n in (7, 9))
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b[:7], a), rel=1e-9)

    def mean(x: torch.Tensor, y: torch.Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(7) for j in range(7) if not same or i != j]
        return sum(float(x[i] @ y[j] / 5 + 1) ** 3 for i, j in pairs) / len(pairs)

    by_hand = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert kernel_distance(a, b) == pytest.approx(by_hand, rel=1e-9)


def test_frechet_floor_falls_with_more_images() -> None:
    real = torch.randn(400, 16, generator=generator(0))
    assert 0 < floor(real, 200, seed=0) < floor(real, 40, seed=0)
    assert floor(real, 40, seed=0) == floor(real, 40, seed=0)


# ---- networks


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

            def detect(self, image):
                blue, _, red = (int(x) for x in image[0, 0])
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
