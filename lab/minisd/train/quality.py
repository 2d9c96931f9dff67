"""Measure MiniSD: what share of its images shows what the prompt names, beside the same scorers on
real images. Write its model card.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from lab.core.data import Sampling
from lab.core.images import grid
from lab.core.seeding import derive
from lab.minisd.train.degenerate import destroyed
from lab.minisd.train.scorers import NAMES, blind, class_prompts, prototypes, zero_shot
from lab.minisd.world.captions import By, noun, prompts
from lab.minisd.world.openmoji import CREDIT
from lab.minisd.world.vocabulary import (
    HELD_OUT_OBJECTS,
    HELD_OUT_PAIRS,
    HELD_OUT_STYLES,
    OBJECTS,
    PHOTO,
    STYLE_NAMES,
)
from lab.minisd.world.world import TRAINING, UNSEEN_PAIRS, Subset, sample
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import DiffusionBackbone
from lab.scorers.clip import OpenClip
from lab.scorers.detector import Detector, Head, Rates, load_detector
from lab.scorers.features import FeatureScorer, floor, frechet_distance

_LEAST = 20  # images behind an error rate
PromptSet = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
"""Prompts, and the object and the style that each names."""


def prompts_for(pairs: Sequence[tuple[str, str]], each: int, by: By = "name") -> PromptSet:
    """Return ``each`` prompts for every (object, style) pair, cycling through the ways to say
    it.
    """
    rows = []
    for name, style in pairs:
        ways = prompts(noun(name), style, by)
        rows += [(ways[i % len(ways)], name, style) for i in range(each)]
    texts, objects, styles = zip(*rows, strict=True)
    return texts, objects, styles


def suites(scale: int) -> dict[str, PromptSet]:
    """Return the prompts of every suite.

    ``scale`` = 32 asks 32 times for every object in photos, once for every seen pair (by name, and
    by description: 32 or more of every style) and 8 times for every held-out pair. Others ask in
    proportion, below 32 of fewer pairs.
    """
    seen = [(o, s) for s in STYLE_NAMES for o in OBJECTS if (o, s) not in HELD_OUT_PAIRS]
    few, seen = max(1, scale // 32), seen[:: max(1, 32 // scale)]
    return {
        "photos": prompts_for([(o, PHOTO) for o in OBJECTS], scale),
        "styles": prompts_for(seen, few),
        "described": prompts_for(seen, few, "description"),
        "unseen_pairs": prompts_for(sorted(HELD_OUT_PAIRS), max(1, 8 * scale // 32)),
    }


def shares(
    predicted: Mapping[Head, Sequence[str]], wanted: Mapping[Head, Sequence[str]]
) -> dict[str, float]:
    """Return the share of images whose likeliest class is the wanted one: ``object``, ``style``
    and, with both, ``both``. Absolute top-1 over all classes, without rejection, in [0, 1].
    """
    hits: dict[str, Any] = {
        head: np.array(predicted[head]) == np.array(names) for head, names in wanted.items()
    }
    if len(hits) == 2:
        hits["both"] = hits["object"] & hits["style"]
    return {name: float(hit.mean()) for name, hit in hits.items()}


def lowest(predicted: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """Return the class with the lowest accuracy: its ``name``, the ``share`` right among its images
    and their number ``n``. Of several with an equal share the first by name.
    """
    counts = Counter(wanted)
    right = Counter(w for p, w in zip(predicted, wanted, strict=True) if p == w)
    share, name = min((right[name] / n, name) for name, n in counts.items())
    return {"name": name, "share": share, "n": counts[name]}


class _Scored(NamedTuple):
    """What the detector and the small CLIP make of images, and what their prompts name."""

    probabilities: Mapping[Head, Tensor]
    wanted: Mapping[Head, Sequence[str]]
    by_clip: Mapping[Head, Sequence[str]]


def generation_rates(detector: Detector, scored: Sequence[_Scored]) -> Rates:
    """Return the detector's error rates on generated images, concept by concept.

    Nobody labelled the images. One counts as showing a concept where its prompt names it and the
    small CLIP agrees, and as not showing it where neither does; others do not count. A rate
    without at least 20 such images is that of the detector on worn real images.
    """
    rates: Rates = {}
    for head in NAMES:
        p = torch.cat([part.probabilities[head] for part in scored])
        wanted = np.array([name for part in scored for name in part.wanted[head]])
        by_clip = np.array([name for part in scored for name in part.by_clip[head]])
        for i, name in enumerate(NAMES[head]):
            seen = (p[:, i] >= detector.threshold).numpy()
            by_prompt, agreed = wanted == name, by_clip == name
            rates[name] = dict(detector.rates[name])
            for rate, labelled in (
                ("false_positive", ~by_prompt & ~agreed),
                ("false_negative", by_prompt & agreed),
            ):
                if labelled.sum() >= _LEAST:
                    share = float(seen[labelled].mean())
                    rates[name][rate] = share if rate == "false_positive" else 1 - share
    return rates


def measure(model: DiffusionModel, scorers: Path, *, seed: int, scale: int = 32) -> dict[str, Any]:
    """Measure every figure of the model card.

    Args:
        scorers: the folder of the detector and of the small CLIP.
        scale: see `suites`; the card's figures use 32. The Fréchet distance takes 16 × ``scale``
            generations, with captions drawn as in training.

    Returns:
        ``shares``: suite → scorer → object, style, both in [0, 1], and ``lowest``, the object and
        the style that the detector meets least often; ``real`` the same on real images;
        ``generation_rates``; ``destroyed``, what the detector makes of images of destroyed copies
        (`blind`); ``frechet`` with its ``floor``. Scorers: ``detector``, ``clip`` (zero-shot).
    """
    sampling = Sampling(steps=8)  # as the scenarios (tests/benchmarks/sampling.py)
    count = 16 * scale
    clip, detector = OpenClip(name=str(scorers / "clip")), load_detector(scorers / "detector")
    features = FeatureScorer(image_size=128).features  # as conf/scorers/minisd.yaml
    all_prompts: dict[Head, dict[str, list[str]]] = {
        "object": class_prompts("object", None),
        "style": class_prompts("style"),
    }
    classes = {head: prototypes(clip.texts, texts) for head, texts in all_prompts.items()}

    scored: list[_Scored] = []

    def score(images: Tensor, objects: Sequence[str], styles: Sequence[str]) -> dict[str, Any]:
        wanted: dict[Head, Sequence[str]] = {"object": objects, "style": styles}
        by_detector, vectors = detector.top1(images), clip.images(images)
        by_clip: dict[Head, list[str]] = {
            head: [NAMES[head][i] for i in zero_shot(vectors, table).tolist()]
            for head, table in classes.items()
        }
        scored.append(_Scored(detector.probabilities(images), wanted, by_clip))
        return {
            "detector": shares(by_detector, wanted),
            "clip": shares(by_clip, wanted),
            "lowest": {head: lowest(by_detector[head], names) for head, names in wanted.items()},
            "n": len(images),
        }

    generated = {}
    for name, (texts, objects, styles) in suites(scale).items():
        generated[name] = score(generate(model, texts, seed, name, sampling), objects, styles)
    rates = generation_rates(detector, scored)
    every = suites(1)
    texts = (*every["photos"][0][:16], *every["styles"][0][:16])
    broken = torch.cat([*destroyed(model, texts, derive(seed, "quality", "destroyed"))])
    subsets = {
        "photos": Subset(OBJECTS, (PHOTO,), two_share=0.0),
        "styles": Subset(OBJECTS, STYLE_NAMES, pairs="seen", two_share=0.0),
        "unseen_pairs": UNSEEN_PAIRS,
    }
    real = {}
    for name, subset in subsets.items():
        drawn = sample(subset, derive(seed, "quality", "real"), count)
        objects, styles = zip(*((p.objects[0], p.style) for p in drawn.pictures), strict=True)
        real[name] = score(drawn.images, objects, styles)
    captions = sample(TRAINING, derive(seed, "quality", "captions"), count).texts
    images = generate(model, captions, seed, "fidelity", sampling)
    reference = sample(TRAINING, derive(seed, "quality", "fidelity"), 2 * count).images
    real_features = features(reference)
    return {
        "shares": generated,
        "real": real,
        "generation_rates": rates,
        "destroyed": {**blind(detector, broken), "images": len(broken)},
        "sampling": {"steps": sampling.steps, "guidance": sampling.guidance},
        "frechet": {
            "distance": frechet_distance(features(images), real_features[:count]),
            "floor": floor(real_features, count, seed=seed),
            "images": float(count),
        },
    }


def generate(
    model: DiffusionModel, texts: Sequence[str], seed: int, label: str, sampling: Sampling
) -> Tensor:
    """Return images uint8 [n, 3, s, s], the same for the same seed and label."""
    return model.generate(texts, model.latents(len(texts), seed, "quality", label), sampling)


def showcase(model: DiffusionModel, *, seed: int) -> Any:
    """Return a labelled grid of one image per style and object, as a PIL image."""
    styles, names = (PHOTO, *STYLE_NAMES), ("fox", "rocket", "guitar", "cactus", "cake")
    texts, _, _ = prompts_for([(name, style) for style in styles for name in names], 1)
    images = generate(model, texts, seed, "showcase", Sampling())
    return grid(images.unflatten(0, (len(styles), len(names))), styles, names)


def make_card(record: Mapping[str, Any], quality: Mapping[str, Any]) -> str:
    """Return the model card beside the weights, from the training record and the measured
    quality.
    """
    data = ModelCardData(
        license="cc-by-sa-4.0", library_name="diffusers", pipeline_tag="text-to-image"
    )
    worn = record["detector"]["worn"]["rates"]
    values = {
        "record": record,
        "quality": quality,
        "objects": OBJECTS,
        "styles": STYLE_NAMES,
        "held_out_objects": HELD_OUT_OBJECTS,
        "held_out_styles": HELD_OUT_STYLES,
        "held_out_pairs": HELD_OUT_PAIRS,
        "most_missed": max(worn, key=lambda name: worn[name]["false_negative"]),
        "credit": CREDIT,
    }
    template = str(Path(__file__).with_name("card.md"))
    return f"{ModelCard.from_template(data, template, **values)}\n"


def assess(folder: Path, record: Mapping[str, Any], seed: int, scale: int) -> None:
    """Measure the model in ``folder``; writes ``quality.json``, ``samples.png``, the detector's
    error rates on generations and, from these and the training record, the model card
    ``README.md``.
    """
    model = DiffusionBackbone(path=str(folder / "model")).build(None, seed)
    quality = measure(model, folder / "scorers", seed=derive(seed, "quality"), scale=scale)
    detector = load_detector(folder / "scorers" / "detector")
    replace(detector, rates=quality.pop("generation_rates")).save(folder / "scorers" / "detector")
    (folder / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    showcase(model, seed=derive(seed, "showcase")).save(folder / "samples.png")
    (folder / "README.md").write_text(make_card(record, quality))
