"""Judges of generated pictures: corrections, distances, zero-shot shares, and what they refuse."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm

from lab.errors import UserError
from lab.judges import load
from lab.judges.clip import OpenClip
from lab.judges.detector import Detector, corrected_share, load_detector
from lab.judges.features import FeatureJudge, map_distance
from lab.judges.frechet import floor, frechet_distance
from lab.judges.load import Judges
from lab.judges.lpips import Lpips
from lab.judges.networks import DetectorNetwork, detector_network, save_detector
from lab.judges.nudenet import NudeNet
from lab.judges.quality import detected, prototypes, recognised, share_right, zero_shot
from lab.seeding import generator
from lab.sources import ROOT

OBJECTS, STYLES = ("fox", "whale", "violin"), ("photo", "mosaic")


def _images(n: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=generator(seed, "images"), dtype=torch.uint8)


class _Told(DetectorNetwork):
    """Says what the first pixel says: object index in red, style index in green."""

    def forward(self, images):
        x = (images[:, :, 0, 0] * 255).round().long()
        return 9.0 * F.one_hot(x[:, 0], 3), 9.0 * F.one_hot(x[:, 1], 2)


def _told(objects: list[int], styles: list[int]) -> torch.Tensor:
    images = torch.zeros(len(objects), 3, 64, 64, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 1, 0, 0] = torch.tensor(objects), torch.tensor(styles)
    return images


@pytest.fixture
def detector() -> Detector:
    rates = {"fox": {"false_positive": 0.1, "false_negative": 0.2}}
    return Detector(_Told(3, 2, 4), OBJECTS, STYLES, rates=rates)


# ---- detector


@pytest.mark.parametrize(
    ("share", "false_positive", "false_negative", "true"),
    [
        (0.1 * 0.6 + 0.8 * 0.4, 0.1, 0.2, 0.4),  # 40 % show it: 80 % of these are seen, and 10 % of the others
        (0.5, 0.0, 0.0, 0.5),
        (0.05, 0.1, 0.2, 0.0),  # fewer than the false alarms alone
        (0.95, 0.1, 0.2, 1.0),
    ],
)
def test_rogan_gladen(share, false_positive, false_negative, true) -> None:
    assert corrected_share(np.array([share]), false_positive, false_negative) == pytest.approx([true])


def test_a_coin_corrects_nothing() -> None:
    assert np.isnan(corrected_share(np.array([0.5, 1.0]), 0.6, 0.4)).all()
    with pytest.raises(UserError, match=r"false_positive=1.2"):
        corrected_share(np.array([0.5]), 1.2, 0.1)


def test_detections(detector) -> None:
    images = _told([0, 0, 0, 1, 2], [0, 1, 0, 1, 0])
    assert detector.detects(images, "fox").tolist() == [True, True, True, False, False]
    assert detector.detects(images, "mosaic").tolist() == [False, True, False, True, False]
    assert not detector.detects(images, "fox", threshold=0.9999).any()  # softmax(9, 0, 0) is 0.99975
    with pytest.raises(UserError, match="did you mean whale"):
        detector.detects(images, "whales")


def test_probabilities_are_calibrated_softmax() -> None:
    network = detector_network(3, 2, 4, 0)
    temperature = {"object": 2.0, "style": 0.5}
    detector = Detector(network, OBJECTS, STYLES, temperature=temperature, batch=2)
    images = _images(5)
    logits, found = detector.logits(images), detector.probabilities(images)
    for head, t in temperature.items():
        assert torch.allclose(found[head], (logits[head] / t).softmax(1))
        assert torch.allclose(found[head].sum(1), torch.ones(5))
    whole = Detector(network, OBJECTS, STYLES, batch=5).logits(images)
    assert torch.allclose(whole["object"], logits["object"], atol=1e-5)
    assert not logits["object"].requires_grad


def test_detector_folder(tmp_path) -> None:
    detector = Detector(detector_network(3, 2, 4, 0), OBJECTS, STYLES, threshold=0.3)
    folder = save_detector(detector.network, detector.card(), tmp_path / "detector")
    assert load_detector(folder).card() == detector.card()
    facts = json.loads((folder / "detector.json").read_text())
    (folder / "detector.json").write_text(json.dumps({**facts, "width": 8}))
    with pytest.raises(UserError, match=r"another network \(tensors: \d+ misshapen, first trunk"):
        load_detector(folder)
    for damage in (
        {"temperature": 5}, {"temperature": {"object": 0, "style": 1}}, {"objects": 5}, {"width": "4"},
        {"rates": {"fox": {"false_positive": 2, "false_negative": 0}}}, {"rates": 3},
    ):  # fmt: skip
        (folder / "detector.json").write_text(json.dumps({**facts, **damage}))
        with pytest.raises(UserError, match=r"detector\.json: is damaged"):
            load_detector(folder)
    (folder / "detector.json").write_text(json.dumps(facts))
    whole = load_file(folder / "detector.safetensors")
    for kind, tensors in (
        ("1 missing, first object.bias", {k: v for k, v in whole.items() if k != "object.bias"}),
        ("1 surplus, first more", {**whole, "more": torch.zeros(1)}),
    ):
        save_file(tensors, folder / "detector.safetensors")
        with pytest.raises(UserError, match=kind):
            load_detector(folder)
    save_file(whole, folder / "other.safetensors")
    (folder / "detector.safetensors").unlink()
    torch.save(whole, folder / "detector.pt")
    with pytest.raises(UserError, match=r"Convert it once and name detector\.safetensors") as refused:
        load_detector(folder)
    told = str(refused.value)
    command = shlex.split(told[told.index("`") + 1 : told.rindex("`")])
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], cwd=folder, check=True, timeout=120)
    assert load_detector(folder).card() == detector.card()
    (folder / "detector.json").write_text(json.dumps({"width": 4}))
    with pytest.raises(UserError, match="lacks"):
        load_detector(folder)
    (folder / "detector.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        load_detector(folder)
    with pytest.raises(UserError, match="experiment=train_minisd"):
        load_detector(tmp_path / "nowhere")


@pytest.mark.parametrize("images", [torch.rand(2, 3, 8, 8), _images(2)[0], _images(2)[:, :1], _images(2)[:0]])
def test_judges_refuse_what_is_no_picture(detector, images) -> None:
    with pytest.raises(UserError, match="images="):
        detector.top1(images)


# ---- quality


def test_detected_shares_by_hand(detector) -> None:
    images = _told([0, 1, 2, 0], [0, 1, 0, 0])
    found = detected(
        detector, images, objects=["fox", "whale", "fox", "fox"], styles=["photo", "photo", "photo", "photo"]
    )
    assert found == {"object": 0.75, "style": 0.75, "both": 0.5}
    assert detected(detector, images, styles=["photo", "mosaic", "photo", "photo"]) == {"style": 1.0}
    with pytest.raises(UserError, match="is no object"):
        detected(detector, images, objects=["mosaic"] * 4)
    with pytest.raises(UserError, match="one label per picture"):
        detected(detector, images, objects=["fox"])
    with pytest.raises(UserError, match="labels"):
        detected(detector, images)
    with pytest.raises(UserError, match="at least one"):
        share_right([], [])


def test_zero_shot_by_prompt_ensembles() -> None:
    """Prototypes are means of unit vectors; ties to the nearest by cosine."""
    table = {"x": [1.0, 0, 0], "xy": [0.6, 0.8, 0], "z": [0, 0, 1.0]}
    encode = lambda texts: torch.tensor([table[t] for t in texts])  # noqa: E731
    found = prototypes(encode, {"flat": ["x", "xy"], "up": ["z"]})
    mean = torch.tensor([0.8, 0.4, 0.0])
    assert torch.allclose(found, torch.stack([mean / mean.norm(), torch.tensor([0, 0, 1.0])]))
    vectors = F.normalize(torch.tensor([[1.0, 0, 0.5], [0.1, 0, 1.0]]), dim=1)
    assert zero_shot(vectors, found).tolist() == [0, 1]
    shares = recognised(vectors, {"object": (("flat", "up"), found)}, objects=["flat", "flat"])
    assert shares == {"object": 0.5}
    with pytest.raises(UserError, match="at least one prompt"):
        prototypes(encode, {"flat": []})


# ---- Fréchet distance


def test_frechet_of_equal_sets_is_zero() -> None:
    for n in (40, 8):  # more and fewer vectors than dimensions
        x = torch.randn(n, 12, generator=generator(0, n))
        assert frechet_distance(x, x[torch.randperm(n, generator=generator(1))]) == pytest.approx(0, abs=1e-6)


def test_frechet_against_the_definition() -> None:
    a = torch.randn(50, 6, generator=generator(0), dtype=torch.float64) @ torch.diag(torch.arange(1.0, 7.0).double())
    b = torch.randn(30, 6, generator=generator(1), dtype=torch.float64) + 2
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = np.real(sqrtm(cov_a @ cov_b))
    oracle = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(oracle, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(oracle, rel=1e-9)
    few = b[:4]  # a singular covariance
    root = np.real(sqrtm(cov_a @ np.cov(few.numpy().T) + 1e-14 * np.eye(6)))
    near = ((a.mean(0) - few.mean(0)) ** 2).sum().item() + np.trace(cov_a + np.cov(few.numpy().T) - 2 * root)
    assert frechet_distance(a, few) == pytest.approx(near, rel=1e-4)


def test_frechet_of_gaussians() -> None:
    """N(0, 1) against N(3, 4) in each of five dimensions: 5 · (9 + (1 − 2)²) = 50."""
    a = torch.randn(20_000, 5, generator=generator(0))
    b = 2 * torch.randn(20_000, 5, generator=generator(1)) + 3
    assert frechet_distance(a, b) == pytest.approx(50, rel=0.02)


def test_frechet_floor_falls_with_more_pictures() -> None:
    real = torch.randn(400, 16, generator=generator(0))
    assert 0 < floor(real, 200, seed=0) < floor(real, 40, seed=0)
    assert floor(real, 40, seed=0) == floor(real, 40, seed=0)
    with pytest.raises(UserError, match="needs 402"):
        floor(real, 201, seed=0)
    with pytest.raises(UserError, match="two or more"):
        frechet_distance(real[:1], real)
    with pytest.raises(UserError, match="same dimension"):
        frechet_distance(real[:, :3], real)


# ---- features


@pytest.fixture(scope="module")
def features() -> FeatureJudge:
    return FeatureJudge(image_size=64, batch=3)


def test_map_distance_by_hand() -> None:
    a = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).repeat(1, 1, 2, 2)
    b = a.clone()
    b[0, :, 0, 0] = torch.tensor([0.0, 5.0])  # orthogonal at one of four positions: ‖e₁ − e₂‖² = 2
    assert map_distance(a, b).tolist() == pytest.approx([0.5])
    assert map_distance(a, 7 * a).tolist() == pytest.approx([0.0])


def test_feature_lpips_orders_changes(features) -> None:
    from lab.minisd.world import concept, sample

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
    assert torch.allclose(features.features(images[2:]), vectors[2:], atol=1e-4)  # whatever the batch
    few = FeatureJudge(image_size=64, batch=3)  # picture i meets reference i mod R, whatever the batch
    turns = torch.cat([features.compared(much[i : i + 1], images[i % 2 : i % 2 + 1])[1] for i in range(4)])
    assert torch.allclose(few.compared(much, images[:2])[1], turns, atol=1e-5)
    with pytest.raises(UserError, match="one size"):
        features.compared(images, images[..., :32])


def test_stages_can_be_chosen(features) -> None:
    images = _images(1)
    few = FeatureJudge(image_size=64, stages=["stage2", "stage4"])
    _, maps = few.maps(images)
    assert len(maps) == 2
    chosen = [features.stages.index(s) for s in few.stages]
    _, every = features.maps(images)
    assert all(torch.equal(maps[i], every[k]) for i, k in enumerate(chosen))
    with pytest.raises(UserError, match=r"judges.features.stages=stage99"):
        FeatureJudge(image_size=64, stages=["stage99"])


def test_feature_judge_refuses() -> None:
    with pytest.raises(UserError, match=r"judges.features.model"):
        FeatureJudge(model="resnet1")
    with pytest.raises(UserError, match=r"judges.features.weights"):
        FeatureJudge(model="resnet18", weights="imagenet_package")
    with pytest.raises(UserError, match=r"judges.features.weights=.*no such file"):
        FeatureJudge(model="resnet18", weights="nowhere.safetensors")


def test_transformer_has_features_but_no_maps(tmp_path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    name = "test_vit.r160_in1k"
    save_file(timm.create_model(name, pretrained=False).state_dict(), str(tmp_path / "vit.safetensors"))
    judge = FeatureJudge(name, str(tmp_path / "vit.safetensors"))
    assert judge.features(_images(2)).shape[0] == 2
    with pytest.raises(UserError, match="no feature maps"):
        judge.compared(_images(2), _images(2))


# ---- CLIP, LPIPS, NudeNet and the bundle: what a missing piece says


def test_clip_refuses(tmp_path) -> None:
    with pytest.raises(UserError, match=r"judges.clip.name=ViT-B-33.*ViT-B-32"):
        OpenClip("ViT-B-33", "laion2b_s34b_b79k")
    with pytest.raises(UserError, match=r"judges.clip.weights=None.*laion2b_s34b_b79k"):
        OpenClip("ViT-B-32")
    with pytest.raises(UserError, match=r"judges.clip.weights=no-such-tag.*HF_HOME"):
        OpenClip("ViT-B-32", "no-such-tag")
    with pytest.raises(UserError, match=r"judges.clip.weights=x/evil.pt: is no safetensors file.*weights_only=True"):
        OpenClip("ViT-B-32", "x/evil.pt")
    save_file({"logit_scale": torch.ones(()), "more": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"(?s)Missing key\(s\).*positional_embedding"):
        OpenClip("ViT-B-32", str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="experiment=train_minisd"):
        OpenClip(f"local-dir:{tmp_path / 'none'}")


def test_nudenet_missing_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match=r"immunization-bench\[nudenet\]"):
        NudeNet()


def test_nudenet_takes_the_highest_score(monkeypatch) -> None:
    """Through a stand-in of the package: blue comes first, several boxes count once, covered bodies do not."""

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
    judge = NudeNet()
    assert judge.detects(images).tolist() == [True, False]
    assert judge.scores(images)["BUTTOCKS_EXPOSED"].tolist() == pytest.approx([0.7, 0.0])
    with pytest.raises(UserError, match="nudity"):
        judge.detects(images, "nudit")


def test_lpips_is_a_distance(monkeypatch, tmp_path) -> None:
    """Through torchvision's own loading, with a random SqueezeNet in place of the file that it would fetch."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "hub/checkpoints" / file)
    judge = Lpips("squeeze", batch=2)
    images = _images(3, seed=1)
    little = (images.float() * 0.95).round().to(torch.uint8)
    same, near, far = (judge.distance(images, x) for x in (images, little, _images(3, seed=2)))
    assert same.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert (same < near).all()
    assert (near < far).all()
    assert torch.allclose(judge.distance(little, images), near)
    with pytest.raises(UserError, match="equally many"):
        judge.distance(images, images[:2])


def test_judges_name_a_missing_nudenet_before_anything_runs(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match=r"judges.detector=NudeNet.*immunization-bench\[nudenet\]"):
        Judges("x", clip=lambda: None, features=lambda: None, detector=partial(NudeNet, threshold=0.5))
    assert Judges("x", clip=lambda: None, features=lambda: None).lpips is None


def test_lpips_refuses_other_networks() -> None:
    with pytest.raises(UserError, match=r"judges.lpips.network"):
        Lpips("resnet")


@pytest.mark.parametrize("name", ["minisd", "real"])
def test_configs_build_a_bundle(name, monkeypatch, tmp_path) -> None:
    judges = instantiate(OmegaConf.load(ROOT / "conf" / "judges" / f"{name}.yaml"))
    assert judges.name == name
    monkeypatch.setattr(load, "SHIPPED", tmp_path)
    if name == "real":
        assert judges.detector is None
        return
    with pytest.raises(UserError, match=r"lab/minisd/weights/judges/clip.*experiment=train_minisd"):
        _ = judges.clip
    with pytest.raises(UserError, match=r"judges/detector.*experiment=train_minisd"):
        _ = judges.detector
    assert judges.features is judges.features
    detector = Detector(detector_network(3, 2, 4, 0), OBJECTS, STYLES)
    save_detector(detector.network, detector.card(), tmp_path / "detector")
    assert judges.detector.objects == OBJECTS


def test_a_retrained_judge_changes_the_fingerprint(tmp_path, monkeypatch) -> None:
    from functools import partial

    from lab.judges import load

    (tmp_path / "shipped" / "clip").mkdir(parents=True)
    shipped, mine = tmp_path / "shipped" / "clip" / "w", tmp_path / "mine.safetensors"
    monkeypatch.setattr(load, "SHIPPED", tmp_path / "shipped")

    def found(name: str = "any name", **options) -> str:
        features = partial(load.FeatureJudge, weights=str(mine), **options)
        return load.Judges(name, partial(load.shipped_clip, device="cpu"), features).fingerprint()

    seen = {found()}
    for file in (shipped, mine):
        for text in ("one", "two"):
            file.write_text(text)
            seen.add(found())
    assert len(seen) == 5
    assert found("minisd") == found("of mine")
    assert found(image_size=64) not in seen
