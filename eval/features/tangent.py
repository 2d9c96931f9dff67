"""The spectrum of the empirical neural tangent kernel (NTK), before and after immunization (arXiv
1806.07572).
"""

from __future__ import annotations

from itertools import product
from statistics import geometric_mean
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from eval.stats.aggregate import (
    PROTECTED,
    ROLES,
    baseline_suffix,
    grouped,
    tasks_of,
    thin,
    walk,
)
from eval.stats.intervals import POSITIVE, score_samples
from lab.core.condition import row_groups
from lab.core.config import Count, Text, config
from lab.core.data import Kind
from lab.core.seeding import generator
from lab.core.types import FeatureModel, RunMetric, RunView, Scores

QUANTITIES = ("trace", "largest", "kappa", "effective_rank")


def compute_jacobian(
    model: FeatureModel, x: Tensor, head: Tensor, blocks: int | None = None
) -> Tensor:
    """Return the derivatives of the outputs φ(x)·``head`` by the weights that full fine-tuning
    moves, those of the head first.

    One output is differentiated at a time; the result takes 8·n·c·P bytes.

    Args:
        model: φ, in any precision; a float64 copy of it is used.
        x: raw inputs [n, ...].
        head: [d, c].
        blocks: last blocks that move; None = all.

    Returns:
        float64 [n·c, P], the c outputs of a row next to each other.
    """
    net = model.copy().double().requires_grad_(False)
    owners = [block for block in net.blocks if any(True for _ in block.parameters())]
    moving = [p for block in owners[-(blocks or len(owners)) :] for p in block.parameters()]
    weights = [head.double().clone(), *moving]
    for weight in weights:
        weight.requires_grad_(True)
    lines = []
    for row in x.split(1):
        for output in (net(row) @ weights[0])[0]:
            slopes = torch.autograd.grad(
                output, weights, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            lines.append(torch.cat([slope.flatten() for slope in slopes]))
    return torch.stack(lines)


def compute_spectrum(jacobian: Tensor, rows: int) -> Tensor:
    """Return the eigenvalues of JJᵀ ÷ ``rows``, descending, up to the numerical rank.

    They are the non-zero ones of JᵀJ ÷ ``rows`` too: the Gauss-Newton matrix of ½ the mean squared
    loss and, for Gaussian targets of unit variance, its Fisher matrix. JJᵀ resolves eigenvalues
    down to m·ε of the largest, m the rows of J.

    Raises:
        ValueError: a kernel that is zero or not finite.
    """
    gram = jacobian @ jacobian.T / rows
    if not bool(torch.isfinite(gram).all()) or not bool(gram.any()):
        raise ValueError("the tangent kernel is zero or not finite")
    values = torch.linalg.eigvalsh(gram).flip(0)
    return values[values > len(values) * torch.finfo(values.dtype).eps * values[0]]


def summarise(spectrum: Tensor) -> dict[str, float]:
    """Return ``trace``, ``largest`` eigenvalue, ``kappa`` = λ_1/λ_r, and ``effective_rank``, the
    exponential of the entropy of λ_i/Σλ (Roy and Vetterli, EUSIPCO 2007).
    """
    entropy = torch.special.entr(spectrum / spectrum.sum()).sum()
    values = spectrum.sum(), spectrum[0], spectrum[0] / spectrum[-1], entropy.exp()
    return dict(zip(QUANTITIES, map(float, values), strict=True))


@config
class Tangent(RunMetric):
    """Trace, largest eigenvalue, κ and effective rank of the NTK of a seeded set of training rows.

    The derivatives are by all weights that `attacks.finetune.full.FullFinetune` moves. Its head
    starts at zero, where the NTK is the Gram matrix of the features; here the head has random
    weights N(0, 1/d), the same in both models, so that the extractor's own weights count. Over
    several harmful tasks the geometric mean is reported.

    Args:
        rows: n, training rows of each task. The Jacobian takes 8·n·outputs·P bytes.
        outputs: columns of the head.
        blocks: last blocks that move; None = all.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep"})

    name: Text = "tangent"
    rows: Annotated[int, Field(strict=True, ge=2)] = 64
    outputs: Count = 1
    blocks: Count | None = None

    def __call__(self, run: RunView) -> Scores:
        out = Scores(tables={"ntk_spectrum": []})
        figures: dict[str, dict[tuple[int, str], float]] = {}  # name → (seed, case) → value
        for seed, case in walk(run, "tangent kernels"):
            is_first = not figures
            for role in ROLES[::-1]:
                measured: dict[str, dict[str, float]] = {}  # end of the name → quantity → value
                for model in run.model_names:
                    each = {
                        task.name: self._spectrum(run.model(model, case, seed), task.train.x, seed)
                        for task in tasks_of(case, role)
                    }
                    values = [summarise(spectrum) for spectrum in each.values()]
                    means = {q: geometric_mean(v[q] for v in values) for q in QUANTITIES}
                    measured[baseline_suffix(model)] = means
                    if is_first:
                        labels = {"model": model, "role": role, "case": case.name, "seed": seed}
                        out.tables["ntk_spectrum"] += _lines(labels, each)
                if len(measured) == 2:
                    after, before = measured[""], measured["_baseline"]
                    measured["_ratio"] = {q: after[q] / before[q] for q in QUANTITIES}
                for (end, means), quantity in product(measured.items(), QUANTITIES):
                    name = f"ntk_{quantity}_{role}{end}"
                    figures.setdefault(name, {})[seed, case.name] = means[quantity]
        for name, column in figures.items():
            is_judged = name.startswith("ntk_kappa") and name.endswith("_ratio")
            role = "benign" if "benign" in name else "harmful"
            out.metrics[name] = score_samples(
                grouped(run, column),
                PROTECTED[role] if is_judged else "neutral",
                "no case",
                aggregate="geomean",
                bounds=POSITIVE,
            )
        return out

    def _spectrum(self, model: FeatureModel, x: Tensor, seed: int) -> Tensor:
        x = x[row_groups(len(x), 1, self.rows, seed)[0]]
        d = model.feature_dim
        random = generator(seed, "tangent")
        head = torch.randn(d, self.outputs, generator=random, dtype=torch.float64) / d**0.5
        return compute_spectrum(compute_jacobian(model, x, head, self.blocks), len(x))


def _lines(labels: dict[str, Any], spectra: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the eigenvalues of the first task as rows of a table."""
    task, values = next(iter(spectra.items()))
    return [labels | {"task": task, "index": i + 1, "value": v} for i, v in thin(values.tolist())]
