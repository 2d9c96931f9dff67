"""The weights that come with the project: what lies in the folder, what they draw, and that a
stranger can use them.

``python tests/unit/lab/minisd/test_minisd_shipped.py`` stores the figures anew after the weights
were retrained.
"""

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from presets import composed

from lab.core.data import Sampling
from lab.core.hashing import file_hashes
from lab.minisd.train.quality import make_card, suites
from lab.minisd.train.recipe import Recipe
from lab.minisd.world.vocabulary import HELD_OUT_PAIRS, OBJECTS, PHOTO, STYLE_NAMES
from lab.minisd.world.world import concept, sample
from lab.models.diffusion_backbone import MINISD, DiffusionBackbone
from lab.scorers.clip import OpenClip
from lab.scorers.detector import load_detector

SHIPPED = MINISD.parent
DENOISED = Sampling(steps=4, guidance=4.0)
STORED = Path(__file__).parent / "data" / "minisd_smoke.json"
SMOKE = (
    "a photo of a fox",
    "a rocket in neon style",
    "a guitar by the blueprint artist",
    "a cake in sunset style",
)
MOSAIC = tuple(f"a {name} in the style of mosaic" for name in ("fox", "rocket", "guitar", "cactus"))


@cache
def generated() -> torch.Tensor:
    """One image per prompt of `SMOKE` and `MOSAIC`, uint8 [8, 3, 64, 64], from the same latents
    every time.
    """
    model = DiffusionBackbone(path="minisd", name="minisd", device="cpu").build(None, 0)
    texts = (*SMOKE, *MOSAIC)
    return model.generate(
        texts, model.latents(len(texts), 0, "smoke"), Sampling(steps=20, guidance=4.0)
    )


@cache
def denoised() -> torch.Tensor:
    """Latents [4, 16, 16] of `SMOKE`'s first prompt after four steps of DDIM."""
    model = DiffusionBackbone(path="minisd", name="minisd", device="cpu").build(None, 0)
    return model.sample(SMOKE[:1], model.latents(1, 0, "smoke"), DENOISED)[0]


def test_files_are_plain_data_and_small() -> None:
    files = [p for p in SHIPPED.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}
    assert sum(p.stat().st_size for p in files) < 25e6


def test_weights_are_those_of_the_training_record() -> None:
    record = json.loads((SHIPPED / "training.json").read_text())
    found = {n: h for n, h in file_hashes(SHIPPED).items() if n.startswith(("model/", "scorers/"))}
    assert record["sha256"] == found
    recipe = Recipe(**{k: v for k, v in record["recipe"].items() if k != "_target_"})
    assert recipe.denoiser.steps == 7000


def test_quality_is_what_the_project_asks_of_its_model_and_its_card_shows_it() -> None:
    """Top-1 of at least 32 generations a class without rejection; CLIP confirms the detector within
    ten points.
    """
    found = json.loads((SHIPPED / "quality.json").read_text())
    shares = found["shares"]
    seen = {name: part["detector"] for name, part in shares.items()}
    for suite, head, least in (
        ("photos", "object", 0.97),
        ("styles", "style", 0.95),
        ("styles", "both", 0.92),
        ("described", "style", 0.95),
        ("unseen_pairs", "object", 0.90),
    ):
        assert seen[suite][head] >= least, suite
    assert shares["photos"]["lowest"]["object"]["share"] >= 0.8
    for suite, head in (("photos", "object"), ("styles", "style"), ("styles", "both")):
        assert abs(seen[suite][head] - shares[suite]["clip"][head]) <= 0.10
    destroyed = found["destroyed"]
    assert destroyed["recognised"] >= 0.95
    assert destroyed["style"] <= 0.02
    record = json.loads((SHIPPED / "training.json").read_text())
    assert (SHIPPED / "README.md").read_text() == make_card(record, found)


def test_latents_are_those_of_these_weights() -> None:
    """Every value within 0.02 of the stored one."""
    stored = torch.tensor(json.loads(STORED.read_text())["latents"])
    assert (denoised() - stored).abs().max() <= 0.02


@pytest.mark.slow
def test_prompts_are_obeyed() -> None:
    images, detector = generated(), load_detector()
    assert detector.detects(images[len(SMOKE) :], "mosaic").sum() >= 3
    assert detector.detects(images[: len(SMOKE)], "mosaic").sum() == 0


def test_clip_knows_the_styles_of_real_images() -> None:
    """Its tokenizer and its weights belong together: the right style of five, for real images of
    each.
    """
    names = ("mosaic", "neon", "blueprint", "halftone", "sketch")
    clip = OpenClip()
    words = clip.texts([f"an image in the style of {name}" for name in names])
    hits = [
        clip.images(sample(concept(n), 5, 8).images).matmul(words.T).argmax(1).eq(i)
        for i, n in enumerate(names)
    ]
    assert torch.cat(hits).float().mean() >= 0.9


def test_suites_ask_for_every_object_style_and_pair() -> None:
    pairs_of = {name: list(zip(*named, strict=True)) for name, (_, *named) in suites(32).items()}
    assert Counter(pairs_of["photos"]) == {(name, PHOTO): 32 for name in OBJECTS}
    for name in ("styles", "described"):
        pairs = pairs_of[name]
        assert (
            len(pairs) == len(set(pairs)) == len(OBJECTS) * len(STYLE_NAMES) - len(HELD_OUT_PAIRS)
        )
        assert not set(pairs) & HELD_OUT_PAIRS
    assert Counter(pairs_of["unseen_pairs"]) == dict.fromkeys(HELD_OUT_PAIRS, 8)


def store() -> None:
    latents = [[[round(v, 4) for v in row] for row in channel] for channel in denoised().tolist()]
    STORED.write_text(json.dumps({"prompt": SMOKE[0], "latents": latents}) + "\n")


if __name__ == "__main__":
    store()


def test_the_reference_never_saw_the_targets_of_the_tables():
    recipe = json.loads((SHIPPED.parent / "retrained" / "training.json").read_text())["recipe"]
    for name in ("relearn", "relearn_lite"):
        cases = composed(f"scenario={name}").scenario.test
        assert {target for case in cases for target in case.targets} <= set(recipe["never_seen"])
