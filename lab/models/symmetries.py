"""Changes of attention weights that leave what a U-Net computes as it is.

Per head, queries and keys meet only in W_qᵀ W_k, values and outputs only in W_o W_v. So every
invertible M of the head's width gives an equal network:

    W_q ← M⁻ᵀ W_q,  W_k ← M W_k   and   W_v ← M W_v,  W_o ← W_o M⁻¹.

Training does depend on M. Linear layers without bias only, as in every U-Net of diffusers.
`reparametrize` takes diagonal M of powers of two: exact in float32 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from lab.core.seeding import generator


def _heads(unet: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """Yield name, W_q, W_k, W_v [width, inputs] and W_o [outputs, width] of every head, as views
    of the weights.
    """
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            layers: Any = module
            width = layers.to_q.weight.shape[0] // module.heads
            for head in range(module.heads):
                rows = slice(head * width, (head + 1) * width)
                q, k, v = (layer.weight[rows] for layer in (layers.to_q, layers.to_k, layers.to_v))
                yield f"{name}.{head}", q, k, v, layers.to_out[0].weight[:, rows]


@torch.no_grad()
def reparametrize(unet: nn.Module, exponent: int, seed: int) -> None:
    """Multiply rows of W_k and W_v by 2^e in place, those of W_q and the columns of W_o by 2^-e.

    Per head, the integers e are evenly spaced from -``exponent`` to ``exponent``, in random order.
    """
    for name, q, k, v, o in _heads(unet):
        for label, (left, right) in {"qk": (k, q.T), "vo": (v, o)}.items():
            g = generator(seed, "reparametrize", name, label)
            order = torch.randperm(len(q), generator=g)
            scale = 2 ** torch.linspace(-exponent, exponent, len(q)).round()[order].to(left)
            left *= scale[:, None]
            right /= scale


@torch.no_grad()
def canonicalize(unet: nn.Module) -> None:
    """Bring the attention weights into a form that no M changes, in place.

    From the singular value decomposition U S Vᵀ of W_qᵀ W_k: W_q = S^½ Uᵀ and W_k = S^½ Vᵀ, so that
    both have equal norms; W_o and W_v alike. Each row's largest entry is made positive.
    """
    for _, q, k, v, o in _heads(unet):
        for left, right in ((k, q.T), (v, o)):  # the product is right @ left
            a, b = right.cpu().double(), left.cpu().double()
            # through QR the decomposition is of a matrix of the head's width
            (qa, ra), (qb, rb) = torch.linalg.qr(a), torch.linalg.qr(b.T)
            u, s, w = torch.linalg.svd(ra @ rb.T)
            new_a, new_b = qa @ u * s.sqrt(), s.sqrt()[:, None] * (w @ qb.T)
            sign = torch.sign(new_b.gather(1, new_b.abs().argmax(1, keepdim=True)))
            right.copy_(new_a * sign.T)
            left.copy_(new_b * sign)
