"""The pattern search of a learning rate."""

import math

import pytest

from attacks.search import RateSearch


def best_of(trial, trials):
    """Return the exponent that a search chooses."""
    scores = []
    for _ in range(trials):
        search = RateSearch(scores)
        exponent = search.propose()
        assert exponent not in search.losses
        scores.append(trial(exponent))
    return RateSearch(scores).best


@pytest.mark.parametrize("best", [-5.7, -1.7, 0.0, 3.6])
def test_search_approaches_the_best_exponent(best):
    def bowl(exponent):
        return math.inf if exponent > best + 1.5 else abs(exponent - best)

    assert abs(best_of(bowl, 12) - best) < 0.3


def test_search_goes_down_where_everything_diverges_and_prefers_the_smaller_of_equals():
    assert (best_of(lambda e: math.inf, 5), best_of(lambda e: 1.0, 3)) == (-3, -1)
