"""Fréchet distance between two sets of feature vectors (arXiv 1706.08500), and how small it can be
on real data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lab.core.errors import UserError
from lab.core.seeding import generator


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of feature sets [n, d] and [m, d], in float64.

    tr (Σ_a Σ_b)^½ is the sum of the singular values of A Bᵀ / √((n − 1)(m − 1)), A and B the
    centred sets: the non-zero eigenvalues of Σ_aΣ_b are the squares of these. So no root of a
    singular d × d matrix is taken, and fewer pictures than dimensions do no numerical harm.

    They do bias the figure: it is too large, roughly by a constant over n (arXiv 1911.07023).
    Compare only figures of equal n, and read them beside `floor`. Over features other than
    Inception's it is no "FID".

    Raises:
        UserError: fewer than two vectors, different dimensions, or values that are not finite.
    """
    for x in (a, b):
        if x.ndim != 2 or len(x) < 2 or not torch.isfinite(x).all():
            raise UserError(
                "features", list(x.shape), "needs two or more finite vectors [n, d] on either side."
            )
    if a.shape[1] != b.shape[1]:
        raise UserError(
            "features", f"{list(a.shape)}, {list(b.shape)}", "both sides need the same dimension."
        )
    a, b = a.double(), b.double()
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    left, right = len(a) - 1, len(b) - 1
    cross = (
        torch.linalg.svdvals(_thin(centred_a) @ _thin(centred_b).T).sum() / (left * right) ** 0.5
    )
    spread = centred_a.square().sum() / left + centred_b.square().sum() / right
    found = (a.mean(0) - b.mean(0)).square().sum() + spread - 2 * cross
    return max(0.0, float(found))  # rounding can take a distance of 0 below it


def _thin(x: Tensor) -> Tensor:
    """R of x = QR where that is smaller than x [n, d]; it keeps the singular values of every
    product x yᵀ.
    """
    return torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x


def floor(real: Tensor, count: int, *, seed: int, draws: int = 5) -> float:
    """Mean distance between two disjoint random halves of ``count`` real vectors each: what a
    perfect generator gets.

    Args:
        real: features of real pictures [n, d], n ≥ 2 ``count``.
        count: pictures per side; that of the comparison whose floor it is.

    Raises:
        UserError: too few real pictures.
    """
    if count < 2 or len(real) < 2 * count:
        raise UserError(
            "pictures",
            len(real),
            f"a floor for {count} pictures needs {2 * max(count, 2)} real ones.",
        )
    found = []
    for draw in range(draws):
        order = torch.randperm(len(real), generator=generator(seed, "frechet floor", draw))
        found.append(frechet_distance(real[order[:count]], real[order[count : 2 * count]]))
    return sum(found) / draws
