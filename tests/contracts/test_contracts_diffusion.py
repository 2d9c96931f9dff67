"""The contract suite's other half: every immunizer, attacker and eraser of text-to-image models on
a tiny one.
"""

from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny_diffusion import tiny_case, tiny_diffusion

from lab.core.data import Sampling
from lab.core.types import Attacker, Budget, Eraser, Immunizer, same_weights

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Budget(horizon=2, multiple=2, at=(0, 2, 4))
SMALL = {
    "steps": 2,
    "batch_size": 2,
    "prior_batch_size": 2,
    "lower_batch_size": 2,
    "k_min": 1,
    "k_max": 2,
}


def names(group):
    return sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml"))


@cache
def node_of(group, name):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["experiment=relearn", f"{group}={name}"])
    node = cfg.attacks.get(name) if group == "attacks" else cfg[group]
    if node is not None:
        OmegaConf.set_struct(node, False)
    return node


def build(group, name, **changes):
    node = node_of(group, name)
    if node is None:
        return None
    drawn = node.get("attackers") is not None  # k_min and k_max are theirs
    return instantiate(
        OmegaConf.merge(
            node, {k: v for k, v in changes.items() if k in node and (drawn or k[:2] != "k_")}
        ),
        _convert_="all",
    )


def immunizer(name):
    return build("immunize", name, **SMALL)


def attacker(name):
    if name == "none" or "diffusion" not in build("attacks", name).accepts:
        return None
    return build(
        "attacks",
        name,
        batch_size=2,
        sampling={"steps": 1, "guidance": 2.0, "count": 2, "negative": ""},
    )


def takes_diffusion(group, make):
    return [n for n in names(group) if (obj := make(n)) is not None and "diffusion" in obj.accepts]


@pytest.fixture(scope="module")
def case():
    return tiny_case()


@pytest.mark.parametrize("name", takes_diffusion("immunize", immunizer))
def test_immunizer(name, case):
    method = immunizer(name)
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
@pytest.mark.parametrize("name", takes_diffusion("attacks", attacker))
def test_attacker(name, role, case):
    attack, model = attacker(name), tiny_diffusion()
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


@pytest.mark.parametrize("name", names("erase"))
def test_eraser(name, case):
    eraser = build("erase", name)
    assert isinstance(eraser, Eraser)
    assert eraser.name == name
    assert "diffusion" in eraser.accepts


def test_the_sampling_of_the_scenario_reaches_the_attackers():
    assert build("attacks", "lora").sampling == Sampling(steps=8)
