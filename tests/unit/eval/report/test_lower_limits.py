"""What the report makes of a figure that is a limit: it is open who wins."""

from __future__ import annotations

from typing import Any

import pytest
from fake_generated import generated
from fake_records import Record, metric, sealed

from eval.report.compare import compare, to_text
from eval.report.leaderboard import leaderboard

BENIGN, WORST = "benign_steps_ratio", "steps_to_relearn_ratio_worst"


def with_metrics(name: str, **changes: Any) -> Record:
    one = generated(name)
    one["metrics"] |= changes
    return sealed(one)


def narrow(value: float, better: str = "higher", **kwargs: Any) -> dict[str, Any]:
    return metric(value, better, 0.01, unit="×", **kwargs)


@pytest.mark.parametrize(("name", "better"), [(BENIGN, "lower"), (WORST, "higher")])
def test_a_limit_that_may_be_any_higher_figure_neither_wins_nor_loses(
    name: str, better: str
) -> None:
    a = with_metrics("a", **{name: narrow(1.5, better, bound="lower")})
    b = with_metrics("b", **{name: narrow(1.7, better)})
    row = next(r for r in compare(a, b)["metrics"] if r["name"] == name)
    assert (row["winner"], row["sure"]) == ("open", False)
    assert all(name not in r["best"] for r in leaderboard([a, b]))


def test_a_limit_above_all_others_is_best_where_higher_is_better() -> None:
    rows = leaderboard(
        [with_metrics("a", **{WORST: narrow(5.0, bound="lower")}), with_metrics("b")]
    )
    assert [WORST in r["best"] for r in rows] == [True, False]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_an_upper_limit_leaves_open_what_lies_below_it(better: str) -> None:
    large, small = 1.7, 1.5
    for limited in ("large", "small"):
        bounds = {limited: "upper"}
        a = with_metrics("a", **{WORST: narrow(small, better, bound=bounds.get("small"))})
        b = with_metrics("b", **{WORST: narrow(large, better, bound=bounds.get("large"))})
        row = next(r for r in compare(a, b)["metrics"] if r["name"] == WORST)
        winner = "b" if better == "higher" else "a"
        assert row["winner"] == ("open" if limited == "large" else winner)
        best = [WORST in r["best"] for r in sorted(leaderboard([a, b]), key=lambda r: r["label"])]
        assert best == ([False, False] if limited == "large" else [winner == "a", winner == "b"])
        assert ("≤ 1.7" if limited == "large" else "≤ 1.5") in to_text(compare(a, b))
