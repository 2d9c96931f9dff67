"""A linear head on features: squared loss for regression, cross-entropy for classification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.core.data import Task

FIT_STEPS = 50  # L-BFGS iterations of the first fit; the head goes on moving afterwards
FIT_RIDGE = (
    1e-3  # relative to σ_1 of the Gram matrix: keeps the first head small along noise directions
)


class Head:
    """w [d, c] with its loss on features y [n, d]. No intercept: the Hessian of the probe is
    YᵀY.
    """

    def __init__(self, task: Task, dim: int) -> None:
        self.regression = task.kind == "regression"
        self.targets = task.train.y
        self.classes = 1 if self.regression else max(task.classes, 2)
        self.w = torch.zeros(dim, self.classes, dtype=torch.float64)

    def loss(self, y: Tensor, rows: Tensor) -> tuple[float, Tensor, Tensor]:
        """Mean loss, its gradient with respect to features [n, d] and to w [d, c]."""
        n = len(rows)
        target = self.targets[rows]
        out = y @ self.w
        if self.regression:
            residual = out - target.to(torch.float64)[:, None]
            value = residual.square().mean() / 2
            slope = residual / n
        else:
            value = F.cross_entropy(out, target)
            slope = (out.softmax(1) - F.one_hot(target, self.classes)) / n
        return float(value), slope @ self.w.T, y.T @ slope

    @staticmethod
    def lipschitz(y: Tensor) -> float:
        """Largest curvature of the squared loss in w: σ_1(YᵀY)/n (at least that of
        cross-entropy).
        """
        gram = y @ y.T if y.shape[0] < y.shape[1] else y.T @ y
        return float(torch.linalg.matrix_norm(gram, 2)) / y.shape[0]

    def descend(self, gradient: Tensor, step: float) -> None:
        self.w = self.w - step * gradient

    def fit(self, y: Tensor) -> None:
        """The head that the original features have: ridge solution, or logistic regression by
        L-BFGS.
        """
        y = y.to(torch.float64)
        n, d = y.shape
        ridge = FIT_RIDGE * self.lipschitz(y) * n
        if self.regression:
            target = self.targets.to(torch.float64)[:, None]
            if n < d:
                gram = y @ y.T + ridge * torch.eye(n, dtype=torch.float64)
                self.w = y.T @ torch.linalg.solve(gram, target)
            else:
                self.w = torch.linalg.solve(
                    y.T @ y + ridge * torch.eye(d, dtype=torch.float64), y.T @ target
                )
            return
        w = self.w.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([w], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(y @ w, self.targets) + ridge / n / 2 * w.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(closure)
        self.w = w.detach()
