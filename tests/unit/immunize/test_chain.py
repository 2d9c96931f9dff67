"""Immunizers one after the other."""

from dataclasses import replace
from functools import cache

import pytest
import tiny
from assertions import same_weights
from attack_examples import interrupted
from presets import build
from pydantic import ValidationError
from tiny_diffusion import tiny_case, tiny_diffusion

from immunize.chain import Chain
from immunize.controls import WeightNoise
from immunize.erase import EraseAgain
from immunize.kappa.closed_form import KappaClosedForm
from immunize.undo import Undo
from lab.models.erase import Uce


def _chain():
    first, last = (
        replace(build("immunize", name, "diffusion"), checkpoint_every=1)
        for name in ("mima_first_order", "mima_deep")
    )
    return Chain(methods={"first": first, "noise": WeightNoise(), "last": last})


def _run(checkpoint=None):
    rows = []
    made = _chain()(
        tiny_diffusion(),
        tiny_case(),
        seed=0,
        checkpoint=checkpoint,
        log=lambda step, **values: rows.append((step, values)),
    )
    return made, rows


unbroken = cache(_run)  # read only


def test_each_starts_from_what_the_one_before_left():
    model = tiny_diffusion()
    for method in _chain().methods.values():
        model = method(model, tiny_case(), seed=0, checkpoint=None, log=tiny.no_log)
    made, rows = unbroken()
    assert same_weights(made, model)
    steps = [step for step, _ in rows]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("save", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_resumed_equals_unbroken(save):
    whole, rows = unbroken()
    again, rows_again = interrupted(_run, save)
    assert same_weights(again, whole)
    assert rows_again == rows


def test_a_method_on_the_model_before_erasure_is_refused():
    with pytest.raises(ValidationError, match=r"methods\.undo: takes the model before erasure"):
        Chain(methods={"undo": Undo(), "noise": WeightNoise()})


def test_a_chain_takes_what_all_its_methods_take():
    assert Chain(methods={"noise": WeightNoise()}).accepts == {"diffusion"}
    with pytest.raises(ValidationError, match="different kinds of models"):
        Chain(methods={"kappa": KappaClosedForm(), "noise": WeightNoise()})


def test_erasing_again_is_the_eraser_on_immunized_weights():
    case, noise, again = tiny_case(), WeightNoise(), EraseAgain(eraser=Uce())
    options = {"seed": 0, "checkpoint": None, "log": tiny.no_log}
    made = Chain(methods={"noise": noise, "uce": again})(tiny_diffusion(), case, **options)
    assert same_weights(made, Uce()(noise(tiny_diffusion(), case, **options), case, seed=0))
