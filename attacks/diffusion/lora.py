"""LoRA (arXiv 2106.09685) on a text-to-image model, through peft."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attacks.diffusion.attack import ConceptAttack, Moving
from lab.core.data import Concept
from lab.core.options import choice, count, flag, number
from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel

TARGETS = ("attn2", "attn", "all")
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(eq=False)
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

    Raises:
        UserError: see `ConceptAttack`; rank or alpha out of range, an unknown target.
    """

    rank: int = 4
    alpha: float | None = None
    targets: str = "attn2"
    text_encoder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        count(f"{self.key}.rank", self.rank)
        if self.alpha is not None:
            self.alpha = number(f"{self.key}.alpha", self.alpha, above=0)
        choice(f"{self.key}.targets", self.targets, TARGETS)
        flag(f"{self.key}.text_encoder", self.text_encoder)

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        parts: dict[str, Any] = {"unet": (model.unet, unet_layers(model.unet, self.targets))}
        if self.text_encoder:
            for i, encoder in enumerate(model.text_encoders):
                layers = [
                    n
                    for n, m in encoder.named_modules()
                    if isinstance(m, nn.Linear) and n.endswith(_TEXT)
                ]
                parts[f"text_encoder_{i + 1}" if i else "text_encoder"] = (encoder, layers)
        alpha = self.rank if self.alpha is None else self.alpha
        parameters: dict[str, nn.Parameter] = {}
        for prefix, (net, layers) in parts.items():
            found = inject(net, layers, self.rank, alpha, generator(seed, "lora", prefix))
            parameters |= {f"{prefix}.{name}": parameter for name, parameter in found.items()}

        def weights() -> dict[str, Tensor]:
            scaled = {
                n: p * (alpha / self.rank) if ".lora_B." in n else p for n, p in parameters.items()
            }
            return {
                name.replace(".default.weight", ".weight"): value for name, value in scaled.items()
            }

        def close() -> None:
            for net, _ in parts.values():
                absorb(net)

        info = {
            "rank": self.rank,
            "alpha": alpha,
            "targets": self.targets,
            "text_encoder": self.text_encoder,
        }
        return Moving(parameters, "lora", weights, close, text=self.text_encoder, info=info)


def unet_layers(unet: nn.Module, targets: str) -> list[str]:
    """Names of the layers that get an adapter."""
    found = []
    for name, module in unet.named_modules():
        if targets == "all":
            inside = name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
            fits = inside and isinstance(module, nn.Linear | nn.Conv2d)
        else:
            attention = ".attn2." in name or (targets == "attn" and ".attn1." in name)
            fits = attention and name.endswith(_PROJECTIONS)
        if fits:
            found.append(name)
    return found


def inject(
    net: nn.Module, layers: list[str], rank: int, alpha: float, g: torch.Generator
) -> dict[str, nn.Parameter]:
    """peft adapters on ``layers``; returns their parameters by name."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, bias="none")  # type: ignore[arg-type]
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):  # peft draws A from the global stream
        warnings.filterwarnings("ignore", message=".*groups > 1")
        inject_adapter_in_model(config, net)
    found = {name: p for name, p in net.named_parameters() if ".lora_" in name}
    for name, parameter in found.items():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
        if ".lora_A." in name:
            fresh = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=g)
            parameter.data.copy_(fresh)
    return found


def absorb(net: nn.Module) -> None:
    """Add every adapter of ``net`` to the weights below it and take it out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        (name, module) for name, module in net.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    for name, module in layers:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, module.get_base_layer().requires_grad_(False))
    if hasattr(net, "peft_config"):
        del net.peft_config
