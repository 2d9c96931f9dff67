"""How images are scored: similarities to references, once per image, whoever asks."""

import numpy as np
import pytest
import torch
from fake_generations import (
    HELD,
    RED,
    Clip,
    FakeScorers,
    Perceptual,
    colours,
    flat,
    tilted,
    world,
)
from test_generation import metrics

from eval.generation.scoring import References, prepare
from eval.generation.similarity import Generation
from lab.core.errors import UserError


def test_features_and_feature_lpips():
    result = metrics(world(HELD), similarities=["features", "feature_lpips"])
    assert result["msgr_features"].value == pytest.approx(
        0.125
    )  # features of these images are their colours
    distance = {c: np.abs(np.array(tilted(c)) - np.array(RED)).sum() / 3 / 255 for c in (0.8, 0.6)}
    baseline, immunized = 1 - distance[0.8] / 2, 1 - distance[0.6] / 2
    assert result["sgr_feature_lpips_mosaic"].value == pytest.approx(
        (baseline - immunized) / baseline
    )


def test_lpips_needs_its_scorer_and_meets_the_references_in_turn():
    references, shown = colours((0, 0, 0), (255, 255, 255)), colours((0, 0, 0), (0, 0, 255))
    result = References(FakeScorers(lpips=Perceptual()), references).similarity("lpips", shown)
    assert result.tolist() == [1.0, 0.0]  # one minus the largest difference of a colour
    with pytest.raises(UserError, match=r"scorers.lpips is null"):
        metrics(world(HELD), similarities=["clip", "lpips"])


def test_runs_that_share_a_cache_scorer_the_same_images_once():
    class Counting(Clip):
        seen = 0

        def images(self, images):
            Counting.seen += len(images)
            return super().images(images)

    def scored(scorers, store, trajectories=HELD, **options):
        before = Counting.seen
        metrics = Generation(scorers=scorers, **{"similarities": ["clip"]} | options)(
            world(trajectories, store=store)
        ).metrics
        return Counting.seen - before, {name: score.value for name, score in metrics.items()}

    store, scorers = {}, FakeScorers(clip=Counting())
    first, values = scored(scorers, store)
    assert scored(scorers, store) == (0, values)
    assert scored(scorers, store, similarities=["clip", "features"])[0] == 0
    assert scored(scorers, store, preprocessing="legacy")[0] == first
    assert scored(FakeScorers(clip=Counting()), store)[0] == first
    assert (
        scored(scorers, store, HELD | {"neon": flat(0.0, 0.0, 0.8, 1.0, 1.0)})[0] == 5 * 4 + 2
    )  # one concept and its two references; all seeds look alike


def test_legacy_images_are_pale_and_small():
    images = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 128, 128)
    result = prepare(images, "legacy")
    assert result.shape == (1, 3, 64, 64)
    assert result[0, :, 0, 0].tolist() == [128, 178, 255]  # x/2 + 1/2 in [0, 1]
    scores = Generation(scorers=FakeScorers(), similarities=["clip"], preprocessing="legacy")(
        world(HELD)
    )
    assert all(name.endswith("_legacy") for name in scores.metrics)
    pale = Clip().images(prepare(colours(RED, tilted(0.8), tilted(0.6)), "legacy"))
    a, i = float(pale[0] @ pale[1]), float(pale[0] @ pale[2])
    assert scores.metrics["sgr_clip_mosaic_legacy"].value == pytest.approx((a - i) / a)
