"""Attackers on the tiny text-to-image model, with few steps and two images a snapshot."""

from dataclasses import replace
from functools import cache

import torch
from tiny_diffusion import tiny_concept, tiny_diffusion

from attacks.diffusion.curriculum import Curriculum
from attacks.diffusion.custom_diffusion import CustomDiffusion
from attacks.diffusion.dreambooth import DreamBooth
from attacks.diffusion.full_finetune import ConceptFullFinetune
from attacks.diffusion.lora import ConceptLora
from attacks.diffusion.textual_inversion import TextualInversion
from lab.core.data import Sampling
from lab.core.types import Budget

SAMPLING = Sampling(steps=2, guidance=2.0, count=2)
BUDGET = Budget(horizon=3, multiple=2, at=())  # snapshots 0, 3, 6
FAST = {"batch_size": 4, "sampling": SAMPLING, "clip": None}


@cache
def task(name="mosaic", role="harmful"):
    return tiny_concept(name, role, "style")


model = cache(tiny_diffusion)


def curriculum(**options):
    """Prior images with adapters on U-Net and text encoder, then a word, then adapters that use
    the word.
    """
    small = {"batch_size": 4, "clip": None}
    stages = {
        "related": {
            "data": "prior",
            "attack": ConceptLora(name="c.related", lr=0.05, text_encoder=True, **small),
        },
        "word": {"attack": TextualInversion(name="c.word", lr=0.5, **small)},
        "target": {
            "attack": ConceptLora(
                name="c.target", template="token", token="<concept>", lr=0.1, **small
            )
        },
    }
    return Curriculum(name="curriculum", sampling=SAMPLING, stages=stages, **options)


def attackers():
    """One of each kind, at a rate that moves the tiny model within six steps."""
    return {
        "lora": ConceptLora(name="lora", lr=0.05, **FAST),
        "lora_text": ConceptLora(
            name="lora_text", lr=0.02, rank=2, alpha=4, targets="all", text_encoder=True, **FAST
        ),
        "dreambooth": DreamBooth(name="dreambooth", lr=1e-3, **FAST),
        "full_finetune": ConceptFullFinetune(name="full_finetune", lr=1e-3, **FAST),
        "textual_inversion": TextualInversion(name="textual_inversion", lr=0.03, **FAST),
        "custom_diffusion": CustomDiffusion(name="custom_diffusion", lr=0.05, **FAST),
        "curriculum": curriculum(),
    }


def attack(name, **changes):
    """A changed attacker of `attackers`."""
    return replace(attackers()[name], **changes)


def launch(
    attacker,
    net=None,
    *,
    what=None,
    seed=0,
    budget=BUDGET,
    checkpoint=None,
):
    return attacker(net or model(), what or task(), seed=seed, budget=budget, checkpoint=checkpoint)


@cache
def trained(name):
    """The run of `attackers()[name]` from start to end, and the copy of the model it trained."""
    net, copied = tiny_diffusion(), tiny_diffusion()
    net.copy = lambda: copied
    return launch(attackers()[name], net), copied


def unbroken(name):
    return trained(name)[0]


def assert_equal(a, b):
    assert (a.steps, a.values, a.status, a.info) == (b.steps, b.values, b.status, b.info)
    for left, right in ((a.weights, b.weights), (a.samples, b.samples)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left)


def fresh_pipeline(folder):
    """The untouched tiny model as a plain diffusers pipeline, loaded from disk."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(str(model().save(folder)), safety_checker=None)
