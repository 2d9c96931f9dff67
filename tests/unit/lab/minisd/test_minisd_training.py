"""MiniSD's parts and losses: contracts and hand values."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_diffusion import TINY
from torch import nn
from torch.distributions import Normal, kl_divergence

from lab.core.seeding import generator
from lab.core.types import same_weights
from lab.minisd.train import build
from lab.minisd.train.training import (
    Schedule,
    encode,
    min_snr,
    to_float,
    train_denoiser,
    train_vae,
)
from lab.minisd.world.world import TRAINING, sample


@pytest.fixture(scope="module")
def shown():
    return sample(TRAINING, 0, 24)


# parts


def test_parts_are_stable_diffusions_and_follow_the_seed() -> None:
    vae, unet, text = build.vae(TINY, 0), build.unet(TINY, 0), build.text_encoder(TINY, 600, 0)
    z = vae.encode(torch.zeros(2, 3, 64, 64)).latent_dist.mean
    assert z.shape == (2, 4, 16, 16)
    assert vae.decode(z).sample.shape == (2, 3, 64, 64)
    hidden = text(torch.full((2, 32), 599))[0]
    assert hidden.shape == (2, 32, TINY.text)
    assert unet(z, torch.tensor([0, 999]), hidden).sample.shape == z.shape
    for make in (build.vae, build.unet, lambda w, s: build.text_encoder(w, 600, s)):
        assert same_weights(make(TINY, 1), make(TINY, 1))
        assert not same_weights(make(TINY, 1), make(TINY, 2))


def test_scheduler_is_stable_diffusions() -> None:
    """Scaled linear: √β runs evenly from √0.00085 to √0.012."""
    alphas = build.scheduler().alphas_cumprod
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert torch.allclose(alphas.double(), (1 - betas).cumprod(0), atol=1e-5)


# losses


def test_min_snr_by_hand() -> None:
    """SNR = ᾱ / (1 − ᾱ): 1, 9 and 1/3; clipped at 5 and at 1/2."""
    alphas = torch.tensor([0.5, 0.9, 0.25])
    assert min_snr(alphas, 5.0).tolist() == pytest.approx([1, 5 / 9, 1], rel=1e-5)
    assert min_snr(alphas, 0.5).tolist() == pytest.approx([0.5, 0.5 / 9, 1], rel=1e-5)


def test_vae_loss_and_validation_by_hand(shown) -> None:
    """Absolute error plus kl × divergence per pixel value (against torch's own KL); PSNR of [0, 1]
    pictures.
    """
    model, kl, seed = build.vae(TINY, 0), 2.5, 7
    g = generator(seed, "vae", 0)
    x = shown.images[torch.randint(24, (3,), generator=g)].float() / 127.5 - 1
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
        unit = Normal(torch.zeros_like(z), torch.ones_like(z))
        divergence = (
            kl_divergence(Normal(posterior.mean, posterior.std), unit).sum() / 3 / (3 * 64 * 64)
        )
        expected = (model.decode(z).sample - x).abs().mean() + kl * divergence
    tiny = Schedule(steps=1, batch=3, lr=1e-12)
    (row,) = train_vae(model, shown.images, shown.images[:5], tiny, kl=kl, seed=seed)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-4)
    with torch.no_grad():
        y = model.decode(model.encode(to_float(shown.images[:5])).latent_dist.mean).sample.clamp(
            -1, 1
        )
    wrong = (y / 2 + 0.5 - shown.images[:5] / 255).double()
    psnr = sum(-10 * math.log10(w.square().mean().item()) for w in wrong) / 5
    assert row["psnr"] == pytest.approx(psnr, rel=1e-3)


def test_encode_gives_the_posterior(shown) -> None:
    model = build.vae(TINY, 0)
    mean, deviation = encode(model, shown.images)
    with torch.no_grad():
        posterior = model.encode(to_float(shown.images)).latent_dist
    assert torch.allclose(mean.float(), posterior.mean, atol=2e-3, rtol=2e-3)
    assert torch.allclose(deviation.float(), posterior.std, atol=2e-3, rtol=2e-3)


class _Fixed(nn.Module):
    """Stands for the denoiser: predicts ``value`` everywhere and notes what it was asked."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.register_buffer("scale", torch.zeros(()))
        self.asked: list[tuple[torch.Tensor, ...]] = []

    def forward(self, noisy, t, tokens):
        self.asked.append((noisy, t, tokens))
        return self.value.expand_as(noisy)


def _latents(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed, "test latents")
    return 3 * torch.randn(n, 4, 4, 4, generator=g) + 1, torch.rand(n, 4, 4, 4, generator=g) + 0.5


def _fit(model, tokenizer, schedule, *, drop=0.0):
    texts = [["a fox", "a lion"]] * 8
    rows = train_denoiser(
        model,
        tokenizer,
        build.scheduler(),
        _latents(8),
        texts,
        (_latents(6, 1), ["a fox"] * 6),
        schedule,
        gamma=5.0,
        drop=drop,
        seed=5,
    )
    return rows[-1]


def test_denoiser_loss_and_validation_by_hand(tokenizer) -> None:
    """With a model that says 0 the loss is the weighted mean square of the noise; latents have unit
    variance.
    """
    model = _Fixed(0.0)
    mean, deviation = _latents(8)
    row = _fit(model, tokenizer, Schedule(steps=1, batch=64, lr=1e-12))
    total = mean.double().var(correction=0) + deviation.double().square().mean()
    assert model.scale.item() == pytest.approx(total.item() ** -0.5, rel=1e-4)

    alphas = build.scheduler().alphas_cumprod
    noisy, t, _ = model.asked[0]
    g = generator(5, "denoiser", 0)
    index = torch.randint(8, (64,), generator=g)
    z = model.scale * (mean[index] + deviation[index] * torch.randn(64, 4, 4, 4, generator=g))
    a = alphas[t].view(-1, 1, 1, 1)
    noise = (noisy - a.sqrt() * z) / (1 - a).sqrt()
    snr = alphas[t] / (1 - alphas[t])
    expected = (snr.clamp(max=5) / snr * noise.square().mean((1, 2, 3))).mean()
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-2)

    noisy, t, _ = model.asked[-1]
    z, a = model.scale * _latents(6, 1)[0], alphas[t].view(-1, 1, 1, 1)
    square = ((noisy - a.sqrt() * z) / (1 - a).sqrt()).square().mean((1, 2, 3))
    assert row["validation_loss"] == pytest.approx(square.mean().item(), rel=1e-2)
    weighted = (min_snr(alphas, 5.0)[t] * square).mean().item()
    assert row["validation_weighted"] == pytest.approx(weighted, rel=1e-2)


def test_captions_are_drawn_and_dropped(tokenizer) -> None:
    """Both captions of a picture come up equally often; the empty one as often as ``drop`` says."""
    model = _Fixed(0.0)
    _fit(model, tokenizer, Schedule(steps=4, batch=256, lr=1e-12), drop=0.25)
    ids = torch.cat([tokens for _, _, tokens in model.asked[:4]])
    empty, fox, lion = build.tokenize(tokenizer, ["", "a fox", "a lion"])
    shares = [(ids == row).all(1).float().mean().item() for row in (empty, fox, lion)]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx(0.25, abs=0.05)  # 3.7 standard errors
    assert shares[1] == pytest.approx(0.375, abs=0.06)
