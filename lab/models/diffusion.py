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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lab.core.data import Sampling
from lab.core.errors import UserError
from lab.core.prompts import warn_cut
from lab.core.seeding import generator
from lab.core.types import TextToImageModel
from lab.models.devices import warn_of_emulation

_PROMPTS = 64  # prompts per forward pass of a text encoder
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass(frozen=True)
class Text:
    """n encoded prompts: ``hidden`` [n, tokens, d] and, for XL, ``pooled`` [n, p]."""

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


class DiffusionModel(TextToImageModel):
    """The parts of a diffusers pipeline: ``unet``, ``vae``, ``text_encoders`` and, outside the
    weights, tokenizers and the noise scheduler.

    ``state_dict`` covers all weights, so that stages can store what an immunizer changed as a
    difference. The U-Net is what immunizers and attackers move; the autoencoder never moves.

    Args:
        pipeline_class: of diffusers; one of `PIPELINES`.
        zero_negative: XL only: an empty negative prompt is encoded as zeros
            (``force_zeros_for_empty_prompt``).
    """

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
        """Return the parts of a diffusers pipeline as a model; they are shared, not copied."""
        parts = pipe.components
        return cls(
            pipe.unet,
            pipe.vae,
            [m for k in ("text_encoder", "text_encoder_2") if (m := parts.get(k)) is not None],
            [t for k in ("tokenizer", "tokenizer_2") if (t := parts.get(k)) is not None],
            pipe.scheduler,
            type(pipe).__name__,
            bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
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
        """Return an independent copy of the U-Net, the text encoders, the tokenizers (an attacker
        may add tokens) and the scheduler. The autoencoder is shared.
        """
        return DiffusionModel(
            copy.deepcopy(self.unet),
            self.vae,
            copy.deepcopy(list(self.text_encoders)),
            copy.deepcopy(self.tokenizers),
            copy.deepcopy(self.scheduler),
            self.pipeline_class,
            self.zero_negative,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in torch; an autoencoder that changes becomes this model's own first."""
        own = self.vae.state_dict()
        loaded = {name: state_dict.get(f"vae.{name}", value) for name, value in own.items()}
        if any(not torch.equal(value.to(own[name]), own[name]) for name, value in loaded.items()):
            self.vae = copy.deepcopy(self.vae)
        return super().load_state_dict(state_dict, *args, **kwargs)

    # ---- text

    def tokens(self, prompts: Sequence[str], which: int = 0) -> Tensor:
        """Return token ids [n, context] of tokenizer ``which``, padded and cut as Stable Diffusion
        does. A cut prompt is logged once.
        """
        tokenizer = self.tokenizers[which]
        encoding = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = encoding.input_ids
        for i in encoding.attention_mask.all(1).nonzero().flatten().tolist():
            whole = tokenizer(prompts[i], truncation=False, verbose=False).input_ids
            if len(whole) > ids.shape[1]:
                warn_cut(prompts[i], ids.shape[1], len(whole) - ids.shape[1])
        return ids.to(self.device)

    def text(self, prompts: Sequence[str]) -> Text:
        """Return n encoded prompts; gradients flow where the text encoders require them."""
        if not self.xl:
            return Text(self.text_encoders[0](self.tokens(prompts))[0])
        outputs = [
            m(self.tokens(prompts, i), output_hidden_states=True)
            for i, m in enumerate(self.text_encoders)
        ]
        return Text(torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[1][0])

    # ---- images and latents

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation [n, c, s, s] of the scaled latents of images.

        Args:
            images: uint8 [n, 3, h, h], resized to the model's own size.
        """
        dtype = next(self.vae.parameters()).dtype  # a half-precision model may have kept float32
        side, scale = self.image_size, self.vae.config.scaling_factor
        means, stds = [], []
        for part in images.split(32):
            x = part.to(self.device, dtype)
            if x.shape[-1] != side:
                x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
            latents = self.vae.encode(x / 127.5 - 1).latent_dist
            means.append((latents.mean * scale).to(self.dtype))
            stds.append((latents.std * scale).to(self.dtype))
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> Tensor:
        """Return uint8 images [n, 3, h, h] of scaled latents [n, c, s, s], on the CPU."""
        dtype, images = next(self.vae.parameters()).dtype, []
        for part in latents.split(32):
            x = self.vae.decode(part.to(dtype) / self.vae.config.scaling_factor).sample
            images.append(((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(images)

    # ---- the denoiser

    def predict(
        self, noisy: Tensor, t: Tensor, text: Text, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the U-Net's output [n, c, s, s].

        Args:
            noisy: noisy latents [n, c, s, s]. t: timesteps [n]. text: n encoded prompts.
            weights: replaces named parameters of the U-Net (`torch.func.functional_call`).
        """
        extra: dict[str, Any] = {}
        if text.pooled is not None:
            side = float(self.image_size)
            ids = noisy.new_tensor([[side, side, 0, 0, side, side]]).repeat(len(noisy), 1)
            extra["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": ids}
        inputs = (noisy, t, text.hidden)
        if weights is None:
            return self.unet(*inputs, **extra).sample
        return functional_call(self.unet, dict(weights), inputs, extra).sample

    def noised(self, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents and what the U-Net has to predict from them, both [n, c, s, s].

        Both are float32 at least: bfloat16 would round the noise of the first timesteps away
        (√(1 − ᾱ_0) = 0.029 to 0).

        Args:
            z: clean latents [n, c, s, s]. noise: [n, c, s, s]. t: timesteps [n].
        """
        wide = torch.promote_types(z.dtype, torch.float32)
        z, noise = z.to(wide), noise.to(wide)
        a = self.scheduler.alphas_cumprod.to(z)[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        if self.prediction == "epsilon":
            return noisy, noise
        if self.prediction == "v_prediction":
            return noisy, a.sqrt() * noise - (1 - a).sqrt() * z
        fix = "the scheduler must predict epsilon or v_prediction."
        raise UserError("backbone", self.prediction, fix)

    def loss(
        self,
        z: Tensor,
        text: Text,
        noise: Tensor,
        t: Tensor,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the diffusion loss [n]: per image, the mean squared error of the prediction.

        Args:
            z, noise, t: see `noised`. text, weights: see `predict`.
        """
        noisy, target = self.noised(z, noise, t)
        return (self.predict(noisy.to(z), t, text, weights) - target).square().mean((1, 2, 3))

    # ---- generation

    def latents(self, count: int, seed: int, *labels: object) -> Tensor:
        """Return start latents [count, c, s, s] from the stream ``labels`` of ``seed``, the same on
        every device.
        """
        shape = (count, self.unet.config.in_channels, self.latent_size, self.latent_size)
        noise = torch.randn(shape, generator=generator(seed, "latents", *labels))
        return noise.to(self.device, self.dtype)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], latents: Tensor, sampling: Sampling) -> Tensor:
        """Return clean latents [n, c, s, s] with classifier-free guidance (arXiv 2207.12598).

        Args:
            prompts: n texts. latents: start latents [n, c, s, s].
            sampling: sampler, steps, guidance, negative prompt and precision.
        """
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        # the model's own scheduler may leave defaults out of its config; a saved folder spells
        # them out
        config = {k: v for k, v in self.scheduler.config.items() if k != "_use_default_values"}
        scheduler = (
            DDIMScheduler.from_config(config, clip_sample=False)  # latents have no bounds
            if sampling.sampler == "ddim"
            else DPMSolverMultistepScheduler.from_config(config)
        )
        scheduler.set_timesteps(sampling.steps)
        text, guided, x = self.text(prompts), sampling.guided, latents
        if guided:
            text = Text.cat([self._negative(sampling.negative)[[0] * len(text)], text])
        low = sampling.precision == "bfloat16"
        if low:
            warn_of_emulation(x.device.type, "scenario.sampling.precision", "weights")
        scales = sampling.scales(len(scheduler.timesteps))
        for t, scale in zip(scheduler.timesteps, scales, strict=True):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
                noisy, steps = torch.cat([x, x]) if guided else x, t.repeat(len(text))
                noise = self.predict(noisy, steps.to(x.device), text)
            noise = noise.to(x.dtype)
            if guided:
                unconditional, conditional = noise.chunk(2)
                noise = unconditional + scale * (conditional - unconditional)
            x = scheduler.step(noise, t, x).prev_sample
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
        """Return uint8 images [n, 3, h, h] of `sample`, ``batch`` at a time, on the CPU."""
        parts = [slice(start, start + batch) for start in range(0, len(prompts), batch)]
        samples = (self.sample(list(prompts[part]), latents[part], sampling) for part in parts)
        return torch.cat([self.to_images(latents) for latents in samples])

    # ---- diffusers

    def pipeline(self) -> Any:
        """Return the same weights (shared) as a diffusers pipeline with a scheduler of its own."""
        import diffusers

        parts: dict[str, Any] = {
            "vae": self.vae,
            "unet": self.unet,
            "feature_extractor": None,
            "scheduler": copy.deepcopy(self.scheduler),
        }
        for i, suffix in enumerate(("", "_2")[: len(self.text_encoders)]):
            parts[f"text_encoder{suffix}"] = self.text_encoders[i]
            parts[f"tokenizer{suffix}"] = self.tokenizers[i]
        if self.xl:
            parts |= {"force_zeros_for_empty_prompt": self.zero_negative, "add_watermarker": False}
        else:
            parts |= {"safety_checker": None, "requires_safety_checker": False}
        return getattr(diffusers, self.pipeline_class)(**parts)

    def save(self, folder: Path) -> Path:
        """Write a folder in diffusers layout, safetensors only, and return it."""
        self.pipeline().save_pretrained(str(folder), safe_serialization=True)
        for suffix, tokenizer in zip(("", "_2"), self.tokenizers, strict=False):
            if (
                tokenizer.is_fast
            ):  # transformers 4 loads vocab.json and merges.txt, 5 leaves them out
                tokenizer.backend_tokenizer.model.save(str(folder / f"tokenizer{suffix}"))
        return folder


def word_positions(model: DiffusionModel, prompt: str, words: str) -> list[int]:
    """Return the positions of the tokens of ``words`` in the encoded ``prompt``, first occurrence;
    empty if they are not there.
    """
    wanted = model.tokenizers[0](words, add_special_tokens=False).input_ids
    ids = model.tokens([prompt])[0].tolist()
    for i in range(len(ids) - len(wanted) + 1) if wanted else ():
        if ids[i : i + len(wanted)] == wanted:
            return list(range(i, i + len(wanted)))
    return []


@torch.no_grad()
def encoded(model: DiffusionModel, prompts: Sequence[str]) -> Tensor:
    """Return text-encoder rows [n, context, d] without gradient, computed in batches."""
    batches = (prompts[i : i + _PROMPTS] for i in range(0, len(prompts), _PROMPTS))
    return torch.cat([model.text(batch).hidden for batch in batches])
