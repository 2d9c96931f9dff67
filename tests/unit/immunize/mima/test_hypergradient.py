"""The hypergradient against autograd through unroll, masks and merge, in float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from bilevel_cases import distance, evaluate, naive, problem

from immunize.mima.inner_loop import InnerLoopOptions
from lab.core.seeding import generator

ATTACKERS = {
    "sgd": InnerLoopOptions(lr=0.5),
    "adamw": InnerLoopOptions(lr=0.01, optimizer="adamw", eps=1e-3, weight_decay=0.01),
    "lora": InnerLoopOptions(lr=8.0, rank=2),
    "lora_adamw": InnerLoopOptions(lr=0.02, optimizer="adamw", eps=1e-3, weight_decay=0.01, rank=2),
}


def cases():
    """Every scope with every attacker and K; slow where more than one of them differs from all, sgd
    and 3.
    """
    for case in product(["all", "kv", "attention", "up"], ATTACKERS, [3, 1]):
        others = sum(value not in ("all", "sgd", 3) for value in case)
        yield pytest.param(*case, marks=[pytest.mark.slow] if others > 1 else [])


@pytest.mark.parametrize(("scope", "attacker", "steps"), cases())
def test_exact_equals_naive_autograd(scope, attacker, steps):
    p = problem(scope)
    settings = replace(ATTACKERS[attacker], steps=steps)
    found = evaluate(p, settings)
    assert distance(found.gradient, naive(p, settings)) < 1e-8
    assert found.cosine < 0.9999  # the Hessian matters here: the oracle is no formality


@pytest.mark.parametrize(
    ("rule", "attacker"),
    [
        ("mean", "sgd"),
        ("masked", "lora_adamw"),
        ("gated", "sgd"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("mean", "lora_adamw"), ("masked", "sgd"), ("gated", "lora_adamw"))
        ),
    ],
)
def test_exact_passes_every_merge_rule(rule, attacker):
    p, settings = problem("attention", rule=rule), replace(ATTACKERS[attacker], steps=2)
    if p.merge.learned is not None:  # fresh ones share alike, which a mean would do too
        with torch.no_grad():
            for i, weight in enumerate(p.merge.learned.parameters.values()):
                weight.add_(torch.randn(weight.shape, generator=generator(i, "learned")).to(weight))
    expected = naive(p, settings)
    assert distance(evaluate(p, settings).gradient, expected) < 1e-8
    assert distance(naive(problem("attention"), settings), expected) > 1e-3


def test_every_concept_has_its_own_attacker():
    """Other weights, other optimizer, other K: each concept's transpose has to take its own
    settings.
    """
    p = problem("kv")
    settings = [ATTACKERS["sgd"], replace(ATTACKERS["lora_adamw"], steps=2)]
    expected = naive(p, settings)
    assert distance(evaluate(p, settings).gradient, expected) < 1e-8
    assert distance(evaluate(p, settings, recompute=True).gradient, expected) < 1e-8
    for other in (settings[::-1], settings[:1] * 2, settings[1:] * 2):
        assert distance(evaluate(p, other).gradient, expected) > 1e-3
