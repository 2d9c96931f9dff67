"""The deep inner loop: reduction to MIMA, oracles for its parts, what is drawn, what is kept."""

from functools import cache

import pytest
import torch
from mima_examples import attacker, case, objective, preset, with_targets
from tiny_diffusion import tiny_diffusion

from immunize.mima.deep import InnerAttack
from immunize.mima.inner_loop import AttackerOptions
from immunize.mima.sampling import Pool
from lab.models.diffusion import Text

alone = cache(lambda: with_targets(case().targets[:1]))
NONE = {"kv": None, "full": None}
ALONE = {"evaluate": ["own"], "w_prior": 0.0, "w_distill": 0.0, "w_benign": 0.0, "cap": None}


def deep(**changes):
    """The preset without decoys, offline with two marks unless told otherwise: a gradient then sees
    a whole attack.
    """
    rest = {
        "online": False,
        "at": [0.5, 1.0],
        "w_decoy": 0.0,
        "benign": "regret" if changes.get("w_benign", 1.0) else "loss",
    }
    return preset("mima_deep", **{**rest, **changes})


def test_one_sgd_step_without_extras_is_mima_first_order():
    """K = 1, SGD on Π_l, no cap, no benign term, no distillation, no decoys, the prior at θ̂: the
    same gradient.

    First order only: the deep inner loop never differentiates through its steps.
    """
    exact = tiny_diffusion(dtype=torch.float64)
    mima, theta = objective(preset("mima_first_order", inner_loop={"lr": 0.5}), exact)
    plain = deep(
        attackers={
            "sgd": {"kind": "weights", "scopes": ["attn2"], "lr": 0.5, "optimizer": "sgd"},
            "lora": None,
            **NONE,
        },
        k_min=1,
        k_max=1,
        at=[1.0],
        evaluate=["merged"],
        w_benign=0.0,
        w_distill=0.0,
        w_decoy=0.0,
        w_prior=3.0,
        prior_at="adapted",
    )
    made, other = objective(plain, exact)
    expected, _ = mima.gradient(theta, 4)
    found, _ = made.gradient(other, 4)
    size = max(float(g.abs().max()) for g in expected.values())
    assert size > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * size)


def _moved(factor: float, **changes):
    """Gradient and figures of an objective with nothing but a target and a benign concept, at
    factor · θ_0.
    """
    base = {"evaluate": ["own"], "w_prior": 0.0, "w_distill": 0.0, "cap": None}
    made, theta = objective(deep(**{**base, **changes}), on=alone())
    with torch.no_grad():
        for name in made.outer_names:
            theta[name].mul_(factor)
    return made.gradient(theta, 4)


@pytest.mark.parametrize("online", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_regret_is_the_benign_loss_against_the_original_after_the_same_attack(online):
    """None at θ_0; where the model learns the concept worse than the original, the gradient is the
    loss's own.
    """
    at = {"online": online, "at": [0.5, 1.0]}
    alone, _ = _moved(1.0, w_benign=0.0, **at)
    start, values = _moved(1.0, w_benign=2.0, **at)
    assert values["benign_regret"] == 0
    torch.testing.assert_close(start, alone, rtol=0, atol=0)
    worse, values = _moved(3.0, w_benign=2.0, at=[1.0])
    assert values["benign_regret"] > 0
    loss, same = _moved(3.0, w_benign=2.0, benign="loss", at=[1.0])
    assert values["benign_loss"] == same["benign_loss"]
    torch.testing.assert_close(worse, loss, rtol=0, atol=0)


def test_worst_of_follows_the_candidate_with_the_lowest_loss():
    made, theta = objective(deep(worst_of=3, k_min=2, **ALONE), on=alone())
    found, values = made.gradient(theta, 4)
    each = []
    for number in range(3):
        one, other = objective(deep(k_min=2, **ALONE), on=alone())
        attacker = made._candidates(made.concepts[0], 4)[number]
        one._draw = lambda *_, drawn=attacker: drawn
        each.append(one.gradient(other, 4))
    losses = [row["outer_loss"] for _, row in each]
    assert len(set(losses)) == 3
    assert values["outer_loss"] == min(losses)
    expected = each[losses.index(min(losses))][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_cap_stops_the_concept_and_raises_the_prior():
    options = {"evaluate": ["own"], "w_distill": 0.0, "w_benign": 0.0, "w_prior": 1.0}
    made, theta = objective(deep(cap=1e-3, prior_ramp=3.0, **options), on=alone())
    gradient, values = made.gradient(theta, 0)
    only, here = objective(deep(cap=1e6, prior_ramp=1.0, **{**options, "w_prior": 3.0}), on=alone())
    without, there = objective(
        deep(cap=1e6, prior_ramp=1.0, **{**options, "w_prior": 0.0}), on=alone()
    )
    a, b = only.gradient(here, 0)[0], without.gradient(there, 0)[0]
    assert values["prior_factor"] == 3.0  # the prior's gradient alone, three times
    prior = {name: a[name] - b[name] for name in a}
    torch.testing.assert_close(gradient, prior, rtol=1e-3, atol=1e-5)


def test_online_with_θ_at_rest_sees_the_marks_of_the_same_attacks():
    """The mean over an attack's online gradients is the gradient over all its marks, where θ does
    not move.
    """
    options = {
        "evaluate": ["own"],
        "w_benign": 0.0,
        "w_prior": 0.0,
        "w_distill": 0.0,
        "cap": None,
        "k_min": 4,
        "k_max": 4,
        "at": [0.5, 1.0],
    }
    whole, theta = objective(deep(**options), on=alone())
    online, other = objective(deep(online=True, **options), on=alone())
    for made in (whole, online):  # batches are numbered by step and mark: take one for all
        first = made.concepts[0].outer.batch(8, 0, "one")
        made.draw_batch = lambda *_, first=first: first
    expected, _ = whole.gradient(theta, 0)
    found = [online.gradient(other, step) for step in (0, 1)]
    assert [values["inner_loop_steps"] for _, values in found] == [2, 4]
    mean = {name: (found[0][0][name] + found[1][0][name]) / 2 for name in expected}
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-6)


# attackers


def pool():
    return Pool(torch.randn(4, 2), Text(torch.zeros(1, 1, 1)), torch.zeros(4, dtype=torch.long), 10)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_lora_step_by_hand(optimizer):
    """From B_0 = 0 the first step moves B alone: B_1 = −α·step(G A_0ᵀ), so the effective weight is
    W + B_1 A_0.
    """
    w = {"w": torch.randn(3, 4, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    g = torch.randn(3, 4, dtype=torch.float64)

    def loss(batch, weights):
        return 100 + (weights["w"] * g).sum()  # positive, as a drop is a share

    one = attacker(rank=2, lr=0.1, optimizer=optimizer)
    running = InnerAttack(loss, w, ("w", "b"), one, pool(), 2, 0, "x")
    a = next(leaf.detach().clone() for leaf in running.leaves if leaf.shape == (2, 4))
    mark = running.advance(1)
    assert list(mark.weights) == ["w"]
    down = g @ a.T
    step = (
        down if optimizer == "sgd" else down / (down.abs() + 1e-8)
    )  # AdamW's first moments cancel but for ε
    torch.testing.assert_close(mark.weights["w"], w["w"] - 0.1 * step @ a)


@pytest.mark.parametrize("rank", [2, None])
def test_an_attack_in_progress_follows_the_weights_it_started_from(rank):
    """What it has added stays added when θ moves; low-rank factors stay what they are."""
    weight, goal = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    w = {"w": weight}

    def loss(batch, weights):
        return (weights["w"] - goal).square().sum()

    three = attacker(rank=rank, lr=0.05, optimizer="adamw", steps=3)
    running = InnerAttack(loss, w, ("w",), three, pool(), 2, 0, "x")
    before = w["w"].clone()
    added = running.advance(2).weights["w"] - before
    assert float(added.abs().max()) > 1e-3
    w["w"].add_(0.5)
    torch.testing.assert_close(running.advance(2).weights["w"], before + 0.5 + added)
    other = InnerAttack(loss, w, ("w",), three, pool(), 2, 0, "x")
    other.load(running.state())
    assert torch.equal(running.advance(3).weights["w"], other.advance(3).weights["w"])


def test_attackers_are_drawn_from_their_ranges():
    families = {
        "lora": {
            "kind": "lora",
            "share": 0.5,
            "scopes": ["attn2", "all"],
            "ranks": [4, 16],
            "lr": [5e-4, 4e-3],
        },
        "full": {
            "kind": "weights",
            "share": 0.5,
            "scopes": ["all"],
            "lr": [1e-4, 4e-4],
            "templates": "description",
        },
        "never": {"kind": "weights", "share": 0.0, "scopes": ["kv"], "lr": 1.0},
    }
    families["lora"] |= {"templates": ["name", "token"], "words": 3}
    drawn = AttackerOptions(attackers=families, k_min=2, k_max=40)
    all_of_them = [drawn.draw(0, i) for i in range(400)]
    lora = [a for a in all_of_them if a.settings.rank]
    assert 0.4 < len(lora) / len(all_of_them) < 0.6
    assert {a.settings.rank for a in lora} == set(range(4, 17))
    assert {a.settings.scope for a in lora} == {"attn2", "all"}
    assert {a.settings.steps for a in all_of_them} == set(range(2, 41))
    assert {a.template for a in lora} == {"name", "token 0", "token 1", "token 2"}
    assert {a.template for a in all_of_them if not a.settings.rank} == {"description"}
    rates = torch.tensor([a.settings.lr for a in lora]).log()
    assert 5e-4 <= rates.min().exp() < rates.max().exp() <= 4e-3
