"""Tiny tasks and models that the test-suite shares."""

from dataclasses import replace

import torch
from torch import nn

from lab.core.data import Case, Split, Task
from lab.core.seeding import generator
from lab.core.types import FeatureModel

ROWS, COLUMNS, CLASSES = 60, 6, 3


def regression(name, role, seed, columns=COLUMNS, spread=3.0):
    """Linear regression on correlated columns."""
    rng = generator(seed, name)
    mix = torch.randn(columns, columns, generator=rng, dtype=torch.float64)
    scale = torch.logspace(0, -spread / 2, columns, dtype=torch.float64)

    def split(n):
        x = torch.randn(n, columns, generator=rng, dtype=torch.float64) * scale @ mix
        y = x @ torch.ones(columns, dtype=torch.float64) + 0.1 * torch.randn(
            n, generator=rng, dtype=torch.float64
        )
        return Split(x, y)

    return Task(name, role, "regression", split(ROWS), split(30), 1)


def images(name, role, seed, size=8):
    """Noisy images of three classes that differ in one colour channel."""
    rng = generator(seed, name)

    def split(n):
        y = torch.arange(n) % CLASSES
        x = torch.randint(0, 120, (n, 3, size, size), generator=rng, dtype=torch.uint8)
        x[torch.arange(n), y] += 90
        return Split(x, y)

    return Task(name, role, "classification", split(ROWS), split(30), CLASSES)


def linear_case(seed=0, harmful=1):
    tasks = tuple(regression(f"harm{i}", "harmful", seed + 10 * (i + 1)) for i in range(harmful))
    return Case("tiny", regression("good", "benign", seed), tasks)


def image_case(seed=0, harmful=1):
    tasks = tuple(images(f"harm{i}", "harmful", seed + 10 * (i + 1)) for i in range(harmful))
    return Case("tiny", images("good", "benign", seed), tasks)


def linear_classes(seed=0):
    """The linear case as binary classification: is the target above its median?"""

    def labelled(task):
        def split(s):
            return Split(s.x, (s.y > s.y.median()).long())

        return replace(
            task, kind="classification", train=split(task.train), test=split(task.test), classes=2
        )

    case = linear_case(seed)
    return Case(case.name, labelled(case.benign), tuple(labelled(t) for t in case.harmful))


class TinyNet(FeatureModel):
    """Two convolution blocks (batch norm in one) and a pooled linear block; [n, 3, s, s] uint8 to
    [n, 10].
    """

    def inputs(self, x):
        return x.float() / 255 - 0.5


def tiny_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet(
            [
                (
                    "stem",
                    nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
                ),
                ("block1", nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())),
                ("block2", nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))),
            ],
            10,
        )


def no_log(step, **values):
    """A log that nobody reads."""
