import pytest
from assertions import assert_values
from fake_run import (
    STEPS,
    FakeRun,
    classes,
    decay,
    fake,
    rates,
)

from eval.features.probe_accuracy import ProbeAccuracy
from eval.features.verdict import Verdict
from lab.core.types import BASELINE, Trajectory


@pytest.mark.parametrize(
    ("harmful", "benign", "passed", "reason"),
    [
        (0.95, 0.8, 1, "benign side passes"),
        (0.99, 0.99, 0, "benign side fails"),
        (0.8, 0.8, 0, "harmful side fails"),
        (0.6, 0.8, 0, "harmful side fails"),
    ],
)
def test_only_protection_that_keeps_the_benign_task_passes(
    harmful: float, benign: float, passed: int, reason: str
) -> None:
    metrics = Verdict()(fake(trajectories=rates(harmful, benign))).metrics
    assert metrics["verdict"].value == metrics["verdict_share"].value == passed
    assert reason in str(metrics["verdict"].note)


def test_slow_by_norm_ratio_but_fast_by_loss_fails() -> None:
    def make(model_name: str, attack: str, role: str, seed: int) -> Trajectory:
        result = decay(0.8, STEPS)
        if model_name != BASELINE and role == "harmful":
            result.values["norm_ratio"] = [0.95**s for s in STEPS]
        return result

    scores = Verdict()(fake(trajectories=make))
    assert scores.metrics["verdict"].value == 0
    failed = [row["check"] for row in scores.tables["verdict"] if row["result"] == "fails"]
    assert "training loss" in str(failed)


@pytest.mark.parametrize(
    ("threshold", "passes", "fails", "check", "run"),
    [
        (
            "min_slowdown",
            2.0,
            2.2,
            "steps to",
            fake(trajectories=rates(0.9, 0.8)),
        ),  # ln 0.8 / ln 0.9 = 2.1
        (
            "min_sgrc",
            0.4,
            0.6,
            "(SGRC)",
            fake(cases=classes(), trajectories=rates(0.8, 0.8, harmful_accuracy=0.4)),
        ),
        ("max_benign_slowdown", 1.5, 1.2, "steps to", fake(trajectories=rates(0.95, 0.85))),  # 1.4
        (
            "max_benign_loss",
            0.2,
            0.1,
            "best performance",
            fake(cases=classes(), trajectories=rates(0.95, 0.8, benign_accuracy=0.7)),
        ),  # (0.8 - 0.7) / 0.8
    ],
)
def test_each_threshold_alone_flips_the_verdict(
    threshold: str, passes: float, fails: float, check: str, run: FakeRun
) -> None:
    kept, lost = (Verdict(**{threshold: value})(run) for value in (passes, fails))
    assert [
        s.metrics[name].value for s in (kept, lost) for name in ("verdict", "verdict_share")
    ] == [1, 1, 0, 0]
    flipped = {
        before["check"]
        for before, after in zip(kept.tables["verdict"], lost.tables["verdict"], strict=True)
        if before["passed"] != after["passed"]
    }
    assert flipped
    assert all(check in what for what in flipped)


def test_what_was_measured_in_some_seeds_only_does_not_pass() -> None:
    """In one seed the baseline makes no progress on the benign task."""

    def make(model_name: str, attack: str, role: str, seed: int) -> Trajectory:
        if model_name == BASELINE and role == "benign" and seed == 2:
            return decay(1.0, STEPS)
        return decay(0.8 if model_name == BASELINE or role == "benign" else 0.95, STEPS)

    scores = Verdict()(fake(trajectories=make))
    assert_values(scores.metrics, {"verdict": None, "verdict_share": 2 / 3})
    assert "2 of 6 left out: the baseline made no progress" in str(scores.tables["verdict"])


def test_an_attack_that_breaks_on_the_immunized_model_is_no_loss_of_accuracy() -> None:
    def make(model_name: str, attack: str, role: str, seed: int) -> Trajectory:
        broken = model_name != BASELINE and role == "harmful" and attack == "fragile"
        return decay(0.8, STEPS, 0.1 if broken else 0.8, status="diverged" if broken else "ok")

    alone = Verdict()(fake(cases=classes(), trajectories=make, attacks=("fragile",)))
    assert (alone.metrics["verdict"].value, alone.metrics["verdict_share"].value) == (None, 0)
    assert "diverged on the immunized model only" in str(alone.tables["verdict"])
    accuracies = ProbeAccuracy()(
        fake(cases=classes(), trajectories=make, attacks=("fragile", "sound"))
    ).metrics
    assert accuracies["sgrc_harmful_fragile"].value is None
    assert accuracies["sgrc_harmful_worst"].value == pytest.approx(0.0)


def test_a_diverged_case_fails_the_verdict_and_counts_in_the_share() -> None:
    run = fake(
        trajectories=rates(0.95, 0.8), diverged={("b", 1): {"message": "x", "last_good_step": 3}}
    )
    metrics = Verdict()(run).metrics
    assert_values(metrics, {"verdict": 0, "verdict_share": (1 + 0.5 + 1) / 3})
    assert 0 <= metrics["verdict_share"].low <= metrics["verdict_share"].high <= 1
