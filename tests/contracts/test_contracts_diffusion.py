"""The contract suite's other half: every immunizer, attacker and eraser of text-to-image models on
a tiny one.
"""

import pytest
import tiny
import torch
from hydra.utils import instantiate
from presets import build, composed, kinds, presets
from tiny_diffusion import tiny_case, tiny_diffusion

from lab.core.data import Sampling
from lab.core.types import Attacker, Budget, Eraser, Immunizer, same_weights

BUDGET = Budget(horizon=2, multiple=2, at=(0, 2, 4))


def choices(group):
    """Presets of a group that take text-to-image models."""
    return [name for name in presets(group) if "diffusion" in kinds(group, name)]


@pytest.fixture(scope="module")
def case():
    return tiny_case()


@pytest.mark.parametrize("name", choices("immunize"))
def test_immunizer(name, case):
    method = build("immunize", name, "diffusion")
    assert isinstance(method, Immunizer)
    assert method.name == name
    model = tiny_diffusion()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = method(model, case, seed=3, checkpoint=None, log=tiny.no_log)
    again = method(model, case, seed=3, checkpoint=None, log=tiny.no_log)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), (
        "the input model was changed"
    )
    assert same_weights(first, again)
    moved = {k for k, v in first.state_dict().items() if not torch.equal(v, before[k])}
    assert all(k.startswith("unet.") for k in moved)
    assert bool(moved) == (name != "none")


@pytest.mark.parametrize("role", ["harmful", "benign"])
@pytest.mark.parametrize("name", choices("attacks"))
def test_attacker(name, role, case):
    attack, model = build("attacks", name, "diffusion"), tiny_diffusion()
    assert isinstance(attack, Attacker)
    assert attack.name == name
    task = case.targets[0] if role == "harmful" else case.others[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = attack(model, task, seed=5, budget=BUDGET, checkpoint=None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), (
        "the input model was changed"
    )
    assert found.status == "ok"
    assert found.steps == [0, 2, 4]
    assert {"train_loss", "test_loss"} <= set(found.values)
    assert all(len(v) == 3 for v in found.values.values())
    assert found.weights
    for pictures in found.samples.values():
        assert pictures.dtype == torch.uint8
        assert pictures.shape == (3, 2, 3, model.image_size, model.image_size)
    if role == "harmful":
        again = attack(model, task, seed=5, budget=BUDGET, checkpoint=None)
        assert again.values == found.values
        assert all(torch.equal(again.samples[k], v) for k, v in found.samples.items())


@pytest.mark.parametrize("name", presets("erase"))
def test_eraser(name, case):
    eraser = build("erase", name)
    assert isinstance(eraser, Eraser)
    assert eraser.name == name
    assert "diffusion" in eraser.accepts


def test_the_sampling_of_the_scenario_reaches_the_attackers():
    lora = composed("experiment=relearn", "attacks=[lora]").attacks.lora
    assert instantiate(lora, _convert_="all").sampling == Sampling(steps=8)
