"""What MiniSD costs on this machine: ``python tests/benchmarks/minisd_speed.py``.

Prints seconds of wall time for loading it by diffusers and by the bench (imports not counted, the
second load of each, both alternating), for 32 pictures in 20 DDIM steps with guidance (the least of
three), and for rendering 20,000 pictures of the world, and what each stands to the time that is
asked of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diffusers import StableDiffusionPipeline

from lab.core.data import Sampling
from lab.minisd.train.quality import generate
from lab.minisd.world.world import TRAINING, sample
from lab.models.diffusion_backbone import MINISD, DiffusionBackbone

BARS = {
    "load, diffusers": 2.0,
    "load, this bench": 2.0,
    "32 pictures": 25.0,
    "20,000 training pictures": 60.0,
}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--threads", type=int, default=2, help="of torch, and processes that render"
    )
    parser.add_argument("--pictures", type=int, default=20_000, help="to render")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path = str(MINISD)
    loads: dict[str, Callable[[], object]] = {
        "load, diffusers": lambda: StableDiffusionPipeline.from_pretrained(path),
        "load, this bench": lambda: DiffusionBackbone(path=path, device="cpu").build(None, 0),
    }
    found: dict[str, float] = {}
    for _ in range(2):  # the first load imports
        found |= {name: seconds(load) for name, load in loads.items()}
    model = DiffusionBackbone(path=path, device="cpu").build(None, 0)
    prompts = ["a photo of a fox"] * 32
    found["32 pictures"] = min(
        seconds(lambda: generate(model, prompts, 0, "speed", Sampling(steps=20))) for _ in range(3)
    )
    found["20,000 training pictures"] = (
        seconds(lambda: sample(TRAINING, 0, given.pictures, workers=given.threads))
        * 20_000
        / given.pictures
    )
    for name, value in found.items():
        print(
            f"{name:28}{value:8.2f} s, {value / BARS[name]:.2f} of the {BARS[name]:g} s asked for"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
