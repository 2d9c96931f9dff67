"""The attacker's search: equal trials in every model, its own images only, the best setting for
the whole run.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from attack_examples import interrupted
from concept_examples import assert_equal, attack, curriculum, launch, task
from pydantic import ValidationError
from tiny_diffusion import tiny_diffusion

from attacks.search import likeness
from lab.core.data import CaptionedImages
from lab.core.errors import UserError
from lab.minisd.world import world

SPACE = {"lr": [1e-4, 0.05], "rank": [1, 2]}
GRID = {"mode": "grid", "steps": 3, "space": SPACE}


def searched(**changes):
    return attack("lora", families=(), search={**GRID, **changes})


unbroken = cache(lambda: launch(searched()))  # read only


def test_best_trial_is_the_one_with_the_lowest_held_out_loss_and_is_what_runs():
    found = unbroken()
    told = found.info["search"]
    assert [row["setting"] for row in told["trials"]] == [
        {"lr": lr, "rank": rank} for lr in SPACE["lr"] for rank in SPACE["rank"]
    ]
    assert told["best"] == min(told["trials"], key=lambda row: row["score"])["setting"]
    plain = launch(attack("lora", families=(), **told["best"]))
    assert {k: v for k, v in found.info.items() if k != "search"} == plain.info
    assert found.values == plain.values
    assert all(torch.equal(found.weights[k], plain.weights[k]) for k in plain.weights)


def test_without_steps_every_setting_is_an_attack_of_its_own():
    whole = searched(steps=None, space={"rank": [1, 2]})
    variants = whole.variants()
    assert [*variants] == ["lora (rank 1)", "lora (rank 2)"]
    found, options = variants["lora (rank 2)"]
    assert options == {"rank": 2, "name": "lora (rank 2)", "search": None}
    assert launch(found).values == launch(attack("lora", families=(), rank=2)).values
    assert searched().variants() == {}
    with pytest.raises(UserError, match="variants"):
        launch(whole)


@pytest.mark.slow
def test_the_reference_is_never_read_by_a_trial_and_settings_agree_between_model_names():
    noise = torch.randint(0, 256, task().reference.images.shape, dtype=torch.uint8)
    other = replace(
        task(),
        reference=CaptionedImages(noise, task().reference.prompts),
        own=CaptionedImages(noise[:0], ()),
    )
    random = searched(mode="random", trials=2)
    here, there = launch(random), launch(random, what=other)
    assert here.info["search"] == there.info["search"]
    assert here.values["test_loss"] != there.values["test_loss"]
    model_name = launch(random, tiny_diffusion(seed=1))
    settings = [
        [row["setting"] for row in run.info["search"]["trials"]] for run in (here, model_name)
    ]
    assert settings[0] == settings[1]


def test_the_split_is_a_partition_of_the_training_images():
    split = searched().held_out(task(), searched().search, 0)
    parts = [image.tolist() for part in (split.train, split.reference) for image in part.images]
    assert sorted(parts) == sorted(image.tolist() for image in task().train.images)


@pytest.mark.parametrize("fail_at", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_killed_search_continues(fail_at):
    """In the search, and in the run after it."""
    assert_equal(interrupted(lambda kept: launch(searched(), checkpoint=kept), fail_at), unbroken())


def test_trials_that_diverge_lose_and_where_all_do_the_options_stay():
    told = launch(searched(space={"lr": [1e12, 0.05]})).info["search"]
    assert told["trials"][0]["score"] is None
    assert told["best"] == {"lr": 0.05}
    none = launch(searched(space={"lr": [1e12, 1e13]}))
    assert (none.info["search"]["best"], none.status) == ({}, "ok")


def test_likeness_tells_a_style_from_others_and_chooses_a_trial():
    wanted = world.sample(world.concept("mosaic"), 7, 6).images
    images = CaptionedImages(wanted, ("",) * 6)
    found = {
        n: likeness(world.sample(world.concept(n), 0, 6).images, images)
        for n in ("neon", "mosaic", "halftone")
    }
    assert max(found, key=found.__getitem__) == "mosaic"
    told = launch(searched(score="likeness", space={"lr": [1e-4, 0.2]})).info["search"]
    assert told["best"] == min(told["trials"], key=lambda row: row["score"])["setting"]
    assert likeness(wanted[:1], CaptionedImages(wanted[:1], ("",))) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_a_curriculum_is_searched_by_stage():
    options = {
        "families": (),
        "search": {"steps": 3, "space": {"related.share": [1, 9], "target.attack.rank": [1]}},
    }
    told = launch(curriculum(**options)).info["search"]
    assert len(told["trials"]) == 2
    assert told["best"].keys() == {"related.share", "target.attack.rank"}


@pytest.mark.parametrize(
    "options",
    [
        {"trials": 3},
        {"mode": "random", "trials": 5},
        {"budget": 3},
        {"score": "clip"},
        {"score": "likeness", "steps": None},
    ],
)
def test_searches_that_cannot_work_are_refused(options):
    with pytest.raises(ValidationError, match="search"):
        searched(**options)
