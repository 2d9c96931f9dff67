"""The scorers that ship with MiniSD: losses, calibration, error rates, files. Tiny networks, a few
steps.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from lab.core.seeding import generator
from lab.minisd.train.networks import Schedule, Widths, build_vae
from lab.minisd.train.quality import _Scored, generation_rates, lowest, shares
from lab.minisd.train.scorers import (
    DETECTED,
    NAMES,
    WORLD,
    ClipWidths,
    ScorerRecipe,
    calibrate,
    clip_config,
    clip_network,
    clip_tokenizer,
    contrastive_loss,
    degenerate,
    degrade,
    detector_loss,
    draw,
    empty_scenes,
    labelled,
    measure,
    prototypes,
    quantise,
    save_clip,
    train_clip,
    train_detector,
    zero_shot,
)
from lab.minisd.world.vocabulary import HELD_OUT_OBJECTS, HELD_OUT_STYLES
from lab.minisd.world.world import TRAINING
from lab.scorers.clip import OpenClip
from lab.scorers.detector import Detector, DetectorNetwork, load_detector

STEPS = Schedule(steps=5, batch=16, lr=3e-3, warmup=2)
TINY = ClipWidths(embed=16, image=4, text=32, layers=1)


@pytest.fixture(scope="module")
def recipe() -> ScorerRecipe:
    return ScorerRecipe(
        images=48,
        calibrate=24,
        measure=24,
        empty=8,
        captions=2,
        vocabulary=600,
        smoothing=0.05,
        empty_share=0.25,
        clip=STEPS,
        detector=STEPS,
        clip_widths=TINY,
        width=8,
    )


@pytest.fixture(scope="module")
def data(recipe) -> dict[str, TensorDataset]:
    return {part: labelled(draw(recipe, 0, part)) for part in ("train", "calibrate", "measure")}


def test_world_of_the_scorers(recipe, data) -> None:
    """All classes are known, no image is shared between the parts or with MiniSD's training."""
    assert set(HELD_OUT_OBJECTS) < set(NAMES["object"])
    assert set(HELD_OUT_STYLES) < set(NAMES["style"])
    shown = {part: {p.stream for p in draw(recipe, 0, part).pictures} for part in data}
    assert len(set.union(*shown.values())) == 48 + 24 + 24
    assert WORLD != TRAINING


def test_degrade_is_mild_and_repeats() -> None:
    x = torch.rand(20, 3, 64, 64, generator=generator(0, "x"))
    y = degrade(x, generator(0, "faults"))
    assert torch.equal(y, degrade(x, generator(0, "faults")))
    assert torch.equal(y[:4], x[:4])  # a fifth stays
    assert (y[4:] != x[4:]).flatten(1).any(1).all()


def test_quantise_is_an_orthonormal_transform() -> None:
    x = torch.rand(1, 3, 16, 16, generator=generator(0, "x"))
    assert torch.allclose(quantise(x, 1e-6), x, atol=1e-5)
    assert 0 < (quantise(x, 0.5) - x).square().sum() < x.square().sum()


def test_detector_loss_by_hand() -> None:
    """Known label: cross-entropy. None: distance to the uniform distribution, 0 for equal
    logits.
    """
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    same = torch.zeros(2, 2)
    labels = (torch.tensor([0, -1]), torch.tensor([-1, -1]))
    expected = math.log(math.exp(2) + 2) - 2  # of the first image; the others give 0
    assert detector_loss((logits, same), labels, 0.0).item() == pytest.approx(
        expected / 2, rel=1e-5
    )
    sure = torch.tensor([[9.0, 0.0, 0.0]] * 2)
    assert detector_loss((sure, same), labels, 0.0) > detector_loss((logits, same), labels, 0.0)


def test_contrastive_loss_leaves_out_false_negatives() -> None:
    x = F.normalize(torch.randn(4, 8, generator=generator(0)), dim=1)
    y = F.normalize(torch.randn(4, 8, generator=generator(1)), dim=1)
    scale, apart = torch.tensor(10.0), torch.eye(4, dtype=torch.bool)
    plain = contrastive_loss(x, y, scale, apart)
    logits = 10 * x @ y.T
    oracle = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    assert torch.allclose(plain, oracle)
    twins = apart.clone()
    twins[0, 1] = twins[1, 0] = True
    rows = [
        logits[0, [0, 2, 3]],
        logits[1, [1, 2, 3]],
        logits[2, [2, 0, 1, 3]],
        logits[3, [3, 0, 1, 2]],
    ]
    columns = [
        logits[[0, 2, 3], 0],
        logits[[1, 2, 3], 1],
        logits[[2, 0, 1, 3], 2],
        logits[[3, 0, 1, 2], 3],
    ]
    by_hand = -sum(r.log_softmax(0)[0] for r in rows + columns) / 8
    assert torch.allclose(contrastive_loss(x, y, scale, twins), by_hand)


def test_trained_detector_is_stored(data, recipe, tmp_path) -> None:
    torch.manual_seed(0)
    model = DetectorNetwork(_N, _S, 8)
    broken = degenerate(build_vae(Widths(), 0), 0, recipe.empty)
    assert broken.tensors[2].unique().tolist() == [DETECTED["style"].index("degenerate")]
    parts = data["train"], data["calibrate"], empty_scenes(0, recipe.empty), broken
    rows = train_detector(model, *parts, recipe, seed=0)
    assert rows[-1].keys() == {"step", "loss", "object", "style", "both"}

    detector = Detector(model, *DETECTED.values())
    detector.temperature = calibrate(detector, data["calibrate"])
    again = load_detector(detector.save(tmp_path / "detector"))
    images = data["measure"].tensors[0]
    for head in ("object", "style"):
        assert torch.equal(again.probabilities(images)[head], detector.probabilities(images)[head])


_N, _S = (len(names) for names in DETECTED.values())


class _Oracle(DetectorNetwork):
    """Reads the answer from the first pixels: object index in red, style index in green, certainty
    in blue.
    """

    def forward(self, images):
        x = (images[:, :, 0, 0] * 255).round()
        objects, styles = F.one_hot(x[:, 0].long(), _N), F.one_hot(x[:, 1].long(), _S)
        return objects * x[:, 2:], styles * x[:, 2:]


def _coded(objects, styles, certainty) -> torch.Tensor:
    images = torch.zeros(len(objects), 3, 64, 64, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.stack([objects, styles, certainty], 1).to(torch.uint8)
    return images


def test_calibration_finds_the_temperature() -> None:
    """A detector that is right in three of four images with far too large logits: the optimum is
    known.
    """
    objects = torch.arange(40) % 40
    shown = torch.where(torch.arange(40) % 4 != 0, objects, (objects + 1) % _N)
    images = _coded(shown, shown % 11, torch.full((40,), 100))
    held_out = TensorDataset(images, objects, objects % 11)
    detector = Detector(_Oracle(_N, _S, 8), *DETECTED.values())
    found = calibrate(detector, held_out)
    logit = math.log(
        (_N - 1) * 0.75 / 0.25
    )  # softmax gives 3/4 to the class that is right in 3/4 of the images
    assert found["object"] == pytest.approx(min(20.0, 100 / logit), rel=1e-2)
    sure = TensorDataset(_coded(objects, objects % 11, torch.full((40,), 8)), objects, objects % 11)
    assert calibrate(detector, sure)["object"] < 1  # never wrong: as sharp as allowed
    ghost = TensorDataset(
        _coded(torch.tensor([3, 4]), torch.tensor([0, 0]), torch.tensor([20, 20])),
        *2 * (torch.full((2,), -1),),
    )
    assert (
        calibrate(detector, sure, ghost)["object"] > calibrate(detector, sure)["object"]
    )  # undecided about nothing


def test_error_rates_by_hand() -> None:
    """Two classes confused once each; one image too uncertain to count."""
    objects = torch.arange(_N).repeat(2)
    shown = objects.clone()
    shown[0] = 1  # object 0 taken for object 1
    certainty = torch.full((2 * _N,), 20)
    certainty[5] = 1  # below the threshold
    images = _coded(shown, shown % 11, certainty)
    detector = Detector(_Oracle(_N, _S, 8), *DETECTED.values())
    nothing = TensorDataset(
        _coded(torch.tensor([3, 4]), torch.tensor([0, 0]), torch.tensor([20, 0])),
        *2 * (torch.tensor([-1, -1]),),
    )
    last = torch.tensor([_S - 1, _S - 1, _S - 1, 2])
    broken = TensorDataset(
        _coded(torch.tensor([3, 4, 5, 6]), last, torch.tensor([20, 0, 20, 20])),
        *2 * (torch.full((4,), -1),),
    )
    facts = measure(detector, TensorDataset(images, objects, objects % 11), nothing, broken)
    assert facts["degenerate"] == {"recognised": 0.5, "style": 0.25, "object": 0.75}
    rates = [facts["rates"][name] for name in NAMES["object"]]
    assert rates[0] == {"false_positive": 0.0, "false_negative": 0.5}
    assert rates[1]["false_positive"] == pytest.approx(1 / (2 * _N - 2))
    assert facts["accuracy"]["object"] == pytest.approx(1 - 1 / (2 * _N))
    assert facts["empty_with_object"] == 0.5


@pytest.mark.slow
def test_trained_clip_is_an_ordinary_open_clip_folder(data, recipe, tmp_path) -> None:
    import open_clip

    captions = [p.captions(recipe.captions) for p in draw(recipe, 0, "train").pictures]
    folder = tmp_path / "clip"
    tokenizer = clip_tokenizer(captions, folder, recipe.vocabulary)
    config = clip_config(TINY, len(tokenizer))
    model = clip_network(config, 0)
    train_clip(model, data["train"], captions, data["calibrate"], tokenizer, STEPS, seed=0)

    save_clip(model, config, folder)
    ours = OpenClip(name=str(folder))
    images, words = (
        data["measure"].tensors[0],
        ["a photo of a fox", "an image in the style of mosaic"],
    )
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    from torchvision.transforms.functional import to_pil_image

    with torch.no_grad():
        pixels = torch.stack([preprocess(to_pil_image(x)) for x in images])
        assert torch.allclose(
            ours.images(images), theirs.eval().encode_image(pixels, normalize=True), atol=1e-5
        )
        ids = open_clip.get_tokenizer(f"local-dir:{folder}")(words)
        assert torch.allclose(ours.texts(words), theirs.encode_text(ids, normalize=True), atol=1e-5)


def test_zero_shot_by_prompt_ensembles() -> None:
    """Prototypes are means of unit vectors; ties to the nearest by cosine."""
    table = {"x": [1.0, 0, 0], "xy": [0.6, 0.8, 0], "z": [0, 0, 1.0]}
    classes = prototypes(
        lambda texts: torch.tensor([table[t] for t in texts]), {"flat": ["x", "xy"], "up": ["z"]}
    )
    mean = torch.tensor([0.8, 0.4, 0.0])
    assert torch.allclose(classes, torch.stack([mean / mean.norm(), torch.tensor([0, 0, 1.0])]))
    vectors = F.normalize(torch.tensor([[1.0, 0, 0.5], [0.1, 0, 1.0]]), dim=1)
    assert zero_shot(vectors, classes).tolist() == [0, 1]


def test_shares_by_hand() -> None:
    predicted = {
        "object": ["fox", "whale", "violin", "fox"],
        "style": ["photo", "neon", *["photo"] * 2],
    }
    wanted = {"object": ["fox", "whale", "fox", "fox"], "style": ["photo"] * 4}
    assert shares(predicted, wanted) == {"object": 0.75, "style": 0.75, "both": 0.5}
    assert shares(predicted, {"style": ["photo"] * 4}) == {"style": 0.75}
    assert lowest(["a", "b", "b"], ["a", "a", "b"]) == {"name": "a", "share": 0.5, "n": 2}


def test_error_rates_on_generations_by_hand() -> None:
    """25 images of a fox and 25 of a lion, by prompt and CLIP; what was never asked for keeps its
    rate of misses.
    """
    names = ["fox"] * 25 + ["lion"] * 25
    seen = torch.zeros(50, _N)
    seen[:20, NAMES["object"].index("fox")] = 0.9  # 5 foxes are missed
    seen[45:, NAMES["object"].index("fox")] = 0.9  # and seen in 5 lions
    styles = torch.zeros(50, _S)
    photos = ["photo"] * 50
    rates = {n: {"false_positive": 0.3, "false_negative": 0.2} for ns in NAMES.values() for n in ns}
    detector = Detector(_Oracle(_N, _S, 8), *DETECTED.values(), rates=rates)
    doubtful = ["lion", *names[1:]]  # CLIP does not agree about the first image
    scored = _Scored(
        {"object": seen, "style": styles},
        {"object": names, "style": photos},
        {"object": doubtful, "style": photos},
    )
    found = generation_rates(detector, [scored])
    assert found["fox"] == pytest.approx({"false_positive": 0.2, "false_negative": 5 / 24})
    assert found["unicorn"] == {"false_positive": 0.0, "false_negative": 0.2}
    assert found["photo"] == {"false_positive": 0.3, "false_negative": 1.0}
