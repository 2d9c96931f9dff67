"""Fine-tuning of a part or the whole of the extractor together with a head."""

from __future__ import annotations

from typing import Any, ClassVar

from attacks.finetune.adaptation import Adaptation, Moving, moving_blocks
from lab.core.data import Kind
from lab.core.options import count
from lab.core.types import FeatureModel


def _open(net: FeatureModel, indices: list[int]) -> Moving:
    """All parameters of the blocks ``indices`` move."""
    parameters = {
        f"blocks.{i}.{name}": parameter
        for i in indices
        for name, parameter in net.blocks[i].named_parameters()
    }
    return Moving(net, indices[0], parameters, {"blocks": [net.block_names[i] for i in indices]})


class LastBlockFinetune(Adaptation):
    """Trains the last ``blocks`` blocks and a head; see `Adaptation` for the other options.

    Args:
        blocks: how many, counted from the end; blocks without parameters do not count.

    Raises:
        UserError: ``blocks`` < 1; when called, more blocks than the model has.
    """

    def __init__(
        self, *, name: str = "last_block_finetune", blocks: int = 1, **options: Any
    ) -> None:
        super().__init__(name=name, **options)
        self.blocks = count(f"{self.key}.blocks", blocks)

    def open(self, net: FeatureModel, seed: int) -> Moving:
        return _open(net, moving_blocks(net, self.blocks, f"{self.key}.blocks"))


class FullFinetune(Adaptation):
    """Trains every block and a head; for a linear extractor that is θ and w. Options as in
    `Adaptation`.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep"})

    def __init__(self, *, name: str = "extractor_full_finetune", **options: Any) -> None:
        super().__init__(name=name, **options)

    def open(self, net: FeatureModel, seed: int) -> Moving:
        return _open(net, moving_blocks(net, None, self.key))
