"""Utility on unrelated prompts: figures by hand."""

import dataclasses

import pytest
import torch
from assertions import assert_values
from fake_generations import (
    Detector,
    FakeRun,
    FakeScorers,
    Painter,
    case,
    faithful,
)
from pydantic import ValidationError

from eval.generation.utility import BLOCK, ImageGenerator, Utility
from lab.core.data import CaptionedImages, Sampling
from lab.core.errors import UserError
from lab.core.types import BASELINE, IMMUNIZED


def world(paint, **kwargs):
    return FakeRun(models={BASELINE: Painter(faithful), IMMUNIZED: Painter(paint)}, **kwargs)


def metrics(run, scorers=None, **kwargs):
    return Utility(scorers=scorers or FakeScorers(), **{"count": 8} | kwargs)(run).metrics


def drifted(prompt, number):
    """Red prompts become green in every second of their images (numbers 0, 4); the rest is as it
    was.
    """
    return (0, 200, 0) if number % 4 == 0 else faithful(prompt, number)


def test_damage_by_hand():
    result = metrics(world(drifted))
    assert_values(
        result,
        {
            "utility_clip_drift": 2 / 8,  # two of eight images at a right angle
            "utility_clip_t_drop": 2 / 8,
            "utility_detection_drop": 2 / 8,
            "utility_object_drop": 2 / 8,
            "utility_style_drop": 0,
            "utility_agreement": 6 / 8,
        },
    )
    assert result["utility_frechet"].value > result["utility_frechet_baseline"].value
    assert result["utility_detection_drop"].low <= 2 / 8 <= result["utility_detection_drop"].high


def test_many_images_of_one_prompt_are_no_evidence_on_others():
    """One of two prompts is damaged in all its images: a hundred images say no more than
    two.
    """
    run = world(lambda prompt, number: (0, 200, 255), seeds=(0,))
    result = metrics(run, count=100)["utility_object_drop"]
    assert (result.value, result.low, result.high) == (pytest.approx(0.5), 0.0, 1.0)


def test_further_settings_are_suffixes():
    run = world(drifted, seeds=(0,))
    result = metrics(
        run, guidances=[1, 4, 7.5], negative="blurry", compositions=["a green thing", "red", "red"]
    )
    names = (
        "utility_clip_drift_guidance_1",
        "utility_clip_drift_guidance_7_5",
        "utility_clip_drift_negative",
    )
    assert all(result[n].value == pytest.approx(2 / 8) for n in names)
    assert "utility_clip_drift_guidance_4" not in result  # the scenario's own scale
    assert [s.guidance for s in run.models["immunized"].calls] == [4.0, 1.0, 7.5, 4.0, 4.0]


class Named(Detector):
    names = {"object": ("red thing", "green thing"), "style": ("plain", "bright")}


def test_compositions_must_show_what_their_prompt_names():
    run = world(drifted, seeds=(0,))  # "red" is green in images 0 and 4, "green" always right
    result = metrics(
        run, FakeScorers(detector=Named()), compositions=["a plain red thing", "one green thing"]
    )
    assert_values(
        result,
        {"utility_detection_compositions_baseline": 1, "utility_object_drop_compositions": 2 / 8},
    )
    result = metrics(run, FakeScorers(detector=Named()), compositions=["a bright red thing"])
    assert (
        result["utility_detection_compositions_baseline"].value == 0.0
    )  # the object alone is not enough


def test_empty_sets_and_wrong_options():
    bare = dataclasses.replace(
        case(), unrelated=CaptionedImages(torch.empty(0, 3, 4, 4, dtype=torch.uint8), ())
    )
    with pytest.raises(UserError, match="no unrelated prompts"):
        metrics(world(faithful, case_list=(bare,)))
    with pytest.raises(ValidationError, match="count"):
        Utility(scorers=FakeScorers(), count=1)


def test_a_real_model_paints_for_both_models_from_the_same_latents():
    from tiny_diffusion import tiny_case, tiny_diffusion

    same, other = tiny_diffusion(0), tiny_diffusion(1)
    for models, drift in (((same, same), False), ((same, other), True)):
        run = FakeRun(
            models=dict(zip((BASELINE, IMMUNIZED), models, strict=True)),
            case_list=(tiny_case(),),
            seeds=(0,),
        )
        result = metrics(run, count=3)
        assert (result["utility_clip_drift"].value > 1e-6) == drift
        assert result["utility_clip_drift"].interval == "within_seed"


# ---- painting


class Numbered(Painter):
    """Its latents are numbers that differ between blocks, and the red of an image is its number."""

    def latents(self, total, seed, *labels):
        return torch.arange(total) + 100 * labels[-1]


def numbered():
    return Numbered(lambda prompt, number: (number, len(prompt), 0))


def painted(run, count, model_name=BASELINE, prompts=("a", "bb"), guidance=4.0):
    asked = [prompts[i % len(prompts)] for i in range(count)]
    return ImageGenerator(run, case(), 0, model_name).generate(
        asked, Sampling(steps=2, guidance=guidance, count=4)
    )


def test_a_smaller_count_is_the_beginning_of_a_larger_one():
    run = FakeRun(models={BASELINE: numbered(), IMMUNIZED: numbered()})
    few, many = painted(run, BLOCK), painted(run, BLOCK + 8)
    assert torch.equal(many[:BLOCK], few)
    assert many[:, 0, 0, 0].tolist() == [*range(BLOCK), *range(100, 108)]
    assert torch.equal(painted(run, 4), painted(run, 4, model_name="immunized"))  # the same latents
    assert len(run.models[BASELINE].calls) == 3  # the first block of many was there


def test_equal_weights_paint_once_in_all_runs_and_other_settings_paint_anew():
    model, store = numbered(), {}
    models = {BASELINE: model, IMMUNIZED: numbered()}
    first, second = (FakeRun(models=models, store=store) for _ in range(2))
    painted(first, 4)
    painted(second, 4)
    assert len(model.calls) == 1
    painted(second, 4, guidance=1.0)
    painted(second, 4, prompts=("c",))
    assert len(model.calls) == 3
    model.weights += 10_000
    painted(second, 4)
    assert len(model.calls) == 4
