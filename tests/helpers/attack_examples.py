"""Tiny models, tasks and a checkpoint for the attackers' tests."""

import json

import pytest
import torch
from torch import nn

from lab.core.data import Split, Task
from lab.core.seeding import generator
from lab.core.types import FeatureModel


class Interrupted(Exception):
    """Stands for a kill."""


class MemoryCheckpoint:
    """Keeps what a stage would write; raises `Interrupted` at save number ``fail_at`` (after
    saving).
    """

    def __init__(self, fail_at=None):
        self.fail_at, self.saves = fail_at, 0
        self.state = None

    def load(self):
        if self.state is None:
            return None
        tensors, text = self.state
        return {k: v.clone() for k, v in tensors.items()}, json.loads(text)

    def save(self, tensors, values):
        self.state = (
            {k: v.clone() for k, v in tensors.items()},
            json.dumps(values, allow_nan=False),
        )
        self.saves += 1
        if self.saves == self.fail_at:
            raise Interrupted


def interrupted(start, fail_at):
    """What ``start(checkpoint)`` gives when it was killed at save ``fail_at`` and started again."""
    checkpoint = MemoryCheckpoint(fail_at)
    with pytest.raises(Interrupted):
        start(checkpoint)
    return start(checkpoint)


def dense_model(d=6, seed=0):
    """Linear-ReLU-Linear-ReLU-Linear on vectors, float32, blocks without parameters among them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [
            ("a", nn.Linear(d, 8)),
            ("r", nn.ReLU()),
            ("b", nn.Linear(8, 7)),
            ("s", nn.Tanh()),
        ]
        return FeatureModel([*blocks, ("c", nn.Linear(7, 5)), ("t", nn.Tanh())], 5)


class ConvModel(FeatureModel):
    """Convolution, depthwise convolution with batch norm, pooling with a linear layer; uint8
    images.
    """

    def __init__(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
            depth = nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU()
            )
            tail = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 6))
        super().__init__([("stem", stem), ("depth", depth), ("tail", tail)], 6)

    def inputs(self, x):
        return x.float() / 255 - 0.5


def spread(n, d, kappa, seed=0):
    """Features [n, d] float64 with κ(ZᵀZ) = ``kappa`` exactly, singular values geometric between √n
    and √(n/κ).
    """
    stream = generator(seed, "features")
    u = torch.linalg.qr(torch.randn(n, d, dtype=torch.float64, generator=stream)).Q
    v = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=stream)).Q
    s = kappa ** (-0.5 * torch.linspace(0, 1, d, dtype=torch.float64))
    return n**0.5 * (u * s) @ v.T


def regression(z, seed=0, noise=0.1, test=None):
    """y = z w + noise with a seeded w; the last ``test`` rows (a fifth) are the test split."""
    stream = generator(seed, "targets")
    y = z @ torch.randn(z.shape[1], dtype=torch.float64, generator=stream)
    y = y + noise * torch.randn(len(z), dtype=torch.float64, generator=stream)
    cut = len(z) - (len(z) // 5 if test is None else test)
    return Task(
        "price", "harmful", "regression", Split(z[:cut], y[:cut]), Split(z[cut:], y[cut:]), 1
    )


def classification(z, classes=3, seed=0, noise=1.0):
    """The largest of ``classes`` noisy linear scores of the flattened, scaled rows; not separable
    with noise.
    """
    stream = generator(seed, "classes")
    flat = z.double().flatten(1)
    flat = (flat - flat.mean(0)) / (flat.std(0) + 1e-9)
    scores = (
        flat
        @ torch.randn(flat.shape[1], classes, dtype=torch.float64, generator=stream)
        / flat.shape[1] ** 0.5
    )
    y = (scores + noise * torch.randn(scores.shape, dtype=torch.float64, generator=stream)).argmax(
        1
    )
    cut = len(z) * 4 // 5
    return Task(
        "digits",
        "benign",
        "classification",
        Split(z[:cut], y[:cut]),
        Split(z[cut:], y[cut:]),
        classes,
    )


def images(n=60, seed=0):
    return torch.randint(
        0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator(seed, "images")
    )
