"""Every immunizer × every attacker that fits it: the attack starts at the immunized weights, and
leaves them alone.
"""

from __future__ import annotations

import pytest
import test_contracts as features
import test_contracts_diffusion as concepts
import tiny
import torch
from tiny_diffusion import tiny_case, tiny_diffusion

from lab.core.types import Budget

FEATURES = list(features.cases(features.IMMUNIZERS, features.immunizer))
CONCEPTS = concepts.takes_diffusion("immunize", concepts.immunizer)
CONCEPT_ATTACKERS = concepts.takes_diffusion("attacks", concepts.attacker)


def check(attack, model, task, budget):
    """The attack leaves ``model`` alone; returns its trajectory."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = attack(model, task, seed=0, budget=budget, checkpoint=None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), attack.name
    assert found.steps[0] == 0, attack.name
    assert all(len(values) == len(found.steps) for values in found.values.values()), attack.name
    assert found.status in ("ok", "diverged"), attack.name
    return found


@pytest.mark.parametrize(("name", "kind"), FEATURES)
def test_features(name, kind):
    model, case = features.problem(kind)
    after = features.immunizer(name)(model, case, seed=0, checkpoint=None, log=tiny.no_log)
    fits = [
        n
        for n, of in features.cases(features.ATTACKERS, lambda n: features.build("attacks", n))
        if of == kind
    ]
    for attacker in fits:
        task = features.attacked_problem(attacker, kind)[1].harmful[0]
        attack = features.attacker(attacker, lr_trials=3)
        found, baseline = (
            check(attack, m, task, Budget(horizon=2, multiple=1, points=3)) for m in (after, model)
        )
        if name == "none":
            assert found.values == baseline.values, attacker
        else:  # whitening and Newton's step end alike, but their loss is of the immunized features
            assert found.values != baseline.values or attacker in (
                "probe_newton",
                "probe_whitening",
            ), attacker


@pytest.mark.parametrize("name", CONCEPTS)
def test_concepts(name):
    case, model = tiny_case(), tiny_diffusion()
    after = concepts.immunizer(name)(model, case, seed=0, checkpoint=None, log=tiny.no_log)
    for attacker in CONCEPT_ATTACKERS:
        found = check(
            concepts.attacker(attacker),
            after,
            case.targets[0],
            Budget(horizon=2, multiple=1, at=(0, 2)),
        )
        assert found.steps == [0, 2], attacker


@pytest.mark.parametrize("name", CONCEPT_ATTACKERS)
def test_a_concept_attack_moves_what_it_declares_and_the_store_gives_it_back(name, tmp_path):
    case, model, copied = tiny_case(), tiny_diffusion(), tiny_diffusion()
    given = tiny_diffusion()
    given.copy = lambda: copied  # the attack trains this one
    task, budget = case.targets[0], Budget(horizon=2, multiple=1, at=(0, 2))
    found = concepts.attacker(name)(given, task, seed=0, budget=budget, checkpoint=None)
    changed = features.moved(model, copied)
    adapters = {k for k in changed if ".lora_" in k}
    own = changed - adapters
    assert own <= {k for k in found.weights if k.startswith("unet.")}
    saved = {
        k.replace(".default.", ".").replace("text_encoders.0.", "text_encoder.") for k in adapters
    }
    assert saved <= found.weights.keys() or name == "curriculum"
    assert bool(own) == (
        name not in ("lora", "lora_fast", "lora_text_encoder", "textual_inversion")
    )
    features.check_round_trip(found, name, model, case, task, tmp_path, budget)
