"""A text-to-image model as every noun of the project sees it: Stable Diffusion 1.x, 2.x, XL and
MiniSD alike.

Images inside the project are uint8 [n, 3, s, s] where they are kept and float [0, 1] where they are
compared; the conversion to the autoencoder's [-1, 1] happens here and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lab.core.data import Kind, Sampling
from lab.core.errors import UserError
from lab.core.prompts import check_prompts, warn_cut
from lab.core.seeding import generator
from lab.models.devices import tell_of_emulation

__all__ = ["PIPELINES", "DiffusionModel", "Text", "check_prompts"]
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


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
    """The parts of a diffusers pipeline: ``unet``, ``vae``, ``text_encoders`` and, outside the
    weights, tokenizers and the noise scheduler.

    ``state_dict`` covers all weights, so that stages can store what an immunizer changed as a
    difference. The U-Net is what immunizers and attackers move; the autoencoder never moves.

    Args:
        pipeline_class: of diffusers; one of `PIPELINES`.
        zero_negative: XL only: an empty negative prompt is encoded as zeros
            (``force_zeros_for_empty_prompt``).
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
        zero_negative: bool = False,
    ) -> None:
        super().__init__()
        self.unet: Any = unet
        self.vae: Any = vae
        self.text_encoders = nn.ModuleList(text_encoders)
        self.tokenizers = list(tokenizers)
        self.scheduler = scheduler
        self.pipeline_class = pipeline_class
        self.zero_negative = zero_negative
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pipeline(cls, pipe: Any) -> DiffusionModel:
        """The parts of a diffusers pipeline; they are shared, not copied."""
        encoders = [
            m for m in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if m is not None
        ]
        tokenizers = [
            t for t in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)) if t is not None
        ]
        zero = bool(pipe.config.get("force_zeros_for_empty_prompt", False))
        return cls(
            pipe.unet, pipe.vae, encoders, tokenizers, pipe.scheduler, type(pipe).__name__, zero
        )

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
        """An independent copy of the U-Net, the text encoders and the tokenizers (an attacker may
        add tokens); the autoencoder and the scheduler, which never change, are shared.
        """
        unet, texts = copy.deepcopy(self.unet), copy.deepcopy(list(self.text_encoders))
        tokenizers = copy.deepcopy(self.tokenizers)
        return DiffusionModel(
            unet,
            self.vae,
            texts,
            tokenizers,
            self.scheduler,
            self.pipeline_class,
            self.zero_negative,
        )

    # ---- text

    def tokens(self, prompts: Sequence[str], which: int = 0) -> Tensor:
        """Token ids [n, context], padded and cut as Stable Diffusion does; a cut prompt is logged
        once.
        """
        if not prompts:
            raise ValueError("no prompts to encode")
        tokenizer = self.tokenizers[which]
        found = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = found.input_ids
        for i in found.attention_mask.all(1).nonzero().flatten().tolist():
            lost = (
                len(tokenizer(prompts[i], truncation=False, verbose=False).input_ids) - ids.shape[1]
            )
            if lost > 0:
                warn_cut(prompts[i], ids.shape[1], lost)
        return ids.to(self.device)

    def text(self, prompts: Sequence[str]) -> Text:
        """Encoded prompts; gradients flow where the text encoder's parameters ask for them."""
        if not self.xl:
            return Text(self.text_encoders[0](self.tokens(prompts))[0])
        outputs = [
            m(self.tokens(prompts, i), output_hidden_states=True)
            for i, m in enumerate(self.text_encoders)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return Text(hidden, outputs[1][0])

    # ---- pictures and latents

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, scaled, of the latents of uint8 images [n, 3, s, s]; resized
        to its own size.
        """
        side, dtype = (
            self.image_size,
            next(self.vae.parameters()).dtype,
        )  # which a half-precision model may have kept
        means, stds = [], []
        for part in images.split(32):
            x = part.to(self.device, dtype)
            if x.shape[-1] != side:
                x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
            found = self.vae.encode(x / 127.5 - 1).latent_dist
            means.append((found.mean * self.vae.config.scaling_factor).to(self.dtype))
            stds.append((found.std * self.vae.config.scaling_factor).to(self.dtype))
        return torch.cat(means), torch.cat(stds)

    def to_latents(self, images: Tensor) -> Tensor:
        """Scaled latents of uint8 images, the posterior's mean."""
        return self.posterior(images)[0]

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> Tensor:
        """uint8 [n, 3, s, s] of scaled latents, on the CPU."""
        found, dtype = [], next(self.vae.parameters()).dtype
        for part in latents.split(32):
            x = self.vae.decode(part.to(dtype) / self.vae.config.scaling_factor).sample
            found.append(((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(found)

    # ---- the denoiser

    def predict(
        self, noisy: Tensor, t: Tensor, text: Text, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The U-Net's output. ``weights`` replaces named parameters of the U-Net
        (`torch.func.functional_call`).
        """
        extra: dict[str, Any] = {}
        if text.pooled is not None:
            side = float(self.image_size)
            ids = torch.tensor(
                [[side, side, 0, 0, side, side]], device=noisy.device, dtype=noisy.dtype
            )
            extra["added_cond_kwargs"] = {
                "text_embeds": text.pooled,
                "time_ids": ids.repeat(len(noisy), 1),
            }
        if weights is None:
            found: Tensor = self.unet(noisy, t, text.hidden, **extra).sample
            return found
        found = functional_call(self.unet, dict(weights), (noisy, t, text.hidden), extra).sample
        return found

    def noised(self, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents at timesteps ``t`` and what the U-Net has to predict from them, both in
        float32 at least: bfloat16 would round the noise of the first timesteps away (√(1 − ᾱ_0) =
        0.029 to 0).
        """
        wide = torch.promote_types(z.dtype, torch.float32)
        z, noise = z.to(wide), noise.to(wide)
        a = self.scheduler.alphas_cumprod.to(z)[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        if self.prediction == "epsilon":
            return noisy, noise
        if self.prediction == "v_prediction":
            return noisy, a.sqrt() * noise - (1 - a).sqrt() * z
        raise UserError(
            "backbone", self.prediction, "the scheduler must predict epsilon or v_prediction."
        )

    def loss(
        self,
        z: Tensor,
        text: Text,
        noise: Tensor,
        t: Tensor,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Diffusion loss per picture [n], the mean square over channels and pixels of the
        prediction's error.
        """
        noisy, target = self.noised(z, noise, t)
        return (self.predict(noisy.to(z), t, text, weights) - target).square().mean((1, 2, 3))

    # ---- generation

    def latents(self, count: int, seed: int, *labels: object) -> Tensor:
        """Start latents [count, c, s, s] from the stream ``labels`` of ``seed``, the same on every
        device.
        """
        shape = (count, self.unet.config.in_channels, self.latent_size, self.latent_size)
        return torch.randn(shape, generator=generator(seed, "latents", *labels)).to(
            self.device, self.dtype
        )

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], latents: Tensor, sampling: Sampling) -> Tensor:
        """Clean latents [n, c, s, s] by DDIM (η = 0, arXiv 2010.02502) from ``latents``, one per
        prompt, with classifier-free guidance (arXiv 2207.12598) where ``sampling.guidance`` is not
        1.
        """
        from diffusers import DDIMScheduler

        # defaults of the model's own scheduler count too, as they do once they are spelt out in a
        # saved folder
        config = {k: v for k, v in self.scheduler.config.items() if k != "_use_default_values"}
        ddim = DDIMScheduler.from_config(config, clip_sample=False)  # latents have no bounds
        ddim.set_timesteps(sampling.steps)
        text, guided, x = self.text(prompts), sampling.guidance != 1, latents
        both = (
            Text.cat([self._negative(sampling.negative)[[0] * len(text)], text]) if guided else text
        )
        low = torch.autocast(
            x.device.type, torch.bfloat16, enabled=sampling.precision == "bfloat16"
        )
        if sampling.precision == "bfloat16":
            tell_of_emulation(x.device.type, "scenario.sampling.precision", "weights")
        for t in ddim.timesteps:
            with low:
                guess = self.predict(
                    torch.cat([x, x]) if guided else x, t.repeat(len(both)).to(x.device), both
                )
            guess = guess.to(x.dtype)
            if guided:
                free, asked = guess.chunk(2)
                guess = free + sampling.guidance * (asked - free)
            x = ddim.step(guess, t, x).prev_sample
        return x

    def _negative(self, prompt: str) -> Text:
        text = self.text([prompt])
        if prompt or not self.zero_negative or text.pooled is None:
            return text
        return Text(torch.zeros_like(text.hidden), torch.zeros_like(text.pooled))

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], latents: Tensor, sampling: Sampling, batch: int = 32
    ) -> Tensor:
        """uint8 pictures [n, 3, s, s] of `sample`, ``batch`` at a time, on the CPU."""
        found = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            found.append(self.to_images(self.sample(list(prompts[part]), latents[part], sampling)))
        return torch.cat(found)

    # ---- diffusers

    def pipeline(self) -> Any:
        """The same weights (shared) as a diffusers pipeline with a scheduler of its own."""
        import diffusers

        parts: dict[str, Any] = {
            "vae": self.vae,
            "unet": self.unet,
            "scheduler": copy.deepcopy(self.scheduler),
        }
        for i, (encoder, tokenizer) in enumerate(
            zip(self.text_encoders, self.tokenizers, strict=True)
        ):
            suffix = "" if i == 0 else f"_{i + 1}"
            parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
        if self.xl:
            parts |= {"force_zeros_for_empty_prompt": self.zero_negative, "add_watermarker": False}
        else:
            parts |= {
                "safety_checker": None,
                "feature_extractor": None,
                "requires_safety_checker": False,
            }
        return getattr(diffusers, self.pipeline_class)(**parts)

    def save(self, folder: Path) -> Path:
        """Diffusers layout, safetensors; loads by ``DiffusionPipeline.from_pretrained(folder)``."""
        from lab.models.diffusion_files import tokenizer_files  # it imports this module

        self.pipeline().save_pretrained(str(folder), safe_serialization=True)
        for tokenizer in folder.glob("tokenizer*/"):
            tokenizer_files(tokenizer)
        return folder
