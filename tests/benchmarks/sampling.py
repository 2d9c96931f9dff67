"""What fewer and cheaper sampling steps cost in quality: ``python tests/benchmarks/sampling.py
--threads 1``.

The shipped MiniSD generates the same prompts from the same latents with the sampler, steps and
precision of every row.
Printed: seconds, their ratio to the first row's, the share in which the shipped detector's
likeliest class is the object, the style or both that were asked for, and the mean distance to the
first row's images in grey levels of 255. ``--objects``: how many, each in all styles. The last row
fuses the projections of every attention layer (diffusers).
"""

import sys
import time
from pathlib import Path

import torch
from options import parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.core.data import Sampling
from lab.minisd.train.quality import generate, prompts_for, shares
from lab.minisd.world.vocabulary import OBJECTS, STYLE_NAMES
from lab.models.diffusion_backbone import DiffusionBackbone
from lab.scorers.detector import load_detector

ROWS = [
    Sampling("ddim", 20),
    Sampling("ddim", 8),
    Sampling("ddim", 5),
    Sampling("dpm", 6),
    Sampling("dpm", 4),
    Sampling("dpm", 3),
    Sampling("ddim", 8, precision="bfloat16"),
    Sampling("dpm", 4, precision="bfloat16"),
]


def main() -> int:
    given = parse(__doc__, threads=2, objects=16, seed=0)
    torch.set_num_threads(given.threads)
    model = DiffusionBackbone(path="minisd", device="cpu").build(None, given.seed)
    detector = load_detector()
    pairs = [(o, s) for s in STYLE_NAMES for o in OBJECTS[: given.objects]]
    prompts, objects, styles = prompts_for(pairs, 1)
    first, spent = torch.empty(0), 0.0
    print(f"{len(prompts)} images, {given.threads} thread(s)")
    for sampling, form in [*((row, "") for row in ROWS), (Sampling("dpm", 4), "fused, ")]:
        if form:
            model.unet.fuse_qkv_projections()
        started = time.perf_counter()
        images = generate(model, prompts, given.seed, "sampling", sampling)
        wall = time.perf_counter() - started
        if not spent:
            first, spent = images, wall
        found = shares(detector.top1(images), {"object": objects, "style": styles})
        told = ", ".join(f"{name} {share:.1%}" for name, share in found.items())
        apart = (images.float() - first.float()).abs().mean().item()
        print(
            f"{sampling.sampler} {sampling.steps:2} steps, {form}{sampling.precision:9} "
            f"{wall:6.1f} s, {wall / spent:.2f} ×; {told}; "
            f"{apart:.1f} apart",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
