"""When a condition of a verdict passes, and when that is significant."""

import pytest

from eval.stats.verdict_rule import Check, verdict_result
from lab.core.types import Score


def test_a_lower_limit_never_passes_an_upper_bound():
    limit = Score(1.1, 1.0, 1.2, 3, "lower", "across_seeds", bound="lower")
    assert Check("benign", "x", limit, "≤", 1.25).result == "inconclusive"
    assert Check("benign", "x", limit, "≤", 1.05).result == "fails"
    assert Check("harmful", "x", limit, "≥", 1.0).passed
    assert Check("harmful", "x", limit, "≥", 1.2).result == "inconclusive"
    upper = Score(1.1, bound="upper")
    assert Check("harmful", "x", upper, "≥", 1.0).result == "inconclusive"
    assert Check("benign", "x", upper, "≤", 1.25).passed


def test_msgr_needs_its_whole_interval():
    touching = Score(0.2, -0.01, 0.4, 3, "higher", "across_seeds")
    assert not Check("harmful", "x", touching, "low >", 0.0).passed
    clear = Score(0.2, 0.01, 0.4, 3, "higher", "across_seeds")
    assert Check("harmful", "x", clear, "low >", 0.0).passed
    assert Check("harmful", "x", clear, "low >", 0.0).significant
    within = Score(0.2, 0.01, 0.4, 1, "higher", "within_seed")
    assert not Check("harmful", "x", within, "low >", 0.0).significant


def test_what_was_not_measured_everywhere_does_not_pass():
    assert Check("harmful", "x", Score(3.0), "≥", 2.0).passed
    assert not Check("harmful", "x", Score(3.0), "≥", 2.0, missing=1).passed
    assert not Check("harmful", "x", Score(None), "≥", 2.0).passed


@pytest.mark.parametrize(
    ("rule", "low", "high", "bound", "significant"),
    [
        ("≥", 1.2, 3.0, None, True),
        ("≥", 1.0, 1.1, None, True),
        ("≥", 1.0, 3.0, None, False),
        ("≤", 1.0, 1.2, None, True),
        ("≤", 1.3, 3.0, None, True),
        ("≤", 1.0, 3.0, None, False),
        ("<", 1.0, 1.2, None, False),
        ("<", 1.0, 1.1, None, True),
        ("≥", 1.3, 1.5, "lower", True),
        ("≥", 1.0, 1.5, "lower", False),
        ("≤", 1.3, 1.5, "lower", True),
        ("≤", 1.0, 1.5, "lower", False),
    ],
)
def test_significant_is_an_interval_on_one_side_and_of_a_lower_limit_what_lies_above(
    rule, low, high, bound, significant
):
    figure = Score((low + high) / 2, low, high, 3, "higher", "across_seeds", bound=bound)
    assert Check("harmful", "x", figure, rule, 1.2).significant == significant


def test_one_alternative_of_the_harmful_side_and_the_whole_benign_side_are_needed():
    slow = Check("harmful", "steps", Score(3.0), "≥", 2.0)
    fast = Check("harmful", "steps by loss", Score(1.0), "≥", 2.0)
    accurate = Check("harmful", "accuracy", Score(0.5), "≥", 0.1, alternative="accuracy")
    benign, damaged = (Check("benign", "steps", Score(v), "≤", 1.1) for v in (1.0, 2.0))
    unknown = Check("harmful", "steps", Score(None), "≥", 2.0)
    assert verdict_result([slow, benign]) == "passes"
    assert verdict_result([slow, fast, benign]) == "fails"
    assert verdict_result([slow, fast, accurate, benign]) == "passes"
    assert verdict_result([slow, benign, damaged]) == "fails"
    assert verdict_result([unknown, benign]) == "inconclusive"
    assert verdict_result([unknown, fast, benign]) == "fails"
