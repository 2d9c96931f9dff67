"""Pictures of unattacked models, painted once however many metrics, counts and runs ask for
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from eval.generation.scoring import memo
from lab.core.data import ConceptCase, Sampling
from lab.core.fingerprint import beside_weights
from lab.core.hashing import digest, stage_key
from lab.core.sources import source_hash
from lab.core.types import Model, RunView

# pictures; a block has latents of its own, so that a smaller count is the beginning of a larger one
BLOCK = 32


def paint(
    run: RunView,
    case: ConceptCase,
    seed: int,
    model_name: str,
    prompts: Sequence[str],
    sampling: Sampling,
    count: int,
) -> Tensor:
    """uint8 [count, 3, s, s] by one model; prompts start again where they run out.

    Latents depend on seed, case and number alone: models and settings share them. Pictures are
    those of any earlier run that had the same weights, from the stage cache.
    """
    model: list[Model] = []

    def built() -> Model:
        if not model:
            model.append(run.model(model_name, case, seed))
        return model[0]

    key, store = ("weights", case.name, seed, model_name), memo(run)
    if key not in store:
        sources = [source_hash(__name__), source_hash(type(built()).__module__)]
        weights = digest(*built().state_dict().values())
        store[key] = stage_key(weights=weights, beside=beside_weights(built()), sources=sources)

    def block(asked: list[str], number: int) -> dict[str, Tensor]:
        latents = built().latents(BLOCK, seed, "utility", case.name, number)[: len(asked)]
        return {"images": built().generate(asked, latents, sampling)}

    blocks = []
    for number, start in enumerate(range(0, count, BLOCK)):
        asked = [prompts[i % len(prompts)] for i in range(start, min(start + BLOCK, count))]
        settings = (sampling.steps, sampling.guidance, sampling.negative, sampling.precision)
        name = stage_key(
            model=store[key],
            case=case.name,
            seed=seed,
            number=number,
            prompts=asked,
            sampling=settings,
        )
        blocks.append(run.kept(name, partial(block, asked, number))["images"])
    return torch.cat(blocks)
