"""Gradients and Hessian-vector products of losses over dictionaries of parameters.

Fused attention has no second derivative (pytorch #116350): `math_attention` surrounds forward and
backward alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

Params = dict[str, Tensor]
Weights = Mapping[str, Tensor]


def is_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors)


# attention in plain tensor operations, twice differentiable; what was in force before is restored
math_attention = partial(sdpa_kernel, SDPBackend.MATH)


def _leaves(params: Weights) -> Params:
    return {name: x.detach().requires_grad_(True) for name, x in params.items()}


def compute_gradients(loss: Callable[[Params], Tensor], params: Weights) -> tuple[Tensor, Params]:
    """Return the loss and its gradient by every entry of ``params`` (zeros where it does not depend
    on one).
    """
    with torch.enable_grad():
        leaves = _leaves(params)
        value = loss(leaves)
        slopes = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return value.detach(), dict(zip(leaves, slopes, strict=True))


def gradient_at(
    function: Callable[[Params], Tensor], theta: Weights, point: Weights, names: Sequence[str]
) -> tuple[float, Params]:
    """Return value and first-order gradient for ``names`` at θ with ``point``'s entries in its
    place.
    """
    weights = {name: value.detach() for name, value in point.items()}
    start = {name: weights.get(name, theta[name]) for name in names}
    value, slopes = compute_gradients(lambda leaves: function({**weights, **leaves}), start)
    return float(value), slopes


def accumulate(total: Params, gradient: Weights, factor: float = 1.0) -> None:
    """total += factor · gradient, in place; names that ``total`` lacks are added."""
    for name, value in gradient.items():
        if name in total:
            total[name].add_(value, alpha=factor)
        else:
            total[name] = value * factor


def hessian_product(
    loss: Callable[[Params, Params], Tensor],
    theta: Params,
    phi: Params,
    direction: Params,
    wanted: Sequence[str],
) -> tuple[Params, Params]:
    """Return ∂⟨∇_φ ℓ(θ, φ), d⟩ by θ and by φ: one Hessian-vector product that reaches outside φ.

    Args:
        loss: ℓ(θ, φ), scalar.
        theta, phi: where; the first result has the names of ``theta``.
        direction: d, with the names of ``phi``.
        wanted: names of φ in the second result.
    """
    with math_attention(), torch.enable_grad():
        outer, inner = _leaves(theta), _leaves(phi)
        slopes = torch.autograd.grad(
            loss(outer, inner), list(inner.values()), create_graph=True, materialize_grads=True
        )
        pairs = zip(inner, slopes, strict=True)
        pairing = torch.stack([(g * direction[x]).sum() for x, g in pairs]).sum()
        leaves = [*outer.values(), *(inner[x] for x in wanted)]
        if not pairing.requires_grad or not leaves:  # a loss linear in φ
            products = tuple(torch.zeros_like(x) for x in leaves)
        else:
            products = torch.autograd.grad(pairing, leaves, materialize_grads=True)
    by_theta = dict(zip(theta, products, strict=False))
    return by_theta, dict(zip(wanted, products[len(theta) :], strict=True))


@contextlib.contextmanager
def checkpointed(unet: Any) -> Iterator[None]:
    """Gradient checkpointing of a diffusers U-Net that is right under `functional_call` and twice
    differentiable.

    diffusers' own recomputes a block in the backward pass, when `functional_call` has put the
    module's own weights back, and so differentiates at the wrong weights. Here each block is
    recomputed with the tensors that it was called with. Non-reentrant, since the reentrant kind
    never works with `torch.autograd.grad`.
    """

    def block(module: Any, *arguments: Any) -> Any:
        owner = getattr(module, "__self__", module)
        held = {**dict(owner.named_parameters()), **dict(owner.named_buffers())}
        return checkpoint(
            lambda *a: functional_call(owner, held, a), *arguments, use_reentrant=False
        )

    unet.enable_gradient_checkpointing(block)
    training = unet.training
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()
        unet.train(training)
