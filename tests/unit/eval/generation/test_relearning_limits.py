"""Steps to relearn where an attack diverged, never got there, or had nothing left to do."""

import pytest
from fake_generations import STEPS, FakeRun, FakeScorers, case, shares
from test_relearning import BASELINE_SHARES, HORIZON, metrics, world

from eval.generation.relearning import Relearning
from lab.core.types import BASELINE

LAST = STEPS[-1]


def test_a_diverged_attack_is_no_protection():
    """It ended at step 10 without the concept: the ratio is at least 10 ÷ baseline, below 1."""
    result = metrics(world(shares(0, 0, status="diverged")))
    assert result["steps_to_relearn_ratio"].value == pytest.approx(10 / HORIZON)
    assert result["steps_to_relearn_ratio"].bound == "lower"
    assert result["asr"].value == result["asr_baseline"].value == pytest.approx(0.8)


def test_a_weak_attacker_that_ran_does_not_stand_for_a_strong_one_that_diverged():
    """On the baseline the weak one never relearns: whether the immunized model holds out was not
    measured.
    """

    def make(model_name, attack, name, seed):
        if attack == "weak":
            return shares(0, 0, 0, 1, 2)
        return (
            shares(*BASELINE_SHARES) if model_name == BASELINE else shares(0, 0, status="diverged")
        )

    scores = Relearning(scorers=FakeScorers())(
        FakeRun(make, attacks=("weak", "lora"), case_list=(case(others=()),))
    )
    assert scores.metrics["steps_to_relearn_ratio"].value is None
    assert scores.metrics["asr"].value == pytest.approx(0.8)
    assert scores.tables["relearning"][0]["left_out"] == "lora"


def test_a_benign_attack_that_diverged_cost_the_whole_budget():
    """Censored where it broke off it would look cheaper than one that learned, and a broken model
    would lead.
    """

    def make(model_name, attack, name, seed):
        broken = model_name != BASELINE and name == "sketch"
        return shares(0, 2, status="diverged") if broken else shares(*BASELINE_SHARES)

    result = metrics(FakeRun(make))["benign_steps_ratio"]
    assert (result.value, result.bound) == (pytest.approx(LAST / HORIZON), "lower")


def test_the_worst_benign_figure_is_the_largest_and_a_limit_where_another_may_be_larger():
    def make(model_name, attack, name, seed):
        if model_name == BASELINE:
            return shares(*BASELINE_SHARES) if name != "halftone" else shares(0, 0, 0, 0, 6)
        return {"sketch": shares(0, 0, 0, 6, 10), "halftone": shares(0, 0, 0, 0, 2)}.get(
            name, shares(*BASELINE_SHARES)
        )

    result = metrics(FakeRun(make, case_list=(case(others=("sketch", "halftone")),)))[
        "benign_steps_ratio_worst"
    ]
    assert (result.value, result.bound, result.note[:22]) == (
        pytest.approx(40 / HORIZON),
        "lower",
        "halftone may cost more",
    )
