"""When a condition of a verdict passes, and when that is significant."""

import pytest

from eval.stats.verdict_rule import Check, verdict_result
from lab.core.types import Score

LIMIT = Score(1.1, 1.0, 1.2, 3, "lower", "across_seeds", bound="lower")
UPPER = Score(1.1, bound="upper")


@pytest.mark.parametrize(
    ("score", "rule", "threshold", "missing", "result"),
    [
        (LIMIT, "≤", 1.25, 0, "inconclusive"),
        (LIMIT, "≤", 1.05, 0, "fails"),
        (LIMIT, "≥", 1.0, 0, "passes"),
        (LIMIT, "≥", 1.2, 0, "inconclusive"),
        (UPPER, "≥", 1.0, 0, "inconclusive"),
        (UPPER, "≤", 1.25, 0, "passes"),
        (Score(0.2, -0.01, 0.4, 3, "higher", "across_seeds"), "low >", 0.0, 0, "fails"),
        (Score(0.2, 0.01, 0.4, 3, "higher", "across_seeds"), "low >", 0.0, 0, "passes"),
        (Score(3.0), "≥", 2.0, 0, "passes"),
        (Score(3.0), "≥", 2.0, 1, "inconclusive"),
        (Score(None), "≥", 2.0, 0, "inconclusive"),
    ],
)
def test_limits_intervals_and_gaps_decide_what_passes(score, rule, threshold, missing, result):
    check = Check("harmful", "x", score, rule, threshold, missing=missing)
    assert (check.result, check.passed) == (result, result == "passes")


@pytest.mark.parametrize(("n", "interval"), [(3, "across_seeds"), (1, "within_seed")])
def test_only_an_interval_across_seeds_is_significant(n, interval):
    check = Check("harmful", "x", Score(0.2, 0.01, 0.4, n, "higher", interval), "low >", 0.0)
    assert check.significant == (n == 3)


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
    for checks, result in (
        ([slow, benign], "passes"),
        ([slow, fast, benign], "fails"),
        ([slow, fast, accurate, benign], "passes"),
        ([slow, benign, damaged], "fails"),
        ([unknown, benign], "inconclusive"),
        ([unknown, fast, benign], "fails"),
        ([benign], "inconclusive"),
    ):
        assert verdict_result(checks) == result, checks
