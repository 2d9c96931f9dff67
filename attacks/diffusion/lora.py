"""LoRA (arXiv 2106.09685) on a text-to-image model, through peft."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from attacks.diffusion.attack import ConceptAttack, Moving
from lab.core.config import Count, Flag, Positive, config
from lab.core.data import Concept
from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel

Targets = Literal["attn2", "attn", "all"]
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")


@config
class ConceptLora(ConceptAttack):
    """Trains low-rank adapters. B starts at zero, A Kaiming uniform as in the paper's code, from
    the attack's seed.

    The weights are those of `StableDiffusionPipeline.load_lora_weights`; the factor alpha/rank is
    multiplied into B, so that they mean the same in every version of diffusers.

    Args:
        rank: of the adapters.
        alpha: an adapter adds alpha/rank · BA; None = rank.
        targets: ``attn2`` (cross-attention) | ``attn`` (self-attention as well) | ``all`` (every
            linear layer and convolution of the U-Net's blocks).
        text_encoder: adapters on the text encoders' attention as well.
    """

    rank: Count = 4
    alpha: Positive | None = None
    targets: Targets = "attn2"
    text_encoder: Flag = False

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        parts = {"unet": (model.unet, unet_layers(model.unet, self.targets))}
        for i, encoder in enumerate(model.text_encoders if self.text_encoder else ()):
            layers = [
                name
                for name, module in encoder.named_modules()
                if isinstance(module, nn.Linear) and name.endswith(_TEXT)
            ]
            parts[f"text_encoder_{i + 1}" if i else "text_encoder"] = (encoder, layers)
        alpha = self.rank if self.alpha is None else self.alpha
        tuners, parameters = [], dict[str, nn.Parameter]()
        for prefix, (net, layers) in parts.items():
            tuners.append(inject(net, layers, self.rank, alpha, generator(seed, "lora", prefix)))
            parameters |= {f"{prefix}.{name}": p for name, p in adapters(net).items()}

        def weights() -> dict[str, Tensor]:
            return {
                name.replace(".default.weight", ".weight"): p * (alpha / self.rank)
                if ".lora_B." in name
                else p
                for name, p in parameters.items()
            }

        def close() -> None:
            for tuner in tuners:
                tuner.merge_and_unload()

        info = {
            "rank": self.rank,
            "alpha": alpha,
            "targets": self.targets,
            "text_encoder": self.text_encoder,
        }
        return Moving(parameters, "lora", weights, close, text=self.text_encoder, info=info)


def unet_layers(unet: nn.Module, targets: Targets) -> list[str]:
    """Return the names of the layers that get an adapter."""
    names = []
    for name, module in unet.named_modules():
        if targets == "all":
            inside = name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
            fits = inside and isinstance(module, nn.Linear | nn.Conv2d)
        else:
            attention = ".attn2." in name or (targets == "attn" and ".attn1." in name)
            fits = attention and name.endswith(_PROJECTIONS)
        if fits:
            names.append(name)
    return names


def adapters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapters in ``net``, by name."""
    return {name: p for name, p in net.named_parameters() if ".lora_" in name}


def inject(
    net: nn.Module, layers: list[str], rank: int, alpha: float, g: torch.Generator
) -> LoraModel:
    """Put peft adapters on ``layers``; A is drawn from ``g``."""
    options = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, bias="none")  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws A globally
        warnings.filterwarnings("ignore", message=".*groups > 1")
        tuner = LoraModel(net, {"default": options}, "default")
    for name, parameter in adapters(net).items():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
        if ".lora_A." in name:
            fresh = nn.init.kaiming_uniform_(
                torch.empty(parameter.shape), a=math.sqrt(5), generator=g
            )
            parameter.data.copy_(fresh)
    return tuner
