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
    found = best_of(lambda e: math.inf if e > best + 1.5 else abs(e - best), 12)
    assert abs(found - best) < 0.3


def test_search_goes_down_where_everything_diverges_and_prefers_the_smaller_of_equals():
    assert (best_of(lambda e: math.inf, 5), best_of(lambda e: 1.0, 3)) == (-3, -1)
