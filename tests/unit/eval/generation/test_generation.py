"""SGR, RSGR and their kin on images whose similarities are known by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from assertions import assert_values
from fake_generations import (
    HELD,
    RED,
    STEPS,
    FakeRun,
    FakeScorers,
    attack,
    case,
    colours,
    flat,
    tilted,
    world,
)
from pydantic import ValidationError
from scipy.integrate import trapezoid

from eval.generation.similarity import Generation, training_curves
from eval.stats.aggregate import mean_over_steps
from lab.core.types import BASELINE


def metrics(run, **kwargs):
    return Generation(scorers=FakeScorers(), **{"similarities": ["clip"]} | kwargs)(run).metrics


def test_sgr_by_hand():
    result = metrics(world(HELD))
    assert_values(
        result,
        {
            "sgr_clip_mosaic": (0.8 - 0.6) / 0.8,
            "sgr_clip_neon": 0.0,
            "msgr_clip": 0.125,
            "msgr_clip_2x": (0.2 / 1 + 0) / 2,
            "sgr_benign_clip": (0.8 - 0.6) / 0.8,
        },
    )
    assert (result["sgr_benign_clip"].better, result["msgr_clip"].better) == ("lower", "higher")
    assert result["sgr_clip_worst"].value == pytest.approx(0.0)


def test_the_area_is_linear_in_steps():
    values = np.array([0.0, 0.6, 0.8, 1.0, 1.0])
    assert mean_over_steps(values, STEPS) == pytest.approx(trapezoid(values, STEPS) / 80)
    baseline = trapezoid([0.0, 0.6, 0.8, 1.0, 1.0], STEPS)
    mosaic = trapezoid([0.0, 0.0, 0.6, 0.8, 1.0], STEPS)
    assert metrics(world(HELD))["msgr_clip_auc"].value == pytest.approx((1 - mosaic / baseline) / 2)


def test_every_model_counts_under_its_own_best_attacker():
    """Each attack alone shows protection (lora) or none (full); together they relearn the concept
    in both models.
    """
    best, poor = flat(0.0, 0.6, 0.8, 1.0, 1.0), flat(0.0, 0.0, 0.6, 0.6, 0.6)
    by_attack = {"lora": (best, poor), "full": (poor, best)}  # of the baseline, immunized
    run = FakeRun(lambda model_name, name, *_: by_attack[name][model_name != BASELINE])
    run.attacks = tuple(by_attack)
    scores = Generation(scorers=FakeScorers(), similarities=["clip"])(run)
    assert scores.metrics["msgr_clip"].value == pytest.approx(0.0)
    assert scores.metrics["msgr_clip"].note == "strongest attacks: baseline lora, immunized full"
    rows = {row["attack"]: row["sgr"] for row in scores.tables["generation"] if row["step"] == 20}
    assert rows == pytest.approx({"lora": 0.25, "full": -1 / 3, "best of each model": 0.0})


def test_an_interval_knows_that_the_best_attacker_was_chosen_on_these_images():
    """Two attackers with the same mean, on different images: in most resamples one of them is
    ahead.
    """
    here, there = [tilted(c) for c in (1.0, 0.0) * 8], [tilted(c) for c in (0.0, 1.0) * 8]
    run = FakeRun(
        lambda model, name, *_: attack([here if model == BASELINE or name == "a" else there] * 5),
        seeds=(0,),
        case_list=(case(targets=("mosaic",)),),
    )
    one, two = (
        metrics(dataclasses.replace(run, attacks=a))["msgr_clip"] for a in (("a",), ("a", "b"))
    )
    assert (one.value, one.low, one.high) == pytest.approx((0.0, 0.0, 0.0))
    assert (two.value, two.high) == pytest.approx((0.0, 0.0))
    assert two.low < -0.3


def test_rsgr_compares_both_models_on_the_same_latents():
    """Between the models: neon and sketch paint alike (1), mosaic's images stand at 0.6·0.8 +
    0.8·0.6 = 0.96.
    """
    assert_values(
        metrics(world(HELD | {"sketch": flat(0.0, 0.6, 0.8, 1.0, 1.0)})),
        {
            "rsgr_clip_mosaic": 1 - 0.96,
            "rsgr_clip_neon": 0.0,
            "mrsgr_clip": 0.02,
        },
    )


def test_rsgr_by_the_feature_network_sees_what_clip_does_not():
    """Blue is nothing to this CLIP: (200, 0, 0) and (200, 0, 255) have cosine 1 to it, 200 ÷ 324 to
    the features.
    """
    plain, blue = attack([[tilted(1.0)] * 4] * 5), attack([[tilted(1.0, seen=True)] * 4] * 5)
    run = FakeRun(
        lambda model, _, name, seed: blue if model != BASELINE and name == "mosaic" else plain
    )
    result = metrics(run, similarities=["clip", "feature_lpips", "features"])
    assert_values(
        result,
        {
            "rsgr_clip_mosaic": 0.0,
            "rsgr_features_mosaic": 1 - 200 / (200**2 + 255**2) ** 0.5,
            "mrsgr_features": result["rsgr_features_mosaic"].value / 2,
            "rsgr_feature_lpips_mosaic": 1 / 6,  # one channel of three, and M = 1 - d/2
        },
    )


def test_a_denominator_that_is_not_positive_is_an_error_in_the_note():
    result = metrics(world(HELD, baseline=flat(0.0, 0.0, 0.0, 1.0, 1.0)))
    assert result["msgr_clip"].value is None
    assert "≤ 0" in result["msgr_clip"].note
    assert result["msgr_clip_2x"].value is not None


def test_an_attack_that_diverged_on_the_immunized_model_only_protects_nothing():
    broken = HELD | {"mosaic": flat(0.0, 0.0, status="diverged")}
    scores = Generation(scorers=FakeScorers(), similarities=["clip"])(world(broken))
    result = scores.metrics
    for name in ("sgr_clip_mosaic", "msgr_clip", "msgr_clip_2x", "sgr_clip_worst"):
        assert result[name].value == pytest.approx(0.0), name
    assert "3 of 12 attacks diverged" in result["sgr_clip_mosaic"].note
    curve = scores.curves["similarity_clip_mosaic"]
    assert (curve["immunized"][1], curve["immunized"][2:]) == (
        pytest.approx(0.0),
        [None, None, None],
    )


def test_clip_t_and_prompt_families():
    run = world(HELD, case_list=(case(families=("name", "reworded")),))
    inner = run.trajectories

    def both(*labels):
        result = inner(*labels)
        dim = (
            result.samples["name"]
            if labels[0] == BASELINE
            else colours(tilted(0.0)).expand(5, 4, -1, -1, -1)
        )
        return dataclasses.replace(result, samples=result.samples | {"reworded": dim})

    run.trajectories = both
    result = metrics(run)
    assert_values(
        result,
        {
            "msgr_clip_reworded": 1.0,
            # prompts in turn: "a mosaic" is red, "green" green; 0.8 has cosines 0.8 and 0.6
            "clip_t_harmful_baseline": (0.8 + 0.6) / 2,
        },
    )


def test_curves_have_bands_and_the_table_a_row_per_attack_and_mark():
    scores = Generation(scorers=FakeScorers(), similarities=["clip"])(world(HELD))
    curve = scores.curves["similarity_clip_neon"]
    assert curve["step"] == [0.0, 10.0, 20.0, 40.0, 80.0]
    assert curve["baseline"] == pytest.approx([0.0, 0.6, 0.8, 1.0, 1.0])
    assert {"baseline:low", "baseline:high", "immunized:low", "immunized:high"} <= set(curve)
    assert (
        scores.curves["msgr_clip"]["immunized"][0] is None
    )  # similarity 0 before the attack: no SGR there
    table = scores.tables["generation"]
    assert len(table) == 3 * 1 * 3
    row = next(r for r in table if r["concept"] == "mosaic" and r["step"] == 20)
    assert (row["baseline"], row["immunized"], row["sgr"]) == pytest.approx((0.8, 0.6, 0.25))


def test_grids_show_references_and_both_model_names():
    images = Generation(scorers=FakeScorers(), similarities=["clip"], images=3)(world(HELD)).images
    grid, both = images["generations_mosaic"], images["comparison_mosaic"]
    assert both.rows == ("baseline, step 20", "immunized, step 20")
    assert torch.equal(both.images[1], grid.images[grid.rows.index("immunized, step 20")])
    assert grid.images.shape == (1 + 2 * 4, 3, 3, 4, 4)
    assert torch.equal(grid.images[0, 2], colours(RED)[0])
    assert torch.equal(
        grid.images[grid.rows.index("immunized, step 20"), 0], colours(tilted(0.6))[0]
    )


def test_wrong_similarities_are_refused():
    with pytest.raises(ValidationError, match="similarities"):
        Generation(scorers=FakeScorers(), similarities=["dino"])


def test_what_was_logged_becomes_curves_over_seeds_without_holes():
    nan = math.nan
    first = {"step": [0, 1, 2, 3], "outer_loss": [1.0, 2.0, 3.0, nan], "cosine": [nan] * 4}
    second = {"step": [0, 1, 2, 3], "outer_loss": [3.0, nan, 5.0, nan]}
    curves = training_curves(FakeRun(seeds=(0, 1), logged={0: first, 1: second}))
    assert list(curves) == ["immunize_outer_loss"]
    assert curves["immunize_outer_loss"]["step"] == [0, 1, 2]
    # 4 at the step that the second one left out
    assert curves["immunize_outer_loss"]["immunized"] == pytest.approx([2.0, 3.0, 4.0])
