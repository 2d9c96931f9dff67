"""LoRA (arXiv 2106.09685) on the extractor, through peft."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from attacks.adapters import adapters, inject
from attacks.finetune.full import Adaptation, TrainedPart
from lab.core.config import Count, Text, config
from lab.core.data import Kind
from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.core.types import FeatureModel


@config
class Lora(Adaptation):
    """Trains low-rank adapters on every Linear and Conv2d of the chosen blocks, and a head.

    Grouped convolutions whose groups do not divide ``rank`` (depthwise ones) are left frozen,
    because peft has no adapter for them, and so are subclasses with another forward pass (timm's
    same-padding convolution). B starts at zero and A as in the paper's code (Kaiming uniform),
    drawn from the attack's seed. The weights in the trajectory are the adapters and the head.

    Args:
        rank: of the adapters.
        alpha: an adapter adds alpha/rank · BA.

    Raises:
        UserError: when called, blocks without a layer that fits.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"deep"})

    name: Text = "extractor_lora"
    rank: Count = 8
    alpha: Count = 16

    def open(self, net: FeatureModel, seed: int) -> TrainedPart:
        names = [
            f"blocks.{i}.{name}".rstrip(".")
            for i in self.moving_blocks(net)
            for name, layer in net.blocks[i].named_modules()
            if type(layer) is nn.Linear
            or (type(layer) is nn.Conv2d and self.rank % layer.groups == 0)
        ]
        if not names:
            fix = "these blocks hold no Linear or Conv2d layer that fits; choose more."
            raise UserError(f"attacks.{self.name}.blocks", self.blocks, fix)
        inject(net, names, self.rank, self.alpha, generator(seed, "lora"))
        info = {"rank": self.rank, "alpha": self.alpha, "adapted": names}
        return TrainedPart(int(names[0].split(".")[1]), adapters(net), info)
