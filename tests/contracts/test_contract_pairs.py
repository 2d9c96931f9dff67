"""Immunizers × attackers that fit them: the attack starts at the immunized weights, and leaves them
alone.
"""

from __future__ import annotations

from functools import cache

import pytest
import test_contracts as features
import test_contracts_diffusion as concepts
import tiny
import torch
from presets import build, problem
from tiny_diffusion import tiny_case, tiny_diffusion

from lab.core.types import Budget

CONCEPT_ATTACKERS = concepts.choices("attacks")


def check(attack, model, task, budget):
    """The attack leaves ``model`` alone; returns its trajectory."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = attack(model, task, seed=0, budget=budget, checkpoint=None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), attack.name
    assert found.steps[0] == 0, attack.name
    assert all(len(values) == len(found.steps) for values in found.values.values()), attack.name
    assert found.status in ("ok", "diverged"), attack.name
    return found


def attack_features(attacker, kind, model):
    task = features.attacked_problem(attacker, kind)[1].harmful[0]
    budget = Budget(horizon=2, multiple=1, points=3)
    return check(build("attacks", attacker, kind), model, task, budget).values


@cache
def attack_baseline(attacker, kind):
    return attack_features(attacker, kind, problem(kind)[0])


@pytest.mark.parametrize(("name", "kind"), features.choices("immunize"))
def test_features(name, kind):
    model, case = problem(kind)
    after = build("immunize", name, kind)(model, case, seed=0, checkpoint=None, log=tiny.no_log)
    for attacker in (a for a, of in features.choices("attacks") if of == kind):
        values, baseline = attack_features(attacker, kind, after), attack_baseline(attacker, kind)
        if name == "none":
            assert values == baseline, attacker
        else:  # whitening and Newton's step end alike, but their loss is of the immunized features
            same = attacker in ("probe_newton", "probe_whitening")
            assert values != baseline or same, attacker


def concept_pairs():
    """Immunizers and the attackers of each: a fifth of all pairs, in which every attacker meets
    several immunizers.
    """
    for i, name in enumerate(concepts.choices("immunize")):
        yield pytest.param(name, CONCEPT_ATTACKERS[i % 5 :: 5], id=name)


@pytest.mark.parametrize(("name", "attackers"), concept_pairs())
def test_concepts(name, attackers):
    case, model = tiny_case(), tiny_diffusion()
    immunizer = build("immunize", name, "diffusion")
    after = immunizer(model, case, seed=0, checkpoint=None, log=tiny.no_log)
    for attacker in attackers:
        attack = build("attacks", attacker, "diffusion")
        found = check(attack, after, case.targets[0], Budget(horizon=2, multiple=1, at=(0, 2)))
        assert found.steps == [0, 2], attacker


@pytest.mark.parametrize("name", CONCEPT_ATTACKERS)
def test_a_concept_attack_moves_what_it_declares_and_the_store_gives_it_back(name, tmp_path):
    case, model, copied = tiny_case(), tiny_diffusion(), tiny_diffusion()
    given = tiny_diffusion()
    given.copy = lambda: copied  # the attack trains this one
    task, budget = case.targets[0], Budget(horizon=2, multiple=1, at=(0, 2))
    found = build("attacks", name, "diffusion")(given, task, seed=0, budget=budget, checkpoint=None)
    changed = features.moved(model, copied)
    adapters = {k for k in changed if ".lora_" in k}
    own = {k for k in changed - adapters if k in model.state_dict()}
    assert own <= {k for k in found.weights if k.startswith("unet.")}
    saved = {
        k.replace(".default.", ".").replace("text_encoders.0.", "text_encoder.") for k in adapters
    }
    assert saved <= found.weights.keys() or name == "curriculum"
    adds_only = ("textual_inversion", "controlnet", "ip_adapter")
    adds = (name.startswith("lora") and name != "lora_canonical") or name in adds_only
    assert bool(own) != adds
    features.check_round_trip(found, name, model, case, task, tmp_path, budget)
