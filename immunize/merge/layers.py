"""The layers of a U-Net: which parameters a scope covers, which matrices share an input, and
recorded inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel, Text

TEXT = "text"  # the group of the matrices that read the text encoder
Scope = Literal["kv", "qkv", "attn2", "attention", "down", "up", "all"]
# latents, text, noise, timesteps, as `DiffusionModel.loss` takes them
ModelInputs = tuple[Tensor, Text, Tensor, Tensor]


def _suffixes(attention: str, kinds: str) -> tuple[str, ...]:
    return tuple(f"{attention}.to_{kind}.weight" for kind in kinds)


def scope_names(unet: nn.Module, scope: Scope, key: str = "immunize.scope") -> tuple[str, ...]:
    """Return the names of the parameters in ``scope``, in the U-Net's order.

    ``kv``: key and value matrices of the cross-attention; ``qkv``: its queries too; ``attn2``: all
        of the cross-attention (the S of arXiv 2412.15320); ``attention``: self-attention too;
        ``down`` and ``up``: those blocks; ``all``: every parameter.

    Raises:
        UserError: the U-Net has none of them; names the config key ``key``.
    """
    inside = {
        "kv": lambda name: name.endswith(_suffixes(".attn2", "kv")),
        "qkv": lambda name: name.endswith(_suffixes(".attn2", "qkv")),
        "attn2": lambda name: ".attn2." in name,
        "attention": lambda name: ".attn1." in name or ".attn2." in name,
        "down": lambda name: name.startswith("down_blocks."),
        "up": lambda name: name.startswith("up_blocks."),
        "all": lambda name: True,
    }[scope]
    names = tuple(name for name, _ in unet.named_parameters() if inside(name))
    if not names:
        reason = "selects no parameter of this U-Net; choose all or a U-Net with cross-attention."
        raise UserError(key, scope, reason)
    return names


def group_of(name: str) -> str:
    """Return the group of a matrix. Matrices of one group read the same input: the text, or a
    self-attention's, or the layer's own.
    """
    if name.endswith(_suffixes("attn2", "kv")):
        return TEXT
    if name.endswith(_suffixes("attn1", "qkv")):
        return name.rsplit(".", 2)[0]
    return name.rsplit(".", 1)[0]


def _matrix_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return what the module's weight, seen as a matrix, multiplies: [rows, d]."""
    if isinstance(module, nn.Conv2d):
        kernel: Any = module.kernel_size
        padding: Any = module.padding
        patches = nn.functional.unfold(
            x, kernel, dilation=module.dilation, padding=padding, stride=module.stride
        )
        return patches.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


@torch.no_grad()
def record_inputs(
    model: DiffusionModel,
    names: Sequence[str],
    batches: Sequence[ModelInputs],
    rows: int,
    seed: int,
    *labels: object,
) -> dict[str, Tensor]:
    """Record the inputs of the layers of ``names`` on ``batches``: group → at most ``rows`` rows
    [·, d], float64 on the CPU.

    An equal share of each batch is chosen at random (stream ``labels`` of ``seed``).
    """
    owners = {group_of(name): name.rsplit(".", 1)[0] for name in names}
    recorded: dict[str, list[Tensor]] = {group: [] for group in owners}
    streams = {group: generator(seed, "merge", *labels, group) for group in owners}
    share = -(-rows // max(len(batches), 1))

    def record(group: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        every = _matrix_rows(module, arguments[0])
        chosen = torch.randperm(len(every), generator=streams[group])[:share]
        recorded[group].append(every[chosen.to(every.device)].double().cpu())

    handles = [
        model.unet.get_submodule(owner).register_forward_pre_hook(partial(record, group))
        for group, owner in owners.items()
    ]
    try:
        for z, text, noise, t in batches:
            model.predict(model.noised(z, noise, t)[0].to(z), t, text)
    finally:
        for handle in handles:
            handle.remove()
    return {group: torch.cat(parts)[:rows] for group, parts in recorded.items()}
