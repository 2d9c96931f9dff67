"""The three-stage bootstrap: pairing, stages, labels."""

import math

import numpy as np
import pytest
from scipy.stats import beta

from eval.stats.intervals import (
    Unit,
    band,
    columns,
    estimate,
    relative_gap,
    score_share,
    score_units,
    score_worst,
)

RNG = np.random.default_rng(0)


def constant(seed, value, count=8):
    return Unit(seed, np.full((count, 1), value), columns)


def test_the_rows_of_both_models_stay_paired():
    """The immunized model at half the baseline's value on every latent: SGR is exactly ½ in every
    resample.
    """
    baseline = RNG.uniform(0.2, 0.9, (32, 1))
    units = [Unit(s, np.concatenate([baseline, baseline / 2], 1), relative_gap) for s in range(2)]
    result = score_units(units, "higher")
    assert (result.value, result.low, result.high) == pytest.approx((0.5,) * 3, abs=1e-12)


def test_images_give_the_width_of_the_normal_theory():
    rows = RNG.normal(size=(200, 1))
    result = score_units([Unit(0, rows, columns)], "higher")
    half = 1.96 * rows.std() / math.sqrt(200)
    assert result.value == pytest.approx(rows.mean())
    assert result.high - result.low == pytest.approx(2 * half, rel=0.1)
    assert (result.n, result.interval) == (1, "within_seed")


def test_concepts_are_resampled_within_a_seed():
    """Concepts at 0 and 1: a resample holds none, one or two of them, each alike in ¼, ½, ¼ of the
    draws.
    """
    result = score_units([constant(0, 0.0), constant(0, 1.0)], "higher")
    assert (result.value, result.low, result.high) == (0.5, 0.0, 1.0)


def test_seeds_are_resampled_from_three_on_and_never_narrower_than_student():
    units = [constant(s, v) for s, v in enumerate((0.0, 1.0, 2.0))]
    two, three = score_units(units[:2], "higher"), score_units(units, "higher")
    assert two.interval == "within_seed"
    assert (two.low, two.high) == (0.5, 0.5)  # within two seeds nothing varies here
    assert three.interval == "across_seeds"
    half = 4.302653 / math.sqrt(3)  # t quantile with two degrees of freedom, standard deviation 1
    assert (three.low, three.high) == pytest.approx((1 - half, 1 + half), abs=1e-5)


def test_values_of_seeds_ascend_by_seed_whatever_the_order_of_units():
    units = [constant(1, 1.0), constant(2, 2.0), constant(0, 10.0), constant(1, 3.0)]
    assert score_units(units, "higher").per_seed == (10.0, 2.0, 2.0)


def test_an_empty_set_is_an_error():
    for units in ([], [Unit(0, np.empty((0, 1)), columns)]):
        with pytest.raises(ValueError, match="empty set"):
            estimate(units)


def test_a_band_ends_where_the_shortest_attack_ends():
    long, short = (Unit(s, np.ones((4, n)) * np.arange(n), columns) for s, n in ((0, 3), (1, 2)))
    curve = band({"baseline": [long, short], "mima": [long]}, [0, 10, 20], "x", "y")
    assert (curve["baseline"], curve["baseline:low"], curve["mima:high"]) == (
        [0.0, 1.0, None],
        [0.0, 1.0, None],
        [0.0, 1.0, 2.0],
    )


def test_a_band_stays_within_what_the_quantity_can_take():
    """Student's t over three seeds reaches beyond a share: 0.8, 0.9 and 1.0 give 0.9 ± 0.25."""
    units = [Unit(s, np.full((4, 1), v), columns) for s, v in enumerate((0.8, 0.9, 1.0))]
    free, bound = (
        band({"baseline": units}, [0], "x", "y", bounds=b) for b in ((-np.inf, np.inf), (0, 1))
    )
    assert free["baseline:high"] == pytest.approx([0.9 + 4.302653 * 0.1 / 3**0.5])
    assert (bound["baseline:high"], bound["baseline:low"]) == ([1.0], free["baseline:low"])


def test_a_quotient_of_means_is_never_narrower_than_student_over_seeds():
    """Baseline 0.2, 0.4, 0.6 and immunized 0.1, 0.2, 0.6: nothing varies within a seed; jackknife
    by hand.
    """
    pairs = np.array([[0.2, 0.1], [0.4, 0.2], [0.6, 0.6]])
    result = score_units(
        [Unit(s, np.tile(p, (4, 1)), columns) for s, p in enumerate(pairs)],
        "higher",
        after=relative_gap,
    )
    value = 1 - 0.9 / 1.2
    without = [1 - 0.8 / 1.0, 1 - 0.7 / 0.8, 1 - 0.3 / 0.6]
    half = 4.302653 * np.std([3 * value - 2 * w for w in without], ddof=1) / math.sqrt(3)
    assert (result.value, result.high) == (
        pytest.approx(value),
        pytest.approx(value + half, abs=1e-6),
    )


def test_the_interval_of_the_worst_concept_covers_though_it_was_picked_after_looking():
    """Eight concepts that are all alike: the lowest of their means lies far below what it stands
    for.
    """
    rng = np.random.default_rng(1)
    held = {"picked": 0, "corrected": 0}
    for _ in range(40):
        concepts = [[Unit(0, rng.normal(size=(40, 1)), columns)] for _ in range(8)]
        picked = score_units(min(concepts, key=lambda units: units[0].value[0]), "higher")
        corrected = score_worst(picked, concepts, "harmful")
        assert corrected.low <= picked.low <= corrected.value <= corrected.high
        held["picked"] += picked.low <= 0 <= picked.high
        held["corrected"] += corrected.low <= 0 <= corrected.high
    assert held["picked"] < 36
    assert held["corrected"] >= 37


@pytest.mark.parametrize(("seeds", "images"), [(1, 16), (3, 8)])
def test_no_image_of_few_is_no_proof_that_there_is_none(seeds, images):
    for seen in (0.0, 1.0):
        units = [Unit(seed, np.full((images, 1), seen), columns) for seed in range(seeds)]
        result = score_share(units, "lower")
        limit = (
            beta.ppf(0.975, 1, images) if seen == 0 else beta.ppf(0.025, images, 1)
        )  # by its definition
        assert result.value == seen
        assert (result.low, result.high) == pytest.approx((0, limit) if seen == 0 else (limit, 1))
    mixed = [Unit(0, np.array([[0.0]] * 12 + [[1.0]] * 4), columns)]
    assert score_share(mixed, "lower") == score_units(mixed, "lower", bounds=(0.0, 1.0))
