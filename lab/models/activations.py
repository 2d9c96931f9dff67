"""Evaluate the part of a model that does not move only once."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from lab.core.hashing import digest
from lab.core.training import progress
from lab.core.types import FeatureModel

_MEMORY_LIMIT = 3 * 2**30  # bytes kept in process; the oldest entry goes first
_memo: OrderedDict[str, Tensor] = OrderedDict()


@torch.no_grad()
def prefix(model: FeatureModel, x: Tensor, stop: int, batch: int = 64) -> Tensor:
    """Output of blocks 0 … ``stop`` - 1 on raw inputs ``x`` [n, ...], memoised by content.

    ``stop`` = 0 returns the raw inputs themselves, so that callers feed ``model.inputs`` per batch;
    ``stop`` = len(blocks) gives the features.
    """
    if stop == 0:
        return x
    blocks = list(model.blocks)[:stop]
    weights = [t for block in blocks for t in block.state_dict().values()]
    # the structure and what `inputs` does belong to the function too, not only the weights
    form = f"{type(model).__qualname__}{blocks}{digest(model.inputs(x[:1]))}"
    key = f"{stop}:{form}:{digest(x)}:{digest(*weights)}"
    if key not in _memo:
        starts = range(0, len(x), batch)
        parts = [
            model.run(model.inputs(x[i : i + batch]), 0, stop)
            for i in progress(starts, "frozen blocks")
        ]
        _memo[key] = torch.cat(parts)
        while sum(t.nbytes for t in _memo.values()) > _MEMORY_LIMIT and len(_memo) > 1:
            _memo.popitem(last=False)
    _memo.move_to_end(key)
    return _memo[key]


def features(model: FeatureModel, x: Tensor, batch: int = 64) -> Tensor:
    """Features [n, d] of raw inputs, without gradient."""
    return prefix(model, x, len(model.blocks), batch)
