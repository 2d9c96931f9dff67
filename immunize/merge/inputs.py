"""What the layers of a U-Net read: which matrices share an input, and recorded inputs of those that
read no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel, Text

TEXT = "text"  # the group of the matrices that read the text encoder
Batch = tuple[
    Tensor, Text, Tensor, Tensor
]  # latents, text, noise, timesteps, as `DiffusionModel.loss` takes them


def suffixes(attention: str, kinds: str) -> tuple[str, ...]:
    return tuple(f"{attention}.to_{kind}.weight" for kind in kinds)


def group_of(name: str) -> str:
    """Matrices of one group read the same input: the text, or a self-attention's, or the layer's
    own.
    """
    if name.endswith(suffixes("attn2", "kv")):
        return TEXT
    if name.endswith(suffixes("attn1", "qkv")):
        return name.rsplit(".", 2)[0]
    return name.rsplit(".", 1)[0]


def _matrix_rows(module: nn.Module, x: Tensor) -> Tensor:
    """What the module's weight, seen as a matrix, multiplies: [rows, d]."""
    if isinstance(module, nn.Conv2d):
        kernel: Any = module.kernel_size
        padding: Any = module.padding
        patches = nn.functional.unfold(
            x, kernel, dilation=module.dilation, padding=padding, stride=module.stride
        )
        return patches.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


@torch.no_grad()
def layer_inputs(
    model: DiffusionModel,
    names: Sequence[str],
    batches: Sequence[Batch],
    rows: int,
    seed: int,
    *labels: object,
) -> dict[str, Tensor]:
    """Inputs of the layers of ``names`` on ``batches``, group → at most ``rows`` rows [·, d],
    float64 on the CPU.

    An equal share of each batch is chosen at random (stream ``labels`` of ``seed``).
    """
    modules = dict(model.unet.named_modules())
    owners = {group_of(name): name.rsplit(".", 1)[0] for name in names}
    found: dict[str, list[Tensor]] = {group: [] for group in owners}
    share = -(-rows // max(len(batches), 1))

    def hook(group: str, g: torch.Generator) -> Any:
        def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            every = _matrix_rows(module, arguments[0])
            chosen = torch.randperm(len(every), generator=g)[:share]
            found[group].append(every[chosen.to(every.device)].double().cpu())

        return record

    handles = [
        modules[owner].register_forward_pre_hook(
            hook(group, generator(seed, "merge", *labels, group))
        )
        for group, owner in owners.items()
    ]
    try:
        for z, text, noise, t in batches:
            model.predict(model.noised(z, noise, t)[0].to(z), t, text)
    finally:
        for handle in handles:
            handle.remove()
    return {group: torch.cat(parts)[:rows] for group, parts in found.items()}
