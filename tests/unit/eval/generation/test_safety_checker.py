"""The safety checker and false positives: figures by hand."""

import dataclasses

import pytest
import torch
from assertions import assert_values
from fake_generations import FakeRun, FakeScorers, Painter, attack, case, colours, tilted
from PIL import Image

from eval.generation.false_positives import FalsePositives
from eval.generation.safety_checker import SafetyChecker
from lab.core.data import CaptionedImages
from lab.core.errors import UserError
from lab.core.types import BASELINE, IMMUNIZED


def test_images_that_look_like_the_concept_are_hidden():
    """Unrelated images have the cosine 0 to the concept, so 0 is the threshold. The detector sees
    the concept in all images of the baseline, the checker in none; in the immunized model's it sees
    half of them.
    """
    unrelated = CaptionedImages(colours(*[(0, 200, 0)] * 8), ("green",) * 8)
    it = dataclasses.replace(case(), unrelated=unrelated)

    def trajectory(model, attack_name, concept, seed):
        cosines = (0, 0) if model == BASELINE else (0, 1)
        return attack([[tilted(c, True) for c in cosines]] * 5)

    result = SafetyChecker(scorers=FakeScorers())(FakeRun(trajectory, case_list=(it,))).metrics
    assert_values(result, {"checker_false_positive": 0, "asr_checked_baseline": 1})
    assert result["asr_checked"].value == result["asr_checked_2x"].value == 0.5


def test_an_attack_that_broke_on_the_immunized_model_counts_as_on_the_baseline():
    """It shows nothing, and what it shows is hidden; the baseline's images are not."""
    unrelated = CaptionedImages(colours(*[(0, 200, 0)] * 8), ("green",) * 8)
    it = dataclasses.replace(case(), unrelated=unrelated)

    def trajectory(model, attack_name, concept, seed):
        if model == BASELINE:
            return attack([[tilted(0, True)] * 2] * 5)
        return attack([[tilted(0.5, False)] * 2], "diverged")

    result = SafetyChecker(scorers=FakeScorers())(FakeRun(trajectory, case_list=(it,))).metrics
    assert result["asr_checked_2x"].value == result["asr_checked_2x_baseline"].value == 1


def test_the_checker_needs_unrelated_images():
    none = CaptionedImages(torch.empty(0, 3, 4, 4, dtype=torch.uint8), ())
    with pytest.raises(UserError, match="fewer than two unrelated images"):
        SafetyChecker(scorers=FakeScorers()).check((dataclasses.replace(case(), unrelated=none),))


class Blue:
    """Sees ``blue`` where it is bright."""

    def detects(self, images, name):
        assert name == "blue"
        return images.double().mean((2, 3))[:, 2] > 127


def test_false_positives_of_references_generations_and_a_folder(tmp_path):
    for i, colour in enumerate([(0, 0, 255), (0, 0, 0), (9, 9, 9), (0, 9, 0)]):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{i}.png")
    painted = {BASELINE: (0, 0, 0), IMMUNIZED: (0, 0, 255)}
    run = FakeRun(models={m: Painter(lambda p, n, c=c: c) for m, c in painted.items()})
    metric = FalsePositives(detector=Blue(), concept="blue", count=8, folder=str(tmp_path))
    metric.check(run.case_list)
    result = {name: score.value for name, score in metric(run).metrics.items()}
    assert result == {
        "false_positive_folder": 0.25,
        "false_positive_reference": 0.0,
        "false_positive_baseline": 0.0,
        "false_positive": 1.0,
    }


def test_another_content_of_the_folder_is_another_stage_and_none_is_refused(tmp_path):
    metric = FalsePositives(detector=Blue(), concept="blue", folder=str(tmp_path))
    with pytest.raises(UserError, match=r"has no \.bmp"):
        metric.check((case(),))
    hashes = set()
    for colour in ((0, 0, 255), (0, 9, 0)):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "0.png")
        hashes.add(metric.fingerprint())
    assert len(hashes) == 2


def test_nudenet_sees_no_nudity_in_a_flat_image():
    """The real network, from its wheel."""
    pytest.importorskip("nudenet")
    from lab.scorers.detector import NudeNet

    assert not NudeNet().detects(torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)).any()
