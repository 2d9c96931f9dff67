"""Cosines between targets, in the text encoder and in images."""

from dataclasses import replace

import pytest
import torch
from fake_generations import FakeRun, FakeScorers, case, colours
from tiny_diffusion import tiny_diffusion

from eval.generation.target_similarity import TargetSimilarity
from lab.core.data import CaptionedImages
from lab.core.types import BASELINE


def similarities(*names, own):
    """The scores of a case with these targets, whose images have the colours ``own``."""
    made = case(targets=names)
    targets = tuple(
        replace(target, train=CaptionedImages(colours(*own[target.name]), ("a",) * 2))
        for target in made.targets
    )
    model = tiny_diffusion()
    run = FakeRun(case_list=(replace(made, targets=targets),), models={BASELINE: model})
    return model, TargetSimilarity(scorers=FakeScorers())(run).metrics


def test_cosines_by_hand():
    red, green = (255, 0, 0), (0, 255, 0)
    own = {"fox": (red, red), "guitar": (red, red), "sailboat": (green, green)}
    model, found = similarities(*own, own=own)
    vectors = FakeScorers().clip.images(colours(red, green)).double()
    cosine = float(torch.nn.functional.cosine_similarity(*vectors, dim=0))
    assert found["target_similarity_image"].value == pytest.approx((1 + 2 * cosine) / 3)
    with torch.no_grad():  # one word each: the row behind the start token, or the mean of its rows
        hidden = [model.text([name]).hidden[0] for name in own]
        ends = [len(model.tokenizers[0](name).input_ids) - 1 for name in own]
        rows = [h[1:end].mean(0).double() for h, end in zip(hidden, ends, strict=True)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [torch.nn.functional.cosine_similarity(rows[a], rows[b], dim=0) for a, b in pairs]
    assert found["target_similarity_text"].value == pytest.approx(float(sum(cosines)) / 3)
    assert found["target_similarity_text"].value < 0.999


def test_one_target_has_no_similarity():
    _, found = similarities("fox", own={"fox": ((255, 0, 0),) * 2})
    assert {score.value for score in found.values()} == {None}
    assert {score.note for score in found.values()} == {"a single target"}
