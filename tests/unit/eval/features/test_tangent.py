"""Tangent kernels against explicit Jacobians and closed forms, in float64."""

import pytest
import torch
from fake_run import EYE, DeepModel, FakeRun, case, linear, random_data
from torch import nn
from torch.func import functional_call, jacrev

from attacks.finetune.full import FullFinetune
from eval.features.tangent import Tangent, compute_jacobian, compute_spectrum, summarise
from lab.core.seeding import generator
from lab.core.types import BASELINE, IMMUNIZED

HEAD = torch.randn(4, 2, generator=generator(0, "head"), dtype=torch.float64)


@pytest.mark.parametrize("blocks", [None, 1])
def test_two_layers_against_the_explicit_jacobian(blocks: int | None) -> None:
    torch.manual_seed(0)
    two = [("first", nn.Sequential(nn.Linear(4, 5), nn.Tanh())), ("second", nn.Linear(5, 4))]
    model, x = DeepModel(two, 4).double(), random_data(0, rows=6)
    moving = {k: v for k, v in model.named_parameters() if blocks is None or "blocks.1" in k}

    def outputs(weights: dict, head: torch.Tensor) -> torch.Tensor:
        return (functional_call(model, weights, (x,)) @ head).flatten()

    by_weights, by_head = jacrev(outputs, argnums=(0, 1))(moving, HEAD)
    expected = torch.cat([t.reshape(12, -1) for t in (by_head, *by_weights.values())], 1)
    assert moving.keys() == FullFinetune(blocks=blocks).open(model, 0).parameters.keys()
    found = compute_jacobian(model, x, HEAD, blocks)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    # the Gauss-Newton matrix of the mean squared loss has the same non-zero eigenvalues
    spectrum = compute_spectrum(found, len(x))
    by_weight = torch.linalg.eigvalsh(expected.T @ expected / len(x)).flip(0)
    assert torch.allclose(spectrum, by_weight[: len(spectrum)], rtol=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_a_linear_extractor_has_a_closed_form() -> None:
    x, theta, w = random_data(0, rows=3), random_data(1, rows=4), HEAD[:, :1]
    kernel = x @ (w.square().sum() * EYE + theta @ theta.T) @ x.T
    expected = torch.linalg.eigvalsh(kernel / 3).flip(0)
    spectrum = compute_spectrum(compute_jacobian(linear(theta), x, w), 3)
    assert torch.allclose(spectrum, expected, rtol=1e-12)
    figures = summarise(spectrum)
    assert figures["trace"] == pytest.approx(float(kernel.trace() / 3))
    assert figures["kappa"] == pytest.approx(float(expected[0] / expected[-1]))
    assert summarise(torch.ones(3))["effective_rank"] == pytest.approx(3)


def test_metrics_before_and_after() -> None:
    cases = (case(random_data(0), random_data(1), random_data(2)),)
    models = {BASELINE: linear(EYE), IMMUNIZED: linear(torch.diag(EYE[0] * 9 + 1))}
    scores = Tangent(rows=3)(FakeRun(cases, models))
    metrics = scores.metrics
    for role in ("harmful", "benign"):
        before, after = (metrics[f"ntk_trace_{role}{end}"] for end in ("_baseline", ""))
        ratio = metrics[f"ntk_trace_{role}_ratio"]
        assert (ratio.value, ratio.n, ratio.interval) == (
            pytest.approx(after.value / before.value),
            3,
            "across_seeds",
        )
    assert metrics["ntk_kappa_harmful_ratio"].better == "higher"
    assert [row["index"] for row in scores.tables["ntk_spectrum"]] == [1, 2, 3] * 4
    with pytest.raises(ValueError, match="zero"):
        compute_spectrum(torch.zeros(3, 5), 3)
