"""Conjugate gradients on sets of named tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Solution = tuple[Tensors, dict[str, Any]]


def dot(left: Tensors, right: Tensors) -> float:
    """Return the inner product of two sets of tensors with equal names."""
    return sum(float((x.double() * right[name].double()).sum()) for name, x in left.items())


def axpy(a: float, x: Tensors, y: Tensors) -> Tensors:
    """Return a·x + y."""
    return {name: a * x[name] + y[name] for name in y}


def conjugate_gradients(
    apply: Callable[[Tensors], Tensors], v: Tensors, iterations: int, tolerance: float
) -> Solution:
    """Return a with A a ≈ v for the symmetric A that ``apply`` multiplies by, and the facts.

    It stops at a relative residual of ``tolerance``, after ``iterations``, or at a direction of
    curvature ≤ 0, where A is not positive definite; before any other direction a is v then.
    """
    norm = dot(v, v)
    a = {name: torch.zeros_like(x) for name, x in v.items()}
    r, p, rr = dict(v), dict(v), norm
    done, negative = 0, False
    while done < iterations and norm > 0 and rr > tolerance**2 * norm:
        q = apply(p)
        curvature = dot(p, q)
        if curvature <= 0:
            negative = True
            if done == 0:
                a = dict(v)
            break
        step = rr / curvature
        a, r = axpy(step, p, a), axpy(-step, q, r)
        before, rr = rr, dot(r, r)
        p = axpy(rr / before, p, r)
        done += 1
    residual = (rr / norm) ** 0.5 if norm > 0 else 0.0
    return a, {"iterations": done, "residual": residual, "negative_curvature": negative}
