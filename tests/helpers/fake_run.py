"""A RunView made by hand, for tests of metrics."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from lab.core.data import Case, Role, Split, Task
from lab.core.seeding import generator
from lab.core.types import BASELINE, IMMUNIZED, Budget, FeatureModel, Trajectory

EYE = torch.eye(4, dtype=torch.float64)
BUDGET = Budget(20, 5, 20)
STEPS = BUDGET.snapshots()


class Matrix(nn.Module):
    """x ↦ x θ."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta.clone())

    def forward(self, x):
        return x @ self.theta


class LinearModel(FeatureModel):
    kind = "linear"


class DeepModel(FeatureModel):
    kind = "deep"


def linear(theta):
    return LinearModel([("linear", Matrix(theta))], theta.shape[1])


def task(x, name, role, kind="regression"):
    y = torch.zeros(len(x), dtype=torch.float64 if kind == "regression" else torch.int64)
    return Task(
        name, role, kind, Split(x, y), Split(x[:2], y[:2]), 1 if kind == "regression" else 2
    )


def case(benign, *harmful, name="a", kind="regression"):
    tasks = tuple(task(x, f"harm{i}", "harmful", kind) for i, x in enumerate(harmful))
    return Case(name, task(benign, "good", "benign", kind), tasks)


def random_data(seed, rows=30, d=4):
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0] * d)[:d].double()
    return torch.randn(rows, d, generator=generator(seed, "data"), dtype=torch.float64) * scale


def decay(rate, steps, accuracy=None, status="ok"):
    """Norm ratio and losses rate**t; accuracy rises to ``accuracy`` as 1 − rate**t does."""
    values = {q: [rate**s for s in steps] for q in ("norm_ratio", "train_loss", "test_loss")}
    if accuracy is not None:
        values["test_accuracy"] = values["train_accuracy"] = [
            accuracy * (1 - rate**s) for s in steps
        ]
    return Trajectory(list(steps), values, status)


@dataclass
class FakeRun:
    """Everything given by functions of model, role and seed."""

    case_list: tuple[Case, ...] = ()
    models: dict[str, FeatureModel] = field(default_factory=dict)
    trajectories: Callable[[str, str, Role, int], Trajectory] | None = None
    logs: dict[str, list[float]] = field(default_factory=dict)
    diverged: dict[tuple[str, int], dict] = field(default_factory=dict)
    scenario: str = "fake"
    model_names: tuple[str, ...] = (BASELINE, IMMUNIZED)
    attacks: tuple[str, ...] = ("probe",)
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget = BUDGET

    def cases(self, seed):
        return tuple(c for c in self.case_list if (c.name, seed) not in self.diverged)

    def model(self, model_name, case, seed):
        return self.models[model_name]

    def history(self, case, seed):
        return self.logs

    def trajectory(self, model_name, attack, case, task, seed):
        assert self.trajectories is not None
        return self.trajectories(model_name, attack, task.role, seed)


def rates(harmful, benign, *, harmful_accuracy=0.8, benign_accuracy=0.8):
    """Trajectories where the baseline decays with 0.8 on both tasks."""

    immunized = {"harmful": (harmful, harmful_accuracy), "benign": (benign, benign_accuracy)}

    def make(model_name, attack, role, seed):
        rate, top = (0.8, 0.8) if model_name == BASELINE else immunized[role]
        return decay(rate, STEPS, top)

    return make


def fake(theta=EYE, **kwargs):
    cases = kwargs.pop(
        "cases",
        (case(random_data(0), random_data(1)), case(random_data(2), random_data(3), name="b")),
    )
    return FakeRun(cases, {BASELINE: linear(EYE), IMMUNIZED: linear(theta)}, **kwargs)


def classes():
    return (case(random_data(0), random_data(1), kind="classification"),)
