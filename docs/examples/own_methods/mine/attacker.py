"""An attack on features: a linear probe by accelerated gradient descent (Nesterov 1983)."""

import torch

from lab.core.config import Text, config
from lab.core.types import Attacker, Trajectory
from lab.models.activations import features


@config
class AcceleratedProbe(Attacker):
    """Fit w on features Y = model(x) by squared loss 1/(2n)‖Yw − T‖², from w = 0.

    Args:
        name: key under ``attacks``.
    """

    accepts = frozenset({"linear", "deep"})

    name: Text = "accelerated_probe"

    def __call__(self, model, task, *, seed, budget, checkpoint):
        """Return the trajectory at ``budget.snapshots()``."""
        train, test = (
            (features(model, s.x).double(), targets(s, task)) for s in (task.train, task.test)
        )
        y, t = train
        step = len(y) / torch.linalg.matrix_norm(y, 2) ** 2  # 1/L
        optimum = torch.linalg.lstsq(y, t, driver="gelsd").solution
        w = before = torch.zeros(y.shape[1], t.shape[1], dtype=torch.float64)
        trajectory = Trajectory([], {}, info={"attack": self.name, "lr": float(step)})
        for k in range(budget.steps + 1):
            if k in budget.snapshots():
                values = {"train_loss": loss(*train, w), "test_loss": loss(*test, w)}
                values["norm_ratio"] = float((w - optimum).square().sum() / optimum.square().sum())
                for kind, (a, _), split in (
                    ("train", train, task.train),
                    ("test", test, task.test),
                ):
                    if task.kind == "classification":
                        values[f"{kind}_accuracy"] = float(
                            ((a @ w).argmax(1) == split.y).double().mean()
                        )
                trajectory.steps.append(k)
                for key, value in values.items():
                    trajectory.values.setdefault(key, []).append(value)
            ahead = w + k / (k + 3) * (w - before)
            before, w = w, ahead - step * (y.T @ (y @ ahead - t)) / len(y)
        trajectory.weights = {"head": before}
        return trajectory


def targets(split, task):
    """[n, c] float64, one-hot for classification."""
    if task.kind == "classification":
        return torch.nn.functional.one_hot(split.y, task.classes).double()
    return split.y.double()[:, None]


def loss(y, t, w):
    return float((y @ w - t).square().sum() / (2 * len(y)))
