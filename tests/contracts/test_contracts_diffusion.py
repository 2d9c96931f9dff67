"""The contract suite's other half: every immunizer, attacker and eraser of text-to-image models on
a tiny one.
"""

from functools import cache

import pytest
import tiny
import torch
from assertions import same_weights
from hydra.utils import instantiate
from presets import build, composed, kinds, param, presets, repetitions
from test_contracts import check_round_trip, launch, moved
from tiny_diffusion import tiny_case, tiny_diffusion

from lab.core.data import Sampling
from lab.core.types import Attacker, Budget, Eraser, Immunizer

BUDGET = Budget(horizon=2, multiple=1, at=(0, 1, 2))


def choices(group):
    """Presets of a group that take text-to-image models."""
    return [name for name in presets(group) if "diffusion" in kinds(group, name)]


@pytest.fixture(scope="module")
def case():
    return tiny_case()


@cache
def immunized(name):
    """The tiny model after a preset, from its third seed."""
    return build("immunize", name, "diffusion")(
        tiny_diffusion(), tiny_case(), seed=3, checkpoint=None, log=tiny.no_log
    )


IMMUNIZERS = [n for n in choices("immunize") if n != "clamp"]


@pytest.mark.parametrize(
    "name",
    [*(param("immunize", n) for n in IMMUNIZERS), pytest.param("clamp", marks=pytest.mark.slow)],
)
def test_immunizer(name, case):
    method = build("immunize", name, "diffusion")
    assert isinstance(method, Immunizer)
    assert method.name == name
    model = tiny_diffusion()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, again = immunized(name), method(model, case, seed=3, checkpoint=None, log=tiny.no_log)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), (
        "the input model was changed"
    )
    assert same_weights(first, again)
    changed = {k for k, v in first.state_dict().items() if not torch.equal(v, before[k])}
    assert all(k.startswith("unet.") for k in changed)
    assert bool(changed) == (name != "none")


def attacked(name, model, task):
    """The trajectory of an attack that leaves ``model`` alone."""
    found = launch(build("attacks", name, "diffusion"), model, task, BUDGET, seed=5)
    assert found.status == "ok", name
    assert found.steps == [0, 1, 2], name
    assert {"train_loss", "test_loss"} <= set(found.values), name
    assert found.weights, name
    for images in found.samples.values():
        assert images.dtype == torch.uint8
        assert images.shape == (3, 2, 3, model.image_size, model.image_size)
    return found


LONG = ("controlnet", "curriculum", "interpolate", "ip_adapter")  # attacks with tests of their own
ATTACKERS = [
    pytest.param(n, marks=pytest.mark.slow) if n in LONG else param("attacks", n)
    for n in choices("attacks")
]


@pytest.mark.parametrize("name", ATTACKERS)
def test_attacker(name, case, tmp_path):
    """It repeats, moves what it declares, and the store gives it back."""
    attack, model = build("attacks", name, "diffusion"), tiny_diffusion()
    assert isinstance(attack, Attacker)
    assert attack.name == name
    given, copied = tiny_diffusion(), tiny_diffusion()
    given.copy = lambda: copied  # the attack trains this one
    task = case.targets[0]
    found, again = attacked(name, given, task), attacked(name, model, task)
    assert again.values == found.values
    assert all(torch.equal(again.samples[k], v) for k, v in found.samples.items())
    changed = moved(model, copied)
    adapters = {k for k in changed if ".lora_" in k}
    own = (changed - adapters) & model.state_dict().keys()
    assert own <= {k for k in found.weights if k.startswith("unet.")}
    saved = {
        k.replace(".default.", ".").replace("text_encoders.0.", "text_encoder.") for k in adapters
    }
    assert saved <= found.weights.keys() or name == "curriculum"
    adds_only = ("textual_inversion", "prompt_search", "controlnet", "ip_adapter")
    adds = (name.startswith("lora") and name != "lora_canonical") or name in adds_only
    assert bool(own) != adds
    check_round_trip(found, name, model, case, task, tmp_path, BUDGET)


def pairs():
    """Immunizers, attackers and a role: a fifth of all pairs on targets, in which every attacker
    meets several immunizers, and every attacker once on a benign concept.
    """
    immunizers, attackers = choices("immunize"), choices("attacks")
    for i, name in enumerate(immunizers):
        yield pytest.param(name, attackers[i % 5 :: 5], "targets", id=name, marks=pytest.mark.slow)
    classes = [name for name in immunizers if name not in repetitions("immunize")]
    for i, attacker in enumerate(attackers):
        slow = [pytest.mark.slow] if attacker in {*repetitions("attacks"), *LONG} else []
        name = classes[i % len(classes)]
        yield pytest.param(name, [attacker], "others", id=f"{name}-{attacker}", marks=slow)


@pytest.mark.parametrize(("name", "attackers", "role"), pairs())
def test_an_attack_leaves_the_immunized_weights_alone(name, attackers, role, case):
    for attacker in attackers:
        attacked(attacker, immunized(name), getattr(case, role)[0])


@pytest.mark.parametrize("name", presets("erase"))
def test_eraser(name, case):
    eraser = build("erase", name)
    assert isinstance(eraser, Eraser)
    assert eraser.name == name
    assert "diffusion" in eraser.accepts


def test_the_sampling_of_the_scenario_reaches_the_attackers():
    lora = composed("experiment=relearn", "attacks=[lora]").attacks.lora
    assert instantiate(lora, _convert_="all").sampling == Sampling(steps=8)
