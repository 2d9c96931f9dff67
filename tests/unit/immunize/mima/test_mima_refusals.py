"""What the concept immunizers refuse, and what they tell when numbers end."""

import dataclasses

import pytest
from hydra.errors import InstantiationException
from mima_examples import LORA, case, preset, run, with_targets

from lab.core.errors import Diverged, UserError

FULL = {"kind": "weights", "scopes": ["attn2"], "lr": [1e-4, 1e-3]}
IMPLICIT = {"method": "implicit"}
DECAYING = {"optimizer": "adamw", "alpha": 1e-3, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("mima", {"lower": {"steps": 0}}, "immunize.inner_loop.steps"),
        ("mima", {"lower": {"alpha": 0.0}}, "immunize.inner_loop.lr"),
        ("mima", {"lower": {"alhpa": 1.0}}, "immunize.inner_loop.alhpa"),
        ("mima", {"lower": {"rank": 0}}, "immunize.inner_loop.rank"),
        ("mima", {"lower": {"rest": "adamw"}}, "immunize.inner_loop.rest"),
        ("mima", {"lower": 3}, "immunize.inner_loop"),
        ("mima", {"hypergradient": {"method": "exakt"}}, "immunize.hypergradient.method"),
        ("mima", {"hypergradient": {"rho": 0.0}}, "immunize.hypergradient.rho"),
        (
            "mima",
            {"hypergradient": {"method": "implicit", "rho": 0.2}},
            "immunize.hypergradient.rho",
        ),
        (
            "mima",
            {
                "hypergradient": {"method": "implicit"},
                "lower": {"optimizer": "adamw", "alpha": 1e-3, "weight_decay": 0.1},
            },
            "immunize.inner_loop.weight_decay",
        ),
        ("mima", {"merge": {"mu": -1.0}}, "immunize.merge.mu"),
        ("mima", {"merge": {"prompts": 0}}, "immunize.merge.prompts"),
        (
            "mima",
            {"attackers": {"lora": {**LORA, "scopes": ["kv"]}}},
            "immunize.attackers.lora.scopes",
        ),
        ("mima", {"hypergradient": IMPLICIT, "lower": {"rank": 4}}, "immunize.inner_loop.rank"),
        (
            "mima",
            {"hypergradient": IMPLICIT, "attackers": {"full": FULL, "low": LORA}},
            "immunize.attackers.low.kind",
        ),
        ("mima", {"target": 1}, "immunize.target"),  # read with concepts=single only, and so on
        ("mima", {"k_max": 5}, "immunize.k_max"),
        ("mima", {"hypergradient": {"last": 2}}, "immunize.hypergradient.last"),
        ("mima", {"hypergradient": {"solver": "neumann"}}, "immunize.hypergradient.solver"),
        ("mima", {"hypergradient": {"rho": 0.01}}, "immunize.hypergradient.rho"),
        (
            "mima_first_order",
            {"hypergradient": {"product": "forward"}},
            "immunize.hypergradient.product",
        ),
        (
            "mima_first_order",
            {"hypergradient": {"recompute": True}},
            "immunize.hypergradient.recompute",
        ),
        ("mima", {"lower": {"weight_decay": 0.3}}, "immunize.inner_loop.weight_decay"),
        ("mima", {"attackers": {"full": FULL}, "lower": {"alpha": 1.0}}, "immunize.inner_loop.lr"),
        ("mima", {"attackers": {"full": FULL}, "lower": {"rank": 4}}, "immunize.inner_loop.rank"),
        ("mima", {"w_prior": 0.0, "prior": "class"}, "immunize.prior"),
        ("mima", {"merge": {"sparsity": 0.1}}, "immunize.merge.sparsity"),
        ("joint", {"merge": {"rule": "gated"}}, "immunize.merge.rule"),
        ("imma", {"merge": {"scope": "attention"}}, "immunize.merge.scope"),
        (
            "mima_deep",
            {"merge": {"rule": "mean"}},
            "immunize.merge.rule",
        ),  # every attacked copy is looked at alone
        ("mima_deep", {"w_benign": 0.0, "benign": "regret"}, "immunize.benign"),
        ("mima", {"lr": -1e-4}, "immunize.lr"),
        ("mima", {"cap": 0.0}, "immunize.cap"),
        ("mima", {"steps": 0}, "immunize.steps"),
        ("mima", {"interpolation": 0.0}, "immunize.interpolation"),
        ("mima", {"optimizer": "sgd", "weight_decay": 0.5}, "immunize.weight_decay"),
        ("mima_deep", {"interpolation": 1.1}, "immunize.interpolation"),
        ("mima", {"scope": "attn3"}, "immunize.scope"),
        ("mima", {"concepts": "merge"}, "immunize.concepts"),
        ("mima_deep", {"k_min": 0}, "immunize.k_min"),
        ("mima_deep", {"k_min": 5, "k_max": 4}, "immunize.k_min"),
        (
            "mima_deep",
            {"attackers": {"lora": {**LORA, "lr": [0.0, 1e-3]}, "kv": None, "full": None}},
            ".lora.lr",
        ),
        (
            "mima_deep",
            {"attackers": {"lora": None, "kv": None, "full": None}},
            "immunize.attackers",
        ),
        ("mima_deep", {"attackers": {"lora": {"words": 9}}}, "immunize.attackers.lora.words"),
        ("mima_deep", {"at": [0.0]}, "immunize.at"),
        ("mima_deep", {"evaluate": ["mine"]}, "immunize.evaluate"),
        ("mima_deep", {"prior_ramp": 0.5}, "immunize.prior_ramp"),
        ("mima_deep", {"merge": {"rule": "gated"}}, "immunize.merge.rule"),
        (
            "compose",
            {"merge": {"rule": "gated"}},
            "immunize.merge.rule",
        ),  # nothing trains what would be learned
    ],
)
def test_options_that_cannot_work_name_their_key(name, changes, key):
    with pytest.raises(
        Exception, match="immunize"
    ) as found:  # hydra wraps what a constructor raises
        preset(name, **changes)
    error = found.value if isinstance(found.value, UserError) else found.value.__cause__
    assert isinstance(error, UserError)
    assert error.key.endswith(key)


def test_implicit_takes_attackers_that_move_weights():
    """Only what can be drawn counts."""
    families = {"full": FULL, "lora": {**LORA, "share": 0.0}, "none": None}
    method = preset("mima", hypergradient=IMPLICIT, attackers=families)
    assert {key: f.kind for key, f in method.drawn.families.items()} == {
        "immunize.attackers.full": "weights"
    }
    steep = {"sgd": {"kind": "weights", "scopes": ["attn2"], "lr": [1.0, 30.0], "optimizer": "sgd"}}
    with pytest.raises(
        InstantiationException, match=r"hypergradient.rho=0.1: .*immunize.attackers.sgd.lr"
    ):
        preset("mima", hypergradient={**IMPLICIT, "rho": 0.1}, attackers=steep)
    preset("mima", hypergradient={**IMPLICIT, "rho": 0.05}, attackers=steep)


def test_cases_that_cannot_be_immunized():
    target = case().targets[0]
    poor = dataclasses.replace(
        target, own=dataclasses.replace(target.own, images=target.own.images[:1], prompts=("a",))
    )
    method = preset("mima")
    with pytest.raises(UserError, match=r"mosaic has 1 picture\(s\)"):
        method.check((with_targets([poor]),))
    with pytest.raises(UserError, match=r"mosaic has 1 picture\(s\)"):
        run(method, on=with_targets([poor]))
    with pytest.raises(UserError, match="no target"):
        run(method, on=with_targets([]))
    with pytest.raises(UserError, match=r"immunize\.target"):
        run(preset("imma", target=2))
    method.check((case(),))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mima_first_order", {"lower": {"alpha": 1e30}}),
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
def test_nan_in_the_first_lower_step_is_a_divergence(name, changes):
    with pytest.raises(Diverged, match="first step"):
        run(preset(name, **changes))
