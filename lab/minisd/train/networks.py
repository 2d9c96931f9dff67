"""MiniSD's networks, made from configs, and their training.

They are the classes of Stable Diffusion v1, only smaller. Sizes are those of a prototype, measured
on two cores: no attention where the latent is 16 × 16 (it would double the time of a step and buy
nothing there). AdamW runs over one cycle with averaged weights; the autoencoder minimises its
reconstruction, the denoiser the diffusion loss.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pydantic import Field
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lab.core import training
from lab.core.config import Count, Index, NonNegative, Positive, options
from lab.core.errors import Diverged
from lab.core.seeding import derive, generator
from lab.core.training import part_of, progress, restore_slots, schedule_factor, slots
from lab.core.types import Checkpoint

logger = logging.getLogger(__name__)
Loss = Callable[[int, torch.Generator], Tensor]
Validate = Callable[[Any], dict[str, float]]
Rows = list[dict[str, float]]  # what was logged: the step, the loss and validation values
_LOG_EVERY = 50  # steps over which the logged loss is a mean
_VALIDATE_EVERY = 500  # steps
_SAVE_SECONDS = 60.0  # least time between two checkpoints
CONTEXT = 32  # tokens; the longest caption of the world has 24
SOS, EOS = "<|startoftext|>", "<|endoftext|>"


# ---- the networks


@options
class Widths:
    """What makes a MiniSD larger or smaller; tests take tiny ones.

    Attributes:
        vae: channels of the autoencoder from 64 × 64 down to 16 × 16; multiples of ``groups``.
        unet: channels of the U-Net at 16 × 16, 8 × 8 and 4 × 4; multiples of ``groups``.
        text: width of the text encoder (cross-attention width of the U-Net); a multiple of 32.
        layers: transformer layers of the text encoder.
        groups: groups of every group norm.
    """

    vae: tuple[Count, Count, Count] = (24, 48, 64)
    unet: tuple[Count, Count, Count] = (48, 96, 128)
    text: Annotated[int, Field(strict=True, ge=32, multiple_of=32)] = 128
    layers: Count = 3
    groups: Count = 8


def train_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int) -> CLIPTokenizer:
    """Learn a byte-level BPE in CLIP's format from ``texts``; write ``vocab.json``, ``merges.txt``
    and configs to ``folder``, and return the tokenizer that they hold.

    Words outside ``texts`` fall into pieces, as new words do in CLIP. Same texts, same files.

    Args:
        vocabulary: tokens at most, 514 of which are bytes (each inside and at the end of a word),
            start and end.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    final = [f"{letter}</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,  # start and end come last
        min_frequency=2,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        # otherwise numbered as a hash map gives them, and the numbers break ties of merges
        special_tokens=final,
    )
    bpe.train_from_iterator(sorted(set(texts)), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    pairs = [m if isinstance(m, str) else " ".join(m) for m in merges]
    tokens = [*alphabet, *final, *(p.replace(" ", "") for p in pairs), SOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8"
    )
    special = {"bos_token": SOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    facts = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts | special, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    return CLIPTokenizer.from_pretrained(str(folder))


def tokenize(tokenizer: Any, texts: Iterable[str]) -> torch.Tensor:
    """Return token ids [n, CONTEXT], padded with the end token and cut at the context, as Stable
    Diffusion does.
    """
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(texts), max_length=tokenizer.model_max_length, **options).input_ids


def tokenize_all(tokenizer: Any, captions: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return token ids [n, k, CONTEXT] of k captions for each of n images."""
    flat = tokenize(tokenizer, [text for texts in captions for text in texts])
    return flat.view(len(captions), len(captions[0]), -1)


def build_vae(widths: Widths, seed: int) -> Any:
    """Build the autoencoder: 64 × 64 pixels to 16 × 16 × 4 latents."""
    torch.manual_seed(derive(seed, "vae", "init"))
    depth = len(widths.vae)
    return AutoencoderKL(
        block_out_channels=widths.vae,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=widths.groups,
        mid_block_add_attention=False,
        sample_size=64,
    )


def build_unet(widths: Widths, seed: int) -> Any:
    torch.manual_seed(derive(seed, "unet", "init"))
    lower = len(widths.unet) - 1
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths.unet,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * lower),
        up_block_types=(*("CrossAttnUpBlock2D",) * lower, "UpBlock2D"),
        cross_attention_dim=widths.text,
        # four heads: diffusers reads this key as their number, as it does for SD v1
        attention_head_dim=4,
        norm_num_groups=widths.groups,
    )


def build_text_encoder(widths: Widths, vocabulary: int, seed: int) -> Any:
    """Build a `CLIPTextModel` whose last two token ids are start and end."""
    torch.manual_seed(derive(seed, "text", "init"))
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=widths.text,
        intermediate_size=4 * widths.text,
        num_hidden_layers=widths.layers,
        num_attention_heads=widths.text // 32,
        max_position_embeddings=CONTEXT,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def build_scheduler() -> Any:
    """Build DDIM with the noise schedule of Stable Diffusion v1 (scaled linear, 0.00085 to 0.012,
    1,000 steps).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# ---- the training loop


@options
class Schedule:
    """How long and how fast a network is trained.

    Attributes:
        steps, batch: optimizer steps and examples per step.
        lr: peak learning rate of AdamW; rises linearly over ``warmup`` steps, falls to 0 on a half
            cosine.
        ema: decay of the averaged weights, below 1 (0 = the last weights are kept); warms up as
            (1 + t)/(10 + t).
        clip: largest gradient norm.
    """

    steps: Count
    batch: Count
    lr: Positive
    warmup: Index = 100
    weight_decay: NonNegative = 0.01
    ema: NonNegative = 0.0
    clip: Positive = 1.0

    def rate(self, step: int) -> float:
        """Return the learning rate of step number ``step`` (from 0)."""
        return self.lr * schedule_factor("cosine", step, self.steps, self.warmup)


class _NetworkTraining:
    """A network in training: model, optimizer, averaged weights. A `lab.core.training.Trainee`."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        schedule: Schedule,
        seed: int,
        label: str,
        validate: Validate | None,
    ) -> None:
        self.model, self.loss, self.validate = model, loss, validate
        self.schedule, self.seed, self.label = schedule, seed, label
        self.trained = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in self.trained if p.ndim > 1]
        others = [p for p in self.trained if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": schedule.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.lr, fused=True)
        self.average = copy.deepcopy(model).eval()
        self.recent: list[float] = []  # losses since the last row of the log

    def step(self, step: int) -> dict[str, float] | None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step)
        loss = self.loss(step, generator(self.seed, self.label, step))
        if not torch.isfinite(loss):
            raise Diverged(f"{self.label}: the loss is {loss.item()}", max(step - 1, 0))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.schedule.clip)
        self.optimizer.step()
        self._average(step)
        self.recent.append(loss.item())
        done = step + 1
        is_last = done == self.schedule.steps
        row: dict[str, float] = {}
        if done % _LOG_EVERY == 0 or is_last:
            row["loss"], self.recent = sum(self.recent) / len(self.recent), []
        if self.validate is not None and (done % _VALIDATE_EVERY == 0 or is_last):
            with torch.no_grad():
                row |= self.validate(self.average)
        if not row:
            return None
        values = " ".join(f"{key} {value:.4f}" for key, value in row.items())
        logger.info("%s step %d of %d: %s", self.label, done, self.schedule.steps, values)
        return {"step": done, **row}

    def _average(self, step: int) -> None:
        decay = min(self.schedule.ema, (1 + step) / (10 + step))
        state = self.model.state_dict()
        for name, average in self.average.state_dict().items():
            if average.is_floating_point():
                average.lerp_(state[name], 1 - decay)
            else:
                average.copy_(state[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"model/{n}": v for n, v in self.model.state_dict().items()}
        tensors |= {f"average/{n}": v for n, v in self.average.state_dict().items()}
        tensors |= {f"optimizer/{n}": v for n, v in slots(self.optimizer).items()}
        return tensors, {"recent": self.recent}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.model.load_state_dict(part_of(tensors, "model/"))
        self.average.load_state_dict(part_of(tensors, "average/"))
        restore_slots(self.optimizer, part_of(tensors, "optimizer/"))
        self.recent = list(values["recent"])


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters of ``model`` are."""
    return next(model.parameters()).device


def train(
    model: nn.Module,
    loss: Loss,
    schedule: Schedule,
    *,
    seed: int,
    label: str,
    checkpoint: Checkpoint | None = None,
    validate: Validate | None = None,
) -> Rows:
    """Minimise ``loss(step, generator)`` over the parameters that require gradients, in place.

    The generator of a step depends on (seed, label, step) alone, so a resumed training repeats the
    unbroken one. It draws in main memory whatever device the model is on, so a GPU sees the same
    images and the same noise. The model ends with the averaged weights.

    Args:
        validate: called every 500 steps with a copy of the model that has the averaged weights.

    Returns:
        The mean loss of the last 50 steps every 50 steps, and what ``validate`` returned.

    Raises:
        Diverged: the loss left the finite numbers.
    """
    network = _NetworkTraining(model, loss, schedule, seed, label, validate)
    model.train()
    rows = training.train(
        network, schedule.steps, label=label, checkpoint=checkpoint, save_seconds=_SAVE_SECONDS
    )
    model.load_state_dict(network.average.state_dict())
    model.eval()
    return rows


# ---- the autoencoder


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
    checkpoint: Checkpoint | None = None,
) -> Rows:
    """Minimise the mean absolute error plus ``kl`` × the posterior's divergence per pixel value.

    Args:
        images, held_out: uint8 [n, 3, s, s].
        kl: weight of KL(posterior ‖ N(0, 1)), summed over the latent, divided by 3 s².
    """
    device = device_of(vae)

    def step(_: int, g: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (schedule.batch,), generator=g)
        x = to_float(images[index].to(device))
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g).to(device)
        z = posterior.mean + posterior.std * noise
        divergence = posterior.kl().mean() / x[0].numel()
        return F.l1_loss(vae.decode(z).sample, x) + kl * divergence

    def validate(average: Any) -> dict[str, float]:
        x = to_float(held_out.to(device))
        means = [average.encode(part).latent_dist.mean for part in x.split(64)]
        y = torch.cat([average.decode(mean).sample for mean in means]).clamp(-1, 1)
        mse = ((x - y) / 2).square().mean((1, 2, 3))
        return {"psnr": (-10 * mse.log10()).mean().item(), "l1": ((x - y) / 2).abs().mean().item()}

    return train(
        vae, step, schedule, seed=seed, label="vae", checkpoint=checkpoint, validate=validate
    )


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every image's posterior, float16 [n, 4, s/4, s/4] each,
    unscaled, on the CPU.
    """
    means, deviations, device = [], [], device_of(vae)
    for part in progress(images.split(128), "latents", (len(images) + 127) // 128):
        posterior = vae.encode(to_float(part.to(device))).latent_dist
        means.append(posterior.mean.half().cpu())
        deviations.append(posterior.std.half().cpu())
    return torch.cat(means), torch.cat(deviations)


@torch.no_grad()
def fold_scale(vae: Any, scale: float) -> None:
    """Scale the latents of ``vae`` by ``scale`` in its weights: its ``scaling_factor`` becomes 1.

    MiniSDs of several seeds then share every config and differ in weights only.
    """
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= scale
    vae.quant_conv.bias[:channels] *= scale
    vae.quant_conv.bias[channels:] += 2 * math.log(scale)  # of the posterior's log variance
    vae.post_quant_conv.weight /= scale
    vae.register_to_config(scaling_factor=1.0)


# ---- the denoiser


class TextToImageNetwork(nn.Module):
    """The U-Net, which is trained, and the frozen text encoder that it reads; ``scale`` brings the
    autoencoder's latents to unit variance.
    """

    scale: Tensor

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder.requires_grad_(False)
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(noisy, t, self.text_encoder(tokens)[0]).sample


def min_snr(alphas: Tensor, gamma: float) -> Tensor:
    """Return the weight min(SNR, γ)/SNR of the noise-prediction loss for each timestep (arXiv
    2303.09556, Eq. 5).
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
    checkpoint: Checkpoint | None = None,
) -> Rows:
    """Train the noise prediction with min-SNR weights, with dropped captions for classifier-free
    guidance.

    Args:
        latents: mean and deviation of each image's posterior (`encode`); ``model.scale`` is set
            from them.
        captions: for each image several captions, one is drawn at every visit.
        held_out: latents and captions of the validation images.
        gamma: clip of the signal-to-noise ratio in the loss weight.
        drop: share of captions that are replaced by the empty one.
    """
    power = sum(part.float().square().mean() for part in latents)
    scale = (power - latents[0].float().mean() ** 2) ** -0.5
    model.scale.copy_(scale)
    alphas = scheduler.alphas_cumprod
    weights = min_snr(alphas, gamma)
    tokens, empty = tokenize_all(tokenizer, captions), tokenize(tokenizer, [""])[0]
    device = device_of(model)

    def loss(network: Any, *drawn: Tensor) -> Tensor:
        z, ids, t, noise, a = (x.to(device) for x in (*drawn, alphas[drawn[2]].view(-1, 1, 1, 1)))
        prediction = network(a.sqrt() * z + (1 - a).sqrt() * noise, t, ids)
        return (prediction - noise).square().mean((1, 2, 3))

    def step(_: int, g: torch.Generator) -> Tensor:
        n = schedule.batch
        index = torch.randint(len(tokens), (n,), generator=g)
        mean, deviation = (part[index].float() for part in latents)
        z = scale * (mean + deviation * torch.randn(mean.shape, generator=g))
        ids = tokens[index, torch.randint(tokens.shape[1], (n,), generator=g)]
        ids = torch.where(torch.rand(n, 1, generator=g) < drop, empty, ids)
        t = torch.randint(len(alphas), (n,), generator=g)
        noise = torch.randn(z.shape, generator=g)
        return (weights[t].to(device) * loss(model, z, ids, t, noise)).mean()

    (mean, _), texts = held_out
    z, ids = scale * mean.float(), tokenize(tokenizer, texts)
    g = generator(seed, "denoiser", "validation")
    t, noise = torch.randint(len(alphas), (len(z),), generator=g), torch.randn(z.shape, generator=g)

    def validate(average: Any) -> dict[str, float]:
        parts = zip(z.split(64), ids.split(64), t.split(64), noise.split(64), strict=True)
        plain = torch.cat([loss(average, *part) for part in parts]).cpu()
        return {
            "validation_loss": plain.mean().item(),
            "validation_weighted": (weights[t] * plain).mean().item(),
        }

    return train(
        model, step, schedule, seed=seed, label="denoiser", checkpoint=checkpoint, validate=validate
    )
