"""A text-to-image model of Stable Diffusion's classes, small enough for second-order oracles, and a
case for it.
"""

import tempfile
from functools import cache
from pathlib import Path

import torch

from lab.core.data import CaptionedImages, Concept, ConceptCase, Erasure, Sampling
from lab.minisd.train.networks import (
    Widths,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    train_tokenizer,
)
from lab.minisd.world import world
from lab.minisd.world.captions import prompts
from lab.minisd.world.world import Subset, concept
from lab.models.diffusion import DiffusionModel

TINY = Widths(vae=(8, 8, 8), unet=(8, 16, 16), text=32, layers=1, groups=4)
sample = cache(world.sample)  # read only: `pictures` makes images of their own from it


@cache
def tokenizer():
    texts = [text for style in ("mosaic", "neon", "photo") for text in prompts("a fox", style)]
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(texts, Path(folder), 560)


def tiny_diffusion(seed=0, *, latent=8, dtype=torch.float32):
    """Random weights; latents 4 × ``latent`` × ``latent``, so images of 4 × ``latent`` pixels."""
    unet, vae = build_unet(TINY, seed), build_vae(TINY, seed)
    text = build_text_encoder(TINY, len(tokenizer()), seed)
    unet.register_to_config(sample_size=latent)
    return DiffusionModel(unet, vae, [text], [tokenizer()], build_scheduler()).to(dtype)


def draw_images(subset, seed, count, side=32):
    found = sample(subset, seed, count)
    small = torch.nn.functional.interpolate(found.images.float(), (side, side), mode="area")
    return CaptionedImages(small.round().to(torch.uint8), tuple(found.texts))


def tiny_concept(name, role, kind, count=4):
    here = concept(name)
    asked = prompts("a fox", name) if kind == "style" else prompts(f"a {name}")
    parts = [draw_images(here, seed, count) for seed in (1, 2, 3)]
    prior = draw_images(Subset(("fox", "panda")), 4, count)
    return Concept(name, role, kind, name, parts[0], parts[1], parts[2], prior, {"name": asked})


def tiny_case():
    """Two styles to protect against, one that must stay learnable, one object to practise on."""
    keep, unrelated = (
        draw_images(Subset(("fox", "panda")), 5, 6),
        draw_images(Subset(("lion", "frog")), 6, 4),
    )
    return ConceptCase(
        "tiny",
        targets=(
            tiny_concept("mosaic", "harmful", "style"),
            tiny_concept("neon", "harmful", "style"),
        ),
        others=(tiny_concept("halftone", "benign", "style"),),
        rehearsal=(tiny_concept("unicorn", "benign", "object"),),
        keep=keep,
        regularizers=tuple(keep.prompts) * 2,
        unrelated=unrelated,
        sampling=Sampling(steps=2, guidance=2.0, count=4),
        erased=tuple(map(erasure, ("mosaic", "neon", "halftone"))),
    )


def erasure(style):
    """A style that is mapped to the photo of the same object."""
    asked = tuple(f"a {name} in the style of {style}" for name in ("fox", "panda"))
    return Erasure(style, style, asked, ("a photo of a fox", "a photo of a panda"), ("a lion",))
