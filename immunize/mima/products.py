"""Gradients and Hessian-vector products of losses over dictionaries of parameters.

Fused attention has no second derivative (pytorch #116350): `math_attention` surrounds forward and
backward alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from immunize.merge.closed_form import Params

Product = Literal["forward", "reverse"]


def finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors)


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Attention in plain tensor operations, twice differentiable; what was in force before is
    restored.
    """
    with sdpa_kernel([SDPBackend.MATH]):
        yield


def _leaves(params: Params) -> Params:
    return {name: x.detach().requires_grad_(True) for name, x in params.items()}


def gradients(loss: Callable[[Params], Tensor], params: Params) -> tuple[Tensor, Params]:
    """The loss and its gradient by every entry of ``params`` (zeros where it does not depend on
    one).
    """
    with torch.enable_grad():
        leaves = _leaves(params)
        value = loss(leaves)
        found = torch.autograd.grad(
            value, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return value.detach(), dict(zip(leaves, found, strict=True))


def product(
    loss: Callable[[Params, Params], Tensor],
    theta: Params,
    phi: Params,
    direction: Params,
    want: Sequence[str],
    how: Product = "reverse",
) -> tuple[Params, Params]:
    """∂⟨∇_φ ℓ(θ, φ), d⟩ by θ and by φ: one Hessian-vector product that reaches outside φ.

    Args:
        loss: ℓ(θ, φ), scalar.
        theta, phi: where; the first result has the names of ``theta``.
        direction: d, with the names of ``phi``.
        want: names of φ in the second result.
        how: ``reverse`` differentiates the gradient by reverse mode, ``forward`` by forward mode.
            In theory three and two forward-backwards; measured at MiniSD's size 2.7 and 3.9
            (`tests/benchmarks/hypergradient.py`), as PyTorch's SiLU and group norm have forward
            derivatives only in decomposed form. So ``reverse`` is the default everywhere.
    """
    with math_attention(), torch.enable_grad():
        outer, inner = _leaves(theta), _leaves(phi)
        if how == "forward":
            found = _forward(loss, outer, inner, direction, want)
        else:
            slope = torch.autograd.grad(
                loss(outer, inner),
                list(inner.values()),
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            pairing = torch.stack(
                [(g * direction[x]).sum() for x, g in zip(inner, slope, strict=True)]
            ).sum()
            leaves = [*outer.values(), *(inner[x] for x in want)]
            if not pairing.requires_grad or not leaves:  # a loss linear in φ
                found = [torch.zeros_like(x) for x in leaves]
            else:
                found = list(
                    torch.autograd.grad(pairing, leaves, allow_unused=True, materialize_grads=True)
                )
    found = [x.detach() for x in found]
    return dict(zip(theta, found, strict=False)), dict(zip(want, found[len(theta) :], strict=True))


def _forward(
    loss: Callable[[Params, Params], Tensor],
    outer: Params,
    inner: Params,
    direction: Params,
    want: Sequence[str],
) -> list[Tensor]:
    with forward_ad.dual_level():
        dual = {x: forward_ad.make_dual(y, direction[x].to(y)) for x, y in inner.items()}
        leaves = [*outer.values(), *(dual[x] for x in want)]
        if not leaves:
            return []
        # create_graph: silu_backward and native_group_norm_backward have no forward derivative of
        # their own
        slope = torch.autograd.grad(
            loss(outer, dual), leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        tangents = [forward_ad.unpack_dual(g).tangent for g in slope]
        return [
            torch.zeros_like(x) if t is None else t.detach().clone()
            for x, t in zip(leaves, tangents, strict=True)
        ]


@contextlib.contextmanager
def checkpointed(unet: Any) -> Iterator[None]:
    """Gradient checkpointing of a diffusers U-Net that is right under `functional_call` and twice
    differentiable.

    diffusers' own recomputes a block in the backward pass, when `functional_call` has put the
    module's own weights back, and so differentiates at the wrong weights. Here each block is
    recomputed with the tensors that it was called with. Non-reentrant, since the reentrant kind
    never works with `torch.autograd.grad`.
    """
    from torch.utils.checkpoint import checkpoint

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
