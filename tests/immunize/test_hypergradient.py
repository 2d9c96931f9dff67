"""The hypergradient against autograd through unroll, masks and merge, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bilevel_cases import distance, evaluate, naive, problem

from immunize.lower import Adapter, Lower
from immunize.merge_rows import SCOPES

ATTACKERS = {
    "sgd": Lower(0.5),
    "adamw": Lower(0.01, optimizer="adamw", eps=1e-3),
    "lora": Lower(8.0, adapter=Adapter(2)),
    "lora_adamw": Lower(0.02, optimizer="adamw", eps=1e-3, adapter=Adapter(2)),
}


def cases() -> list[tuple[str, str, int]]:
    """Everything at the smallest and the largest scope; between them every scope with every attacker."""
    ends = [(s, a, k) for s in ("kv", "all") for a in ATTACKERS for k in (1, 2, 3)]
    rest = [x for x in SCOPES if x not in ("kv", "all")]
    return ends + [(s, a, (i + j) % 3 + 1) for i, s in enumerate(rest) for j, a in enumerate(ATTACKERS)]


@pytest.mark.parametrize(("scope", "attacker", "steps"), cases())
def test_exact_equals_naive_autograd(scope, attacker, steps):
    p = problem(scope)
    settings = replace(ATTACKERS[attacker], steps=steps)
    found = evaluate(p, settings, measure=False)
    assert distance(found.gradient, naive(p, settings)) < 1e-8
    assert found.cosine < 0.9999  # the Hessian matters here: the oracle is no formality


def test_every_concept_has_its_own_attacker():
    """Other weights, other optimizer, other K: each concept's transpose has to take its own settings."""
    p = problem("kv")
    settings = [ATTACKERS["sgd"], replace(ATTACKERS["lora_adamw"], steps=2)]
    expected = naive(p, settings)
    assert distance(evaluate(p, settings, measure=False).gradient, expected) < 1e-8
    assert distance(evaluate(p, settings, measure=False, recompute=True).gradient, expected) < 1e-8
    for other in (settings[::-1], settings[:1] * 2, settings[1:] * 2):
        assert distance(evaluate(p, other, measure=False).gradient, expected) > 1e-3
