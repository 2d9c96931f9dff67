"""What the concept immunizers refuse, and what they say when numbers end."""

import dataclasses

import pytest
from hydra.errors import InstantiationException
from mima_examples import LORA, case, preset, run, with_targets
from pydantic import ValidationError

from lab.core.config import user_error
from lab.core.errors import Diverged, UserError

IMPLICIT = {"method": "implicit"}


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [  # one per class of options
        ("mima", {"scope": "attn3"}, "immunize.scope"),
        ("mima", {"inner_loop": {"lr": 0.0}}, "immunize.inner_loop.lr"),
        ("mima", {"inner_loop": {"alpha": 1.0}}, "immunize.inner_loop.alpha"),
        ("mima", {"hypergradient": {"method": "exakt"}}, "immunize.hypergradient.method"),
        ("mima", {"merge": {"mu": -1.0}}, "immunize.merge.mu"),
        ("mima_deep", {"prior_ramp": 0.5}, "immunize.prior_ramp"),
        ("mima_deep", {"attackers": {"lora": {"words": 9}}}, "immunize.attackers.lora.words"),
        ("mima_deep", {"attackers": {"lora": {"lr": [1.0, 0.1]}}}, "immunize.attackers.lora.lr"),
    ],
)
def test_a_wrong_option_is_refused_by_its_key(name, changes, key):
    with pytest.raises(InstantiationException) as caught:
        preset(name, **changes)
    assert isinstance(caught.value.__cause__, ValidationError)
    assert user_error(caught.value.__cause__, "immunize").key == key


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mima", {"inner_loop": {"secondary_optimizer": "adamw"}}, "secondary_optimizer"),
        ("mima", {"hypergradient": IMPLICIT, "inner_loop": {"rank": 4}}, "inner_loop.rank"),
        ("mima", {"hypergradient": IMPLICIT, "attackers": {"low": LORA}}, "kind=weights"),
        ("mima", {"hypergradient": {**IMPLICIT, "rho": 0.2}}, "hypergradient.rho"),
        ("mima", {"attackers": {"lora": {**LORA, "scopes": ["kv"]}}}, "attackers.lora.scopes"),
        ("mima", {"merge": {"rule": "masked"}}, "larger scope"),
        ("mima", {"merge": {"mask": "low_rank"}}, "rule=masked only"),
        ("mima", {"merge": {"sparsity": 0.1}}, "rule=masked with mask=sparse only"),
        ("compose", {"merge": {"rule": "gated"}}, "concepts=composed"),
        ("mima_deep", {"merge": {"rule": "gated"}}, "merge.rule"),
        ("mima_deep", {"k_min": 5, "k_max": 4}, "k_min=5"),
        ("mima_deep", {"attackers": {"lora": None, "kv": None, "full": None}}, "share > 0"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(name, changes, message):
    with pytest.raises(InstantiationException, match=message):
        preset(name, **changes)


def test_cases_that_cannot_be_immunized():
    target = case().targets[0]
    poor = dataclasses.replace(
        target, own=dataclasses.replace(target.own, images=target.own.images[:1], prompts=("a",))
    )
    with pytest.raises(UserError, match="mosaic has 1 image"):
        preset("mima").check((with_targets([poor]),))
    with pytest.raises(UserError, match=r"immunize\.target"):
        run(preset("imma", target=2))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mima_first_order", {"inner_loop": {"lr": 1e30}}),
        (
            "mima_deep",
            {
                "attackers": {
                    "lora": {**LORA, "lr": 1e30, "optimizer": "sgd"},
                    "kv": None,
                    "full": None,
                }
            },
        ),
    ],
)
def test_nan_in_the_first_inner_step_is_a_divergence(name, changes):
    with pytest.raises(Diverged, match="before a second step"):
        run(preset(name, **changes))
