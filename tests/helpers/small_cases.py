"""Tiny problems and helpers for the immunizer tests."""

import torch
from torch import nn

from lab.core.data import Case, Split, Task
from lab.core.types import FeatureModel
from lab.models.linear import LinearBackbone


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def linear_task(name, role, n, d, seed, spread=1.0):
    """Rows with singular values over about ``spread`` decades in directions of their own; a linear
    target.
    """
    mix = torch.linalg.qr(randn(d, d, seed=seed + 1))[0]
    x = (randn(n, d, seed=seed) * torch.logspace(0, -spread, d, dtype=torch.float64)) @ mix.T
    split = Split(x, x @ randn(d, seed=seed + 2) + 0.1 * randn(n, seed=seed + 3))
    return Task(name, role, "regression", split, split)


def linear_case(n=48, d=6, harmful=1, seed=0, spread=1.0):
    tasks = [
        linear_task(f"h{i}", "harmful", n - 8, d, seed + 100 * (i + 1), spread)
        for i in range(harmful)
    ]
    return Case("small", linear_task("b", "benign", n, d, seed, spread), tuple(tasks))


class TinyNet(FeatureModel):
    """Three blocks on [n, 5], float32."""

    def __init__(self, seed=0):
        blocks = [
            ("stem", nn.Sequential(nn.Linear(5, 12), nn.Tanh())),
            ("middle", nn.Sequential(nn.Linear(12, 12), nn.Tanh())),
            ("last", nn.Linear(12, 8)),
        ]
        super().__init__(blocks, feature_dim=8)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=rng) / parameter.shape[-1] ** 0.5
                )


def deep_case(n=64):
    def task(name, role, seed):
        x = randn(n, 5, seed=seed, dtype=torch.float32)
        split = Split(x, (x[:, 0] + x[:, 1] > 0).long())
        return Task(name, role, "classification", split, split, classes=2)

    return Case("deep", task("b", "benign", 1), (task("h", "harmful", 2),))


class Rows:
    """A log that remembers."""

    def __init__(self):
        self.steps, self.rows = [], []

    def __call__(self, step, **values):
        self.steps.append(step)
        self.rows.append(values)

    def column(self, name):
        return [row[name] for row in self.rows]


def immunize(immunizer, case, model=None, seed=0, checkpoint=None):
    """(θ_0 or model, immunized model, log)."""
    model = LinearBackbone().build(case, seed) if model is None else model
    log = Rows()
    return model, immunizer(model, case, seed=seed, checkpoint=checkpoint, log=log), log
