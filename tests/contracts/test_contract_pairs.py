"""Immunizers × attackers that fit them: the attack starts at the immunized weights, and leaves them
alone.
"""

from functools import cache

import pytest
import test_contracts as features
import tiny
from presets import build, param, problem

from lab.core.types import Budget


def attack_features(attacker, kind, model):
    task = features.attacked_problem(attacker, kind)[1].harmful[0]
    budget = Budget(horizon=2, multiple=1, points=3)
    return features.launch(build("attacks", attacker, kind), model, task, budget).values


@cache
def attack_baseline(attacker, kind):
    return attack_features(attacker, kind, problem(kind)[0])


@pytest.mark.parametrize(
    ("name", "kind"), [param("immunize", *choice) for choice in features.choices("immunize")]
)
def test_features(name, kind):
    model, case = problem(kind)
    after = build("immunize", name, kind)(model, case, seed=0, checkpoint=None, log=tiny.no_log)
    for attacker in (a for a, of in features.choices("attacks") if of == kind):
        values, baseline = attack_features(attacker, kind, after), attack_baseline(attacker, kind)
        if name == "none":
            assert values == baseline, attacker
        else:  # whitening and Newton's step end alike, but their loss is of the immunized features
            assert values != baseline or attacker in ("probe_newton", "probe_whitening"), attacker
