"""Which parameters of a U-Net a level may move: Π_l and Π_u of arXiv 2412.15320."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lab.core.errors import UserError

SCOPES = ("kv", "attn2", "attention", "all")


def _inside(name: str, scope: str) -> bool:
    if scope == "all":
        return True
    if scope == "attention":
        return ".attn1." in name or ".attn2." in name
    if ".attn2." not in name:
        return False
    return scope == "attn2" or name.endswith((".to_k.weight", ".to_v.weight"))


def scope_names(unet: nn.Module, scope: str, key: str = "immunize.scope") -> tuple[str, ...]:
    """Names of the parameters in ``scope``, in the U-Net's order.

    ``kv``: key and value matrices of the cross-attention; ``attn2``: all of the cross-attention
        (the paper's S);
    ``attention``: self-attention too; ``all``: every parameter.

    Raises:
        UserError: the U-Net has none of them.
    """
    found = tuple(name for name, _ in unet.named_parameters() if _inside(name, scope))
    if not found:
        raise UserError(
            key,
            scope,
            "selects no parameter of this U-Net; choose all or a U-Net with cross-attention.",
        )
    return found


def matrices(weights: Mapping[str, Tensor], names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that a low-rank adapter can sit on: weights with an input and an output
    dimension.
    """
    return tuple(name for name in names if weights[name].ndim >= 2)
