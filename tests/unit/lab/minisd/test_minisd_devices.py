"""MiniSD's losses on another device, without owning one: shapes and places are followed, numbers
are not computed.

Under `FakeTensorMode` the networks lie on "meta"; whatever stays in main memory and meets them is
an error, as it would be on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_diffusion import TINY
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lab.core.seeding import generator
from lab.minisd.train import build, training
from lab.minisd.train import scorer_clip as scorer_clip
from lab.minisd.train import scorers as scorers
from lab.minisd.train.loop import Schedule
from lab.minisd.train.scorer_data import NAMES, Labelled
from lab.minisd.world.vocabulary import OBJECTS
from lab.scorers.networks import ClipWidths, clip_config, clip_network, detector_network

STEPS = Schedule(steps=1, batch=4, lr=1e-3)
TEXTS = [f"a photo of a {name}" for name in OBJECTS[:8]]
ELSEWHERE = torch.device("meta")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return build.train_tokenizer(TEXTS, tmp_path_factory.mktemp("words"), 600)


@pytest.fixture(scope="module")
def shown() -> Labelled:
    images = torch.randint(0, 256, (8, 3, 64, 64), generator=generator(0, "images")).to(torch.uint8)
    return Labelled(images, torch.arange(8), torch.arange(8) % len(NAMES["style"]))


@pytest.fixture
def steps(monkeypatch) -> list[Any]:
    """What each training hands to the loop: its model, its step and its validation."""
    found: list[Any] = []

    def caught(model, step, schedule, *, validate, **_: Any) -> None:
        found.append((model, step, validate))

    for module in (training, scorers, scorer_clip):
        monkeypatch.setattr(module, "train", caught)
        monkeypatch.setattr(
            module, "degrade", lambda images, _: images, raising=False
        )  # by numbers that it draws
        monkeypatch.setattr(
            module, "round_to_half", lambda model: model, raising=False
        )  # of a trained network
    monkeypatch.setattr(scorers, "noise_pictures", lambda n, side, _: torch.zeros(n, 3, side, side))
    return found


def check(found: list[Any]) -> None:
    ((model, step, _),) = found
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss: Tensor = step(0, generator(0, "step"))
        assert loss.device == ELSEWHERE
        grads = torch.autograd.grad(
            loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        assert sum(g is not None for g in grads) > len(grads) / 2


def test_autoencoder(steps, shown) -> None:
    vae = build.vae(TINY, 0).to(ELSEWHERE)
    training.train_vae(
        vae, shown.images, shown.images, STEPS, kl=1e-3, seed=0, checkpoint=None, log=print
    )
    check(steps)


def test_denoiser(steps, words) -> None:
    tokenizer = build.load_tokenizer(words)
    model = training.TextToImageNetwork(
        build.unet(TINY, 0), build.text_encoder(TINY, len(tokenizer), 0)
    ).to(ELSEWHERE)
    draw = generator(0, "latents")
    latents = (torch.randn(8, 4, 16, 16, generator=draw), torch.ones(8, 4, 16, 16))
    training.train_denoiser(
        model,
        tokenizer,
        build.scheduler(),
        latents,
        [[t] for t in TEXTS],
        (latents, TEXTS),
        STEPS,
        gamma=5,
        drop=0.1,
        seed=0,
        checkpoint=None,
        log=print,
    )
    check(steps)


def test_detector(steps, shown) -> None:
    model = detector_network(len(NAMES["object"]), len(NAMES["style"]), 8, 0).to(ELSEWHERE)
    scorers.train_detector(
        model,
        shown,
        shown,
        shown,
        STEPS,
        smoothing=0.05,
        empty_share=0.5,
        seed=0,
        checkpoint=None,
        log=print,
    )
    check(steps)


def test_clip(steps, shown, words) -> None:
    config = clip_config(
        ClipWidths(image=4, blocks=(1, 1, 1, 1), layers=1), len(build.load_tokenizer(words))
    )
    model = clip_network(config, 0).to(ELSEWHERE)
    data = scorer_clip.clip_data(shown, [[t] for t in TEXTS], shown, words)
    scorer_clip.train_clip(model, data, words, STEPS, seed=0, checkpoint=None, log=print)
    check(steps)
