"""LoRA (arXiv 2106.09685) on the extractor, through peft."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from attacks.finetune.adaptation import Adaptation, Moving, moving_blocks
from lab.core.errors import UserError
from lab.core.options import count
from lab.core.seeding import generator
from lab.core.types import FeatureModel


class Lora(Adaptation):
    """Trains low-rank adapters on every Linear and Conv2d of the chosen blocks, and a head.

    Grouped convolutions whose groups do not divide ``rank`` (depthwise ones) are left frozen,
    because peft has no adapter for them, and so are subclasses with another forward pass (timm's
    same-padding convolution). B starts at zero and A as in the paper's code (Kaiming uniform),
    drawn from the attack's seed. The weights in the trajectory are the adapters and the head.

    Args:
        rank: of the adapters, ≥ 1.
        alpha: whole number; an adapter adds alpha/rank · BA.
        blocks: last blocks that get adapters; None = all.

    Raises:
        UserError: rank, alpha or blocks below 1; when called, blocks without a layer that fits.
    """

    def __init__(
        self,
        *,
        name: str = "extractor_lora",
        rank: int = 8,
        alpha: int = 16,
        blocks: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name=name, **options)
        self.rank = count(f"{self.key}.rank", rank)
        self.alpha = count(f"{self.key}.alpha", alpha)
        self.blocks = None if blocks is None else count(f"{self.key}.blocks", blocks)

    def open(self, net: FeatureModel, seed: int) -> Moving:
        key = f"{self.key}.blocks"
        targets = {
            i: [
                f"blocks.{i}.{name}" if name else f"blocks.{i}"
                for name in _layers(net.blocks[i], self.rank)
            ]
            for i in moving_blocks(net, self.blocks, key)
        }
        names = [name for layers in targets.values() for name in layers]
        if not names:
            raise UserError(
                key,
                self.blocks,
                "these blocks hold no Linear or Conv2d layer that fits; choose more.",
            )
        pattern = "|".join(
            map(re.escape, names)
        )  # a list would match ends of names, so nested blocks as well
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=pattern, bias="none")
        # peft draws A from the global stream; ours replaces it below. It warns that grouped layers
        # cannot be merged.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*groups > 1")
            inject_adapter_in_model(config, net)
        parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        stream = generator(seed, "lora")
        for name, parameter in parameters.items():
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=stream)
        start = min(i for i, layers in targets.items() if layers)
        info = {"rank": self.rank, "alpha": self.alpha, "adapted": names}
        return Moving(net, start, parameters, info)


def _layers(block: nn.Module, rank: int) -> list[str]:
    """Names in ``block`` of the layers that an adapter fits."""
    return [
        name
        for name, module in block.named_modules()
        if type(module) is nn.Linear or (type(module) is nn.Conv2d and rank % module.groups == 0)
    ]
