"""Which rows a step sees. A function of (seed, task, step) alone, so that a resumed run sees the
same rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lab.core.seeding import generator

Spectrum = Literal["batch", "running", "full"]
SPECTRA: tuple[Spectrum, ...] = ("batch", "running", "full")


class RowSampler:
    """Rows and weights with which a step estimates the Gram matrix of one task, at the scale of one
    batch.

    ``batch``: one batch b_t, H = X_bᵀX_b. Epochs are seeded permutations, an incomplete last batch
        is dropped.
    ``running``: H = Σ_{j<m} w_j X_{t−j}ᵀX_{t−j}, w_j = β^j/Σ_i β^i, the last m batches at the
        *current* weights. Unbiased for the same mean as ``batch``, its variance is Σ w_j² of it;
        costs m times as much.
    ``full``: all N rows, weight batch/N each.

    Args:
        n: rows of the task. decay: β. window: m.
    """

    def __init__(
        self,
        n: int,
        batch: int,
        spectrum: Spectrum,
        decay: float,
        window: int,
        seed: int,
        label: str,
    ):
        self.n, self.batch, self.spectrum = n, min(batch, n), spectrum
        self.decay, self.window, self.seed, self.label = decay, window, seed, label
        self.per_epoch = max(1, n // self.batch)
        self._orders: dict[int, Tensor] = {}

    def batch_rows(self, step: int) -> Tensor:
        epoch, i = divmod(step, self.per_epoch)
        if epoch not in self._orders:
            if len(self._orders) > self.window:
                self._orders.pop(min(self._orders))
            rng = generator(self.seed, "rows", self.label, epoch)
            self._orders[epoch] = torch.randperm(self.n, generator=rng)
        return self._orders[epoch][i * self.batch : (i + 1) * self.batch]

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """Row numbers [m] and square roots of their weights [m, 1]."""
        if self.spectrum == "full":
            root = (self.batch / self.n) ** 0.5
            return torch.arange(self.n), torch.full((self.n, 1), root, dtype=torch.float64)
        if self.spectrum == "batch":
            return self.batch_rows(step), torch.ones(self.batch, 1, dtype=torch.float64)
        ages = range(min(self.window, step + 1))
        weights = torch.tensor([self.decay**j for j in ages], dtype=torch.float64)
        roots = (weights / weights.sum()).sqrt().repeat_interleave(self.batch)
        return torch.cat([self.batch_rows(step - j) for j in ages]), roots[:, None]
