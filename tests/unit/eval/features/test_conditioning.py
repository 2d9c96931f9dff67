import pytest
import torch
from assertions import assert_values
from fake_run import (
    EYE,
    FakeRun,
    case,
    fake,
    linear,
    random_data,
)

from eval.features.conditioning import Conditioning
from eval.features.geometry import Geometry
from lab.core.types import BASELINE, IMMUNIZED


def test_rir_by_hand_on_diagonal_data() -> None:
    benign, harmful = (torch.diag(torch.tensor([1.0, x])).double() for x in (2.0, 4.0))
    # benign → diag(2, 2), harmful → diag(2, 4)
    theta = torch.diag(torch.tensor([2.0, 1.0])).double()
    models = {BASELINE: linear(torch.eye(2).double()), IMMUNIZED: linear(theta)}
    scores = Conditioning()(FakeRun((case(benign, harmful),), models))
    assert_values(
        scores.metrics,
        {
            "kappa_benign_ratio": 1 / 4,
            "kappa_harmful_ratio": 4 / 16,
            "rir": 1.0,
            "kappa_harmful": 4.0,
            "kappa_harmful_baseline": 16.0,
            # pencil of (diag(1, 16), diag(1, 4)) is {1, 4}: κ(M) = 4, κ(K_P) = 4, κ(K_H) = 16
            "rir_bound": 1.0,
            "rir_bound_ratio": 1.0,
        },
    )
    assert scores.tables["pairs"][0]["rir"] == pytest.approx(1)


def test_whitening_the_benign_task_attains_the_bound() -> None:
    benign = random_data(0)
    values, vectors = torch.linalg.eigh(benign.T @ benign)
    metrics = Conditioning()(
        fake(vectors @ torch.diag(values.rsqrt()), cases=(case(benign, random_data(1)),))
    ).metrics
    assert_values(metrics, {"rir_bound_ratio": 1.0, "kappa_benign": 1.0}, abs=1e-09)


def test_singular_benign_task_has_no_bound_and_says_why() -> None:
    benign = random_data(0)
    benign[:, 3] = 0
    metrics = Conditioning()(fake(cases=(case(benign, random_data(1)),))).metrics
    for name in ("rir_bound", "rir_bound_ratio"):
        assert metrics[name].value is None
        assert "rank 3 of 4" in str(metrics[name].note)
    assert metrics["rir"].value == pytest.approx(1)


def test_a_rank_that_moves_leaves_no_rir_and_says_why() -> None:
    theta = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])).double()
    scores = Conditioning()(fake(theta))
    for name in ("rir", "rir_above_one", "rir_bound_ratio"):
        assert scores.metrics[name].value is None
        assert "rank moved (benign 4 → 3, harmful 4 → 3)" in str(scores.metrics[name].note)
    ridge = Conditioning(definition="ridge", ridge=1.0)(
        fake(theta)
    )  # K + λI has full rank in both models
    assert ridge.metrics["rir_ridge"].value is not None


def test_a_diverged_case_counts_as_a_failure() -> None:
    theta = torch.diag(torch.tensor([1.0, 3.0, 1.0, 2.0])).double()
    cases = (case(random_data(0), random_data(5)), case(random_data(0), random_data(5), name="b"))
    whole = Conditioning()(fake(theta, cases=cases)).metrics
    part = Conditioning()(fake(theta, cases=cases, diverged={("b", 1): {"message": "x"}})).metrics
    expected = (2 * whole["rir_above_one"].value + whole["rir_above_one"].value / 2) / 3
    assert whole["rir_above_one"].value == 1
    assert part["rir_above_one"].value == pytest.approx(expected)
    assert "1 of 6 cases diverged and are left out" in str(part["rir"].note)


def test_other_definitions_carry_a_suffix_and_no_bound() -> None:
    scores = Conditioning(name="conditioning_ridge", definition="ridge", ridge=1.0)(fake())
    assert all(n.endswith("_ridge") for n in (*scores.metrics, *scores.tables))
    x = random_data(0)
    expected = float(torch.linalg.cond(x.T @ x + EYE))
    assert scores.tables["pairs_ridge"][0]["kappa_benign"] == pytest.approx(expected)
    assert "rir_release" in Conditioning(definition="release")(fake()).metrics


def test_history_becomes_curves() -> None:
    logs = {"step": [0, 10], "kappa_harmful": [9.0, 8.0], "kappa_benign": [7.0, 6.0]}
    scores = Conditioning()(fake(logs={**logs, "rir": [1.0, 4.0], "loss": [1.0, 0.5]}))
    assert (scores.curves["rir"]["immunized"], scores.curves["rir"]["step"]) == ([1, 4], [0, 10])


def test_baseline_alone_gives_only_absolute_figures() -> None:
    run = FakeRun(
        (case(random_data(0), random_data(1)),), {BASELINE: linear(EYE)}, model_names=(BASELINE,)
    )
    metrics = Conditioning()(run).metrics
    assert set(metrics) == {"kappa_benign_baseline", "kappa_harmful_baseline", "rir_bound"}


# geometry


def test_principal_angles_of_axes_by_hand() -> None:
    benign = torch.tensor([[10.0, 0.0], [0.0, 1.0]]).double()
    harmful = torch.tensor([[10.0, 10.0], [1.0, -1.0]]).double()
    models = {
        BASELINE: linear(torch.eye(2).double()),
        IMMUNIZED: linear(torch.diag(torch.tensor([1.0, 0.1])).double()),
    }
    scores = Geometry(dim=1)(FakeRun((case(benign, harmful),), models))
    assert scores.metrics["principal_angle_mean_baseline"].value == pytest.approx(45, abs=1e-6)
    assert scores.metrics["principal_angle_mean"].value < 10
    # pencil of (XᵀX) by hand: K_H = [[101, 99], [99, 101]], K_P = diag(100, 1)
    k_p, k_h = benign.T @ benign, harmful.T @ harmful
    values = torch.linalg.eigvals(torch.linalg.solve(k_p, k_h)).real
    assert scores.metrics["kappa_pencil_baseline"].value == pytest.approx(
        float(values.max() / values.min())
    )
    assert (
        "kappa_pencil" not in scores.metrics
    )  # an invertible linear map leaves the pencil as it is
