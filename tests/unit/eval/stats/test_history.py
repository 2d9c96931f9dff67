"""Curves of what concept immunizers logged."""

import math

import pytest
from fake_generations import FakeRun

from eval.stats.history import training_curves


def test_what_was_logged_becomes_curves_over_seeds_without_holes():
    nan = math.nan
    first = {
        "step": [0, 1, 2, 3],
        "outer_loss": [1.0, 2.0, 3.0, nan],
        "cosine": [nan] * 4,
        "merge_rows": [7.0] * 4,
    }
    second = {"step": [0, 1, 2, 3], "outer_loss": [3.0, nan, 5.0, nan]}
    found = training_curves(FakeRun(seeds=(0, 1), logged={0: first, 1: second}))
    assert list(found) == [
        "immunize_outer_loss"
    ]  # a cosine that never was, and what is told once, are no curves
    curve = found["immunize_outer_loss"]
    assert curve["x"] == "immunization step"
    assert curve["step"] == [0, 1, 2]
    assert curve["mima"] == pytest.approx(
        [2.0, 3.0, 4.0]
    )  # 4 at the step that the second one left out


def test_long_histories_are_thinned():
    steps = list(range(500))
    found = training_curves(
        FakeRun(seeds=(0,), logged={0: {"step": steps, "prior_loss": [float(s) for s in steps]}})
    )
    curve = found["immunize_prior_loss"]
    assert len(curve["step"]) == 60
    assert (curve["step"][0], curve["step"][-1]) == (0, 499)
    assert curve["mima"] == curve["step"]
