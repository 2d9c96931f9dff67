"""The pattern search of a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from attacks.search import RateSearch, Trials


def best_of(trial: Callable[[float], float], trials: int) -> float:
    """Return the exponent that a search chooses."""
    scores: Trials = []
    for _ in range(trials):
        search = RateSearch(scores)
        exponent = search.propose()
        assert exponent not in search.losses
        scores.append(trial(exponent))
    return RateSearch(scores).best


@pytest.mark.parametrize("best", [-5.7, -1.7, 0.0, 3.6])
def test_search_approaches_the_best_exponent(best: float) -> None:
    def bowl(exponent: float) -> float:
        return math.inf if exponent > best + 1.5 else abs(exponent - best)

    assert abs(best_of(bowl, 12) - best) < 0.3


def test_search_goes_down_where_everything_diverges_and_prefers_the_smaller_of_equals() -> None:
    assert best_of(lambda e: math.inf, 5) == -3
    assert best_of(lambda e: 1.0, 3) == -1
