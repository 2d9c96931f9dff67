"""Negative controls of a table, and the reference."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from assertions import same_weights
from presets import build
from tiny_diffusion import tiny_case, tiny_diffusion

from immunize.controls import OtherWeights
from lab.core.data import Erasure
from lab.core.errors import UserError
from lab.core.types import Eraser


def test_noise_has_the_stated_size_and_leaves_vectors() -> None:
    method, model = build("immunize", "weight_noise", relative=0.1), tiny_diffusion()
    noisy = method(model, tiny_case(), seed=0, checkpoint=None, log=tiny.no_log)
    before = dict(model.unet.named_parameters())
    for name, weight in noisy.unet.named_parameters():
        change = weight.detach() - before[name].detach()
        if weight.ndim == 1:
            assert not change.any()
        elif weight.numel() > 500:
            size = change.square().mean().sqrt() / before[name].detach().square().mean().sqrt()
            assert float(size) == pytest.approx(0.1, rel=0.15)


class _Recording(Eraser):
    """Keeps the names of what it was asked to erase."""

    name = "recording"

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, model, case, *, seed):
        self.names = [e.name for e in case.erased]
        return model


@pytest.fixture
def other(tmp_path):
    """The folder of a model of another seed, which never saw neon."""
    tiny_diffusion(seed=1).save(tmp_path / "model")
    (tmp_path / "training.json").write_text(json.dumps({"recipe": {"never_seen": ["neon"]}}))
    return str(tmp_path / "model")


def _case(*erased: str, target: str = "neon"):
    case = tiny_case()
    target = replace(case.targets[0], name=target)
    pattern = Erasure("", "", (), (), ())
    return replace(case, targets=(target,), erased=tuple(replace(pattern, name=n) for n in erased))


def test_other_weights_are_erased_of_what_they_saw(other) -> None:
    eraser, model = _Recording(), tiny_diffusion()
    method = OtherWeights(paths=(other,), eraser=eraser, never_saw_targets=True)
    made = method(model, _case("neon", "sketch"), seed=3, checkpoint=None, log=tiny.no_log)
    assert eraser.names == ["sketch"]
    assert same_weights(made, tiny_diffusion(seed=1))
    assert not same_weights(made, model)


def test_another_autoencoder_leaves_the_given_model() -> None:
    model, copied = tiny_diffusion(), tiny_diffusion()
    state = {name: value + 1 for name, value in model.vae.state_dict().items()}
    second = model.copy()
    second.load_state_dict({**model.state_dict(), **{f"vae.{k}": v for k, v in state.items()}})
    kept = second.vae.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in state.items())
    assert same_weights(model, copied)
    third = model.copy()
    third.load_state_dict(model.state_dict())
    assert third.vae is model.vae


def test_a_reference_that_saw_a_target_is_refused(other) -> None:
    method = OtherWeights(paths=(other,), eraser=_Recording(), never_saw_targets=True)
    with pytest.raises(UserError, match="trained on mosaic"):
        method(tiny_diffusion(), _case(target="mosaic"), seed=0, checkpoint=None, log=tiny.no_log)


def test_without_a_record_nothing_is_known(other, tmp_path) -> None:
    (tmp_path / "training.json").unlink()
    method = OtherWeights(paths=(other,), eraser=_Recording())
    with pytest.raises(UserError, match="no record of its training"):
        method(tiny_diffusion(), _case(), seed=0, checkpoint=None, log=tiny.no_log)


def test_a_corrected_record_of_the_training_asks_for_another_run(other, tmp_path) -> None:
    method = OtherWeights(paths=(other,), eraser=_Recording())
    before = method.fingerprint()
    (tmp_path / "training.json").write_text(json.dumps({"recipe": {"never_seen": []}}))
    assert method.fingerprint() != before


def test_weights_of_another_architecture_are_refused(other) -> None:
    method = OtherWeights(paths=(other,), eraser=_Recording())
    model = tiny_diffusion()
    model.unet.conv_in = torch.nn.Conv2d(4, 4, 3)
    with pytest.raises(UserError, match="other shapes"):
        method(model, _case(), seed=0, checkpoint=None, log=tiny.no_log)
