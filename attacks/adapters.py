"""Low-rank adapters (arXiv 2106.09685) of peft whose first values depend on a seed alone."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, LoraModel
from torch import nn


def adapters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapters in ``net``, by name."""
    return {name: p for name, p in net.named_parameters() if ".lora_" in name}


def inject(
    net: nn.Module, layers: Sequence[str], rank: int, alpha: float, g: torch.Generator
) -> LoraModel:
    """Put adapters on ``layers``, in float32 at least: A is Kaiming uniform from ``g``, B is 0."""
    # a list would match ends of names, so nested layers as well
    pattern = "|".join(map(re.escape, layers))
    options = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, bias="none")  # type: ignore[arg-type]
    # peft draws A from the global stream, and warns that grouped layers cannot be merged
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1")
        tuner = LoraModel(net, {"default": options}, "default")
    for name, parameter in adapters(net).items():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
        if ".lora_A." in name:
            fresh = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=g)
            parameter.data.copy_(fresh)
    return tuner
