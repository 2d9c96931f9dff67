"""How good MiniSD is: what share of its pictures shows what was asked for, beside the same scorers
on real pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lab.core.data import Sampling
from lab.core.images import grid
from lab.core.seeding import derive
from lab.core.training import progress
from lab.minisd.train.scorer_data import NAMES, class_prompts
from lab.minisd.world.captions import By, noun, prompts
from lab.minisd.world.vocabulary import HELD_OUT_PAIRS, OBJECTS, PHOTO, STYLE_NAMES
from lab.minisd.world.world import TRAINING, UNSEEN_PAIRS, Subset, sample
from lab.models.diffusion import DiffusionModel
from lab.scorers.detector import Head
from lab.scorers.features import floor, frechet_distance
from lab.scorers.load import Scorers
from lab.scorers.quality import detected, lowest, prototypes, recognised


@dataclass(frozen=True)
class Asked:
    """Prompts with what each asks for."""

    prompts: tuple[str, ...]
    objects: tuple[str, ...]
    styles: tuple[str, ...]


def asked(pairs: Sequence[tuple[str, str]], each: int, by: By = "name") -> Asked:
    """``each`` prompts for every (object, style) pair, cycling through the ways to say it."""
    rows = []
    for name, style in pairs:
        ways = prompts(noun(name), style, by)
        rows += [(ways[i % len(ways)], name, style) for i in range(each)]
    texts, objects, styles = zip(*rows, strict=True)
    return Asked(texts, objects, styles)


def suites(scale: int) -> dict[str, Asked]:
    """What MiniSD is asked for.

    ``scale`` = 32 asks 32 times for every object in photos, once for every seen pair (by name, and
    by description: 32 or more of every style) and 8 times for every held-out pair. Others ask in
    proportion, below 32 of fewer pairs.
    """
    seen = [(o, s) for s in STYLE_NAMES for o in OBJECTS if (o, s) not in HELD_OUT_PAIRS]
    few, seen = max(1, scale // 32), seen[:: max(1, 32 // scale)]
    return {
        "photos": asked([(o, PHOTO) for o in OBJECTS], scale),
        "styles": asked(seen, few),
        "described": asked(seen, few, "description"),
        "unseen_pairs": asked(sorted(HELD_OUT_PAIRS), max(1, 8 * scale // 32)),
    }


def measure(
    model: DiffusionModel, scorers: Scorers, *, seed: int, scale: int = 32, steps: int = 20
) -> dict[str, Any]:
    """Every figure of the model card.

    Args:
        scale: see `suites`; the card's figures use 32. The Fréchet distance takes 16 × ``scale``
            generations, with captions drawn as in training.

    Returns:
        ``shares``: suite → scorer → object, style, both in [0, 1], and ``lowest``, the object and
        the style that the detector meets least often; ``real`` the same on real pictures;
        ``frechet`` with its ``floor``. Scorers: ``detector``, ``clip`` (zero-shot).
    """
    sampling = Sampling(steps=steps)
    zero: dict[Head, tuple[tuple[str, ...], torch.Tensor]] = {
        "object": (NAMES["object"], prototypes(scorers.clip.texts, class_prompts("object", None))),
        "style": (NAMES["style"], prototypes(scorers.clip.texts, class_prompts("style"))),
    }

    def shares(
        images: torch.Tensor, objects: Sequence[str], styles: Sequence[str]
    ) -> dict[str, Any]:
        seen = detected(scorers.detector, images, objects=objects, styles=styles)  # type: ignore[arg-type]
        likeliest = scorers.detector.top1(images)  # type: ignore[union-attr]
        worst = {
            "object": lowest(likeliest["object"], objects),
            "style": lowest(likeliest["style"], styles),
        }
        met = recognised(scorers.clip.images(images), zero, objects=objects, styles=styles)
        return {"detector": seen, "clip": met, "lowest": worst, "n": len(images)}

    found: dict[str, Any] = {
        "shares": {},
        "real": {},
        "sampling": {"steps": steps, "guidance": sampling.guidance},
    }
    for name, wanted in suites(scale).items():
        images = generate(model, wanted.prompts, seed, name, sampling)
        found["shares"][name] = shares(images, wanted.objects, wanted.styles)
    world = {
        "photos": Subset(OBJECTS, (PHOTO,), two_share=0.0),
        "styles": Subset(OBJECTS, STYLE_NAMES, pairs="seen", two_share=0.0),
        "unseen_pairs": UNSEEN_PAIRS,
    }
    for name, subset in world.items():
        real = sample(subset, derive(seed, "quality", "real"), 16 * scale)
        objects, styles = zip(*((p.objects[0], p.style) for p in real.pictures), strict=True)
        found["real"][name] = shares(real.images, objects, styles)
    found["frechet"] = _frechet(model, scorers, seed, 16 * scale, sampling)
    return found


def generate(
    model: DiffusionModel, texts: Sequence[str], seed: int, label: str, sampling: Sampling
) -> torch.Tensor:
    """Pictures uint8 [n, 3, s, s], the same for the same seed and label."""
    latents = model.latents(len(texts), seed, "quality", label)
    starts = range(0, len(texts), 32)
    parts = [
        model.generate(texts[i : i + 32], latents[i : i + 32], sampling)
        for i in progress(starts, label, len(starts))
    ]
    return torch.cat(parts)


def _frechet(
    model: DiffusionModel, scorers: Scorers, seed: int, count: int, sampling: Sampling
) -> dict[str, float]:
    real = sample(TRAINING, derive(seed, "quality", "fidelity"), 2 * count)
    features = scorers.features.features(real.images)
    texts = sample(TRAINING, derive(seed, "quality", "captions"), count).texts
    made = scorers.features.features(generate(model, texts, seed, "fidelity", sampling))
    distance = frechet_distance(made, features[:count])
    return {
        "distance": distance,
        "floor": floor(features, count, seed=seed),
        "pictures": float(count),
    }


def showcase(
    model: DiffusionModel,
    *,
    seed: int,
    names: Sequence[str] = ("fox", "rocket", "guitar", "cactus", "cake"),
) -> Any:
    """A labelled grid of one picture per style and object, as a PIL image."""
    styles = (PHOTO, *STYLE_NAMES)
    wanted = asked([(name, style) for style in styles for name in names], 1)
    images = generate(model, wanted.prompts, seed, "showcase", Sampling())
    return grid(images.unflatten(0, (len(styles), len(names))), styles, tuple(names))
