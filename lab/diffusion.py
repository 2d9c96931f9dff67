"""A text-to-image model as every noun of the project sees it: Stable Diffusion 1.x, 2.x, XL and MiniSD alike.

Images inside the project are uint8 [n, 3, s, s] where they are kept and float [0, 1] where they are compared; the
conversion to the autoencoder's [-1, 1] happens here and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lab.errors import UserError
from lab.seeding import generator
from lab.types import Kind, Sampling


@dataclass(frozen=True)
class Text:
    """Encoded prompts: ``hidden`` [n, tokens, d] and, for XL, ``pooled`` [n, p]."""

    hidden: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return int(self.hidden.shape[0])

    def __getitem__(self, index: Any) -> Text:
        return Text(self.hidden[index], None if self.pooled is None else self.pooled[index])

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        pooled = [p.pooled for p in parts if p.pooled is not None]
        return Text(torch.cat([p.hidden for p in parts]), torch.cat(pooled) if pooled else None)


class DiffusionModel(nn.Module):
    """The parts of a diffusers pipeline: ``unet``, ``vae``, ``text_encoders`` and, outside the weights, tokenizers
    and the noise scheduler.

    ``state_dict`` covers all weights, so that stages can store what an immunizer changed as a difference.
    The U-Net is what immunizers and attackers move; the autoencoder never moves.
    """

    kind: ClassVar[Kind] = "diffusion"

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        text_encoders: Sequence[nn.Module],
        tokenizers: Sequence[Any],
        scheduler: Any,
        pipeline_class: str = "StableDiffusionPipeline",
    ) -> None:
        super().__init__()
        self.unet: Any = unet
        self.vae: Any = vae
        self.text_encoders = nn.ModuleList(text_encoders)
        self.tokenizers = list(tokenizers)
        self.scheduler = scheduler
        self.pipeline_class = pipeline_class
        self.requires_grad_(False)
        self.eval()

    # ---- facts

    @property
    def xl(self) -> bool:
        return len(self.text_encoders) == 2

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def prediction(self) -> str:
        """``epsilon`` or ``v_prediction``."""
        return str(self.scheduler.config.prediction_type)

    @property
    def latent_size(self) -> int:
        return int(self.unet.config.sample_size)

    @property
    def image_size(self) -> int:
        return self.latent_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def copy(self) -> DiffusionModel:
        """An independent copy of the U-Net and the text encoders; the autoencoder, which never moves, is shared."""
        unet, texts = copy.deepcopy(self.unet), copy.deepcopy(list(self.text_encoders))
        return DiffusionModel(unet, self.vae, texts, list(self.tokenizers), self.scheduler, self.pipeline_class)

    # ---- text

    def tokens(self, prompts: Sequence[str], which: int = 0) -> Tensor:
        """Token ids [n, context], padded and cut as Stable Diffusion does."""
        tokenizer = self.tokenizers[which]
        found = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return found.input_ids.to(self.device)

    def text(self, prompts: Sequence[str]) -> Text:
        """Encoded prompts; gradients flow where the text encoder's parameters ask for them."""
        if not self.xl:
            return Text(self.text_encoders[0](self.tokens(prompts))[0])
        outputs = [m(self.tokens(prompts, i), output_hidden_states=True) for i, m in enumerate(self.text_encoders)]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return Text(hidden, outputs[1][0])

    # ---- pictures and latents

    @torch.no_grad()
    def to_latents(self, images: Tensor, g: torch.Generator | None = None) -> Tensor:
        """Scaled latents of uint8 images; a sample of the posterior with ``g``, its mean without."""
        found = []
        for part in images.split(32):
            posterior = self.vae.encode(part.to(self.device, self.dtype) / 127.5 - 1).latent_dist
            z = posterior.mean
            if g is not None:
                z = z + posterior.std * torch.randn(z.shape, generator=g).to(z)
            found.append(z * self.vae.config.scaling_factor)
        return torch.cat(found)

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> Tensor:
        """uint8 [n, 3, s, s] of scaled latents, on the CPU."""
        found = []
        for part in latents.split(32):
            x = self.vae.decode(part / self.vae.config.scaling_factor).sample
            found.append(((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(found)

    # ---- the denoiser

    def predict(self, noisy: Tensor, t: Tensor, text: Text, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The U-Net's output. ``weights`` replaces named parameters of the U-Net (`torch.func.functional_call`)."""
        extra: dict[str, Any] = {}
        if text.pooled is not None:
            side = float(self.image_size)
            ids = torch.tensor([[side, side, 0, 0, side, side]], device=noisy.device, dtype=noisy.dtype)
            extra["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": ids.repeat(len(noisy), 1)}
        if weights is None:
            found: Tensor = self.unet(noisy, t, text.hidden, **extra).sample
            return found
        found = functional_call(self.unet, dict(weights), (noisy, t, text.hidden), extra).sample
        return found

    def noised(self, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents at timesteps ``t`` and what the U-Net has to predict from them."""
        a = self.scheduler.alphas_cumprod.to(z)[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        if self.prediction == "epsilon":
            return noisy, noise
        if self.prediction == "v_prediction":
            return noisy, a.sqrt() * noise - (1 - a).sqrt() * z
        raise UserError("backbone", self.prediction, "the scheduler must predict epsilon or v_prediction.")

    def loss(
        self, z: Tensor, text: Text, noise: Tensor, t: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Diffusion loss per picture [n], the mean square over channels and pixels of the prediction's error."""
        noisy, target = self.noised(z, noise, t)
        return (self.predict(noisy, t, text, weights) - target).square().mean((1, 2, 3))

    # ---- generation

    def latents(self, count: int, seed: int, *labels: object) -> Tensor:
        """Start latents [count, c, s, s] from the stream ``labels`` of ``seed``, the same on every device."""
        shape = (count, self.unet.config.in_channels, self.latent_size, self.latent_size)
        return torch.randn(shape, generator=generator(seed, "latents", *labels)).to(self.device, self.dtype)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], latents: Tensor, sampling: Sampling, batch: int = 32) -> Tensor:
        """uint8 pictures [n, 3, s, s] by DDIM (η = 0) from ``latents``, one per prompt; classifier-free guidance."""
        from diffusers import DDIMScheduler

        ddim = DDIMScheduler.from_config(self.scheduler.config)
        found = []
        for start in range(0, len(prompts), batch):
            some = list(prompts[start : start + batch])
            text = self.text(some)
            guided = sampling.guidance != 1
            both = Text.cat([self.text([sampling.negative] * len(some)), text]) if guided else text
            x = latents[start : start + batch]
            ddim.set_timesteps(sampling.steps)
            for t in ddim.timesteps:
                times = t.repeat(len(both)).to(x.device)
                guess = self.predict(torch.cat([x, x]) if guided else x, times, both)
                if guided:
                    free, asked = guess.chunk(2)
                    guess = free + sampling.guidance * (asked - free)
                x = ddim.step(guess, t, x).prev_sample
            found.append(self.to_images(x))
        return torch.cat(found)

    # ---- diffusers

    def pipeline(self) -> Any:
        """The same weights as a diffusers pipeline."""
        import diffusers

        parts: dict[str, Any] = {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler}
        for i, (encoder, tokenizer) in enumerate(zip(self.text_encoders, self.tokenizers, strict=True)):
            suffix = "" if i == 0 else f"_{i + 1}"
            parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
        if not self.xl:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return getattr(diffusers, self.pipeline_class)(**parts)

    def save(self, folder: Path) -> Path:
        """Diffusers layout, safetensors; loads by ``DiffusionPipeline.from_pretrained(folder)``."""
        self.pipeline().save_pretrained(str(folder), safe_serialization=True)
        return folder
