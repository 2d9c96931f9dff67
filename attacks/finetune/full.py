"""Fine-tuning of a part or the whole of the extractor together with a head."""

from __future__ import annotations

from typing import ClassVar

from attacks.finetune.adaptation import Adaptation, TrainedPart, moving_blocks
from lab.core.config import Count, Text, config
from lab.core.data import Kind
from lab.core.types import FeatureModel


@config
class FullFinetune(Adaptation):
    """Trains every block and a head; for a linear extractor that is θ and w."""

    name: Text = "extractor_full_finetune"

    def open(self, net: FeatureModel, seed: int) -> TrainedPart:
        return _all_parameters(net, moving_blocks(net, None, f"attacks.{self.name}"))


@config
class LastBlockFinetune(Adaptation):
    """Trains the last blocks and a head.

    Args:
        blocks: how many, counted from the end; blocks without parameters do not count.

    Raises:
        UserError: when called, more blocks than the model has.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"deep"})

    name: Text = "last_block_finetune"
    blocks: Count = 1

    def open(self, net: FeatureModel, seed: int) -> TrainedPart:
        key = f"attacks.{self.name}.blocks"
        return _all_parameters(net, moving_blocks(net, self.blocks, key))


def _all_parameters(net: FeatureModel, indices: list[int]) -> TrainedPart:
    """Move all parameters of the blocks ``indices``."""
    parameters = {
        f"blocks.{i}.{name}": parameter
        for i in indices
        for name, parameter in net.blocks[i].named_parameters()
    }
    return TrainedPart(indices[0], parameters, {"blocks": [net.block_names[i] for i in indices]})
