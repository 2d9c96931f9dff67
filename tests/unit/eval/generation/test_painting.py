"""Pictures of unattacked models: painted once, the same whatever else is asked for."""

import torch
from fake_generations import FakeRun, Painter, case

from eval.generation.painting import BLOCK, paint
from lab.core.data import Sampling
from lab.core.types import BASELINE

SAMPLING = Sampling(2, 4.0, 4)


class Numbered(Painter):
    """Its latents are numbers that differ between blocks, and the red of a picture is its
    number.
    """

    def latents(self, total, seed, *labels):
        return torch.arange(total) + 100 * labels[-1]


def numbered() -> Numbered:
    return Numbered(lambda prompt, number: (number, len(prompt), 0))


def pictures(run, count, model_name=BASELINE, prompts=("a", "bb"), sampling=SAMPLING):
    return paint(run, case(), 0, model_name, prompts, sampling, count)


def test_a_smaller_count_is_the_beginning_of_a_larger_one():
    run = FakeRun(models={BASELINE: numbered(), "mima": numbered()})
    few, many = pictures(run, BLOCK), pictures(run, BLOCK + 8)
    assert torch.equal(many[:BLOCK], few)
    assert many[:, 0, 0, 0].tolist() == [*range(BLOCK), *range(100, 108)]
    assert many[:, 1, 0, 0].tolist() == [1, 2] * (BLOCK // 2 + 4)
    assert len(run.models[BASELINE].calls) == 2  # the first block was there


def test_model_names_share_latents_and_not_pictures():
    run = FakeRun(models={BASELINE: numbered(), "mima": numbered()})
    assert torch.equal(pictures(run, 4), pictures(run, 4, model_name="mima"))
    assert len(run.models["mima"].calls) == 1


def test_equal_weights_paint_once_in_all_runs_and_other_settings_paint_anew():
    model = numbered()
    kept: dict = {}
    first, second = (
        FakeRun(models={BASELINE: model, "mima": numbered()}, store=kept) for _ in range(2)
    )
    pictures(first, 4)
    pictures(second, 4)
    assert len(model.calls) == 1
    pictures(second, 4, sampling=Sampling(2, 1.0, 4))
    pictures(second, 4, prompts=("c",))
    assert len(model.calls) == 3
    model.weights += 10_000
    pictures(FakeRun(models={BASELINE: model, "mima": numbered()}, store=kept), 4)
    assert len(model.calls) == 4
