"""What MiniSD's two networks minimise: the autoencoder its reconstruction, the denoiser the
diffusion loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.core.seeding import generator
from lab.core.training import progress
from lab.core.types import Checkpoint, Log
from lab.minisd.train.build import tokenize
from lab.minisd.train.loop import Schedule, device_of, train


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float [-1, 1], what the autoencoder takes."""
    return images.float().div_(127.5).sub_(1)


def train_vae(
    vae: Any,
    images: Tensor,
    held_out: Tensor,
    schedule: Schedule,
    *,
    kl: float,
    seed: int,
    checkpoint: Checkpoint | None,
    log: Log,
) -> None:
    """Mean absolute error plus ``kl`` × the divergence of the posterior per pixel value.

    Args:
        images, held_out: uint8 [n, 3, s, s].
        kl: weight of KL(posterior ‖ N(0, 1)), summed over the latent, divided by 3 s².
    """

    device = device_of(vae)

    def step(_: int, g: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (schedule.batch,), generator=g)
        x = to_float(images[index].to(device))
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g).to(
            device
        )
        divergence = posterior.kl().mean() / x[0].numel()
        return F.l1_loss(vae.decode(z).sample, x) + kl * divergence

    def validate() -> dict[str, float]:
        x = to_float(held_out.to(device))
        y = torch.cat(
            [vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(64)]
        ).clamp(-1, 1)
        mse = ((x - y) / 2).square().mean((1, 2, 3))
        return {"psnr": (-10 * mse.log10()).mean().item(), "l1": ((x - y) / 2).abs().mean().item()}

    train(
        vae,
        step,
        schedule,
        seed=seed,
        label="vae",
        checkpoint=checkpoint,
        log=log,
        validate=validate,
    )


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every image's posterior, float16 [n, 4, s/4, s/4] each,
    unscaled, on the CPU.
    """
    means, deviations, device = [], [], device_of(vae)
    for part in progress(images.split(128), "latents", (len(images) + 127) // 128):
        posterior = vae.encode(to_float(part.to(device))).latent_dist
        means.append(posterior.mean.half().cpu())
        deviations.append(posterior.std.half().cpu())
    return torch.cat(means), torch.cat(deviations)


class TextToImageNetwork(nn.Module):
    """U-Net and text encoder, trained together; ``scale`` brings the autoencoder's latents to unit
    variance.
    """

    scale: Tensor

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        found: Tensor = self.unet(noisy, t, self.text_encoder(tokens)[0]).sample
        return found


def min_snr(alphas: Tensor, gamma: float) -> Tensor:
    """Weight min(SNR, γ)/SNR of the noise-prediction loss for each timestep (arXiv 2303.09556, Eq.
    5).
    """
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / snr


def train_denoiser(
    model: TextToImageNetwork,
    tokenizer: Any,
    scheduler: Any,
    latents: tuple[Tensor, Tensor],
    captions: list[list[str]],
    held_out: tuple[tuple[Tensor, Tensor], list[str]],
    schedule: Schedule,
    *,
    gamma: float,
    drop: float,
    seed: int,
    checkpoint: Checkpoint | None,
    log: Log,
) -> None:
    """Noise prediction with min-SNR weights; captions are dropped for classifier-free guidance.

    Args:
        latents: mean and deviation of each image's posterior (`encode`); ``model.scale`` is set
            from them.
        captions: for each image several captions, one is drawn at every visit.
        held_out: latents and captions of the validation pictures.
        gamma: clip of the signal-to-noise ratio in the loss weight.
        drop: share of captions that are replaced by the empty one.
    """
    power = sum(part.float().square().mean() for part in latents)
    scale = (power - latents[0].float().mean() ** 2) ** -0.5
    model.scale.copy_(scale)
    alphas = scheduler.alphas_cumprod
    weights = min_snr(alphas, gamma)
    flat = tokenize(tokenizer, [text for texts in captions for text in texts])
    tokens = flat.view(len(captions), len(captions[0]), -1)
    empty = tokenize(tokenizer, [""])[0]

    device = device_of(model)

    def loss(*drawn: Tensor) -> Tensor:
        z, ids, t, noise, a = (x.to(device) for x in (*drawn, alphas[drawn[2]].view(-1, 1, 1, 1)))
        guess = model((a.sqrt() * z + (1 - a).sqrt() * noise), t, ids)
        return (guess - noise).square().mean((1, 2, 3))

    def step(_: int, g: torch.Generator) -> Tensor:
        n = schedule.batch
        index = torch.randint(len(tokens), (n,), generator=g)
        mean, deviation = (part[index].float() for part in latents)
        z = scale * (mean + deviation * torch.randn(mean.shape, generator=g))
        ids = tokens[index, torch.randint(tokens.shape[1], (n,), generator=g)]
        ids = torch.where(torch.rand(n, 1, generator=g) < drop, empty, ids)
        t = torch.randint(len(alphas), (n,), generator=g)
        return (weights[t].to(device) * loss(z, ids, t, torch.randn(z.shape, generator=g))).mean()

    (mean, _), texts = held_out
    z, ids = scale * mean.float(), tokenize(tokenizer, texts)
    g = generator(seed, "denoiser", "validation")
    t, noise = torch.randint(len(alphas), (len(z),), generator=g), torch.randn(z.shape, generator=g)

    def validate() -> dict[str, float]:
        parts = zip(z.split(64), ids.split(64), t.split(64), noise.split(64), strict=True)
        plain = torch.cat([loss(*part) for part in parts]).cpu()
        return {
            "validation_loss": plain.mean().item(),
            "validation_weighted": (weights[t] * plain).mean().item(),
        }

    train(
        model,
        step,
        schedule,
        seed=seed,
        label="denoiser",
        checkpoint=checkpoint,
        log=log,
        validate=validate,
    )
