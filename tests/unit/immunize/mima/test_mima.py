"""Every preset against the contract, and the identities that hold between them."""

from functools import cache

import pytest
import torch
from assertions import same_weights
from attack_examples import MemoryCheckpoint, interrupted
from marks import with_slow
from mima_examples import (
    LORA,
    PRESETS,
    case,
    model,
    moved,
    objective,
    preset,
    rows_of,
    run,
    with_targets,
)
from tiny_diffusion import tiny_diffusion

from immunize.merge.build import MergeOptions, build_merge
from immunize.mima.hypergradient import hypergradient
from immunize.mima.outer_loop import naming_prompts
from lab.core.seeding import derive

FULL = {"kind": "weights", "scopes": ["attn2"], "lr": [1e-4, 1e-3]}
SEED = 1  # of draws whose kind, K and captions differ from concept to concept


plain = cache(lambda name: rows_of(preset(name)))  # read only


@pytest.mark.parametrize(
    "name",
    with_slow(PRESETS, ("joint", "imma", "compose", "mima_released")),
)
def test_a_preset_moves_only_its_scope_and_logs_every_step(name):
    after, rows = plain(name)
    assert moved(after, model()) == {
        f"unet.{k}" for k, _ in model().unet.named_parameters() if ".attn2." in k
    }
    if name == "compose":  # two trainings, and the merge of their results
        *rows, merged = rows
        assert merged[0] == 4
    assert [step for step, _ in rows] == list(range(4 if name == "compose" else 2))
    for _, values in rows:
        logged = {"outer_loss", "prior_loss", "gradient_norm"}
        logged |= (
            {"benign_loss", "distill_loss", "inner_loop_steps"}
            if name == "mima_deep"
            else {"inner_loop_drop"}
        )
        assert logged <= set(values)
    compared = name not in ("mima_deep", "mima_first_order", "mima_released")
    assert all(("cosine" in values) == compared for _, values in rows)


def test_comparing_with_adaptation_alone_changes_no_other_figure():
    _, compared = rows_of(preset("mima", hypergradient={"compare_own": True}))
    assert all(-1 <= values.pop("cosine_own") <= 1 for _, values in compared)
    assert compared == plain("mima")[1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mima", {"merge": {"rule": "gated"}, "hypergradient": {"method": "first_order"}}),
        pytest.param("mima_released", {}, marks=pytest.mark.slow),
        pytest.param(
            "compose", {"hypergradient": {"method": "first_order"}}, marks=pytest.mark.slow
        ),
        pytest.param("mima_deep", {}, marks=pytest.mark.slow),  # online resumes all of it
        ("mima_deep", {"online": True}),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(name, changes):
    method, whole = preset(name, checkpoint_every=1, **changes), MemoryCheckpoint()
    after, rows = rows_of(method, checkpoint=whole, seed=5)
    middle = 3 if name == "compose" else 1  # compose: within its second run
    for fail_at in (middle, whole.saves):
        again, repeated = interrupted(
            lambda kept: rows_of(method, checkpoint=kept, seed=5), fail_at
        )
        assert same_weights(again, after)
        assert repeated == rows


@pytest.mark.parametrize(
    "name", ["mima_first_order", pytest.param("compose", marks=pytest.mark.slow)]
)
def test_interpolated_weights_lie_between_the_given_model_and_the_trained_one(name):
    trained, third = run(preset(name, steps=1)), run(preset(name, steps=1, interpolation=1 / 3))
    ends, starts = trained.state_dict(), model().state_dict()
    between = {key: start + (ends[key] - start) / 3 for key, start in starts.items()}
    torch.testing.assert_close(dict(third.state_dict()), between)
    assert moved(third, model()) == moved(trained, model())


def test_mima_with_one_concept_is_imma():
    both, alone = case(), with_targets(case().targets[1:])
    assert same_weights(run(preset("mima"), on=alone), run(preset("imma", target=1), on=both))


def test_compose_is_the_merge_of_immas():
    fast = {"hypergradient": {"method": "first_order"}}
    after = run(preset("compose", **fast), seed=3)
    alone = [
        dict(run(preset("imma", target=n, **fast), seed=3).unet.named_parameters()) for n in (0, 1)
    ]
    targets = [(naming_prompts(model(), c, 4), c.words) for c in case().targets]
    merged = build_merge(model(), targets, case().regularizers, MergeOptions(lam=1.0, mu=1e-6))(
        dict(model().unet.named_parameters()),
        [{k: v for k, v in one.items() if ".attn2." in k} for one in alone],
    )
    torch.testing.assert_close(dict(after.unet.named_parameters()), merged, rtol=1e-6, atol=1e-7)


def test_released_alternates_merged_weights_and_adamw():
    """With β → 0: θ is the merge of α-steps on key and value, and one AdamW step on queries and
    outputs.
    """
    after = run(
        preset(
            "mima_released",
            steps=1,
            lr=1e-30,
            weight_decay=0.0,
            inner_loop={"lr": 1e-2, "weight_decay": 0.0},
        )
    )
    start = dict(model().unet.named_parameters())
    change = {name: (value - start[name]) for name, value in after.unet.named_parameters()}
    for name, value in change.items():
        if ".attn2.to_q" in name or name.endswith("attn2.to_out.0.weight"):
            # the first step of AdamW moves every entry by its rate, up to ε
            assert value.abs().max() <= 1.0001e-2
            assert (value.abs() > 0.9e-2).double().mean() > 0.9
        elif ".attn2.to_k" in name or ".attn2.to_v" in name:
            assert 0 < value.abs().max() < 1e-2
        else:
            assert not value.any()


def test_half_precision_models_train_in_float32_and_stay_half():
    half = tiny_diffusion(dtype=torch.bfloat16)
    after = run(preset("mima_first_order", steps=1, lr=1e-2), of=half)
    assert {p.dtype for p in after.unet.parameters()} == {torch.bfloat16}
    assert moved(after, half)


def test_bfloat16_runs_the_exact_gradient_with_float32_masters():
    _, rows = rows_of(preset("imma", steps=1, precision="bfloat16"))
    _, full = rows_of(preset("imma", steps=1))
    assert rows[0][1]["outer_loss"] == pytest.approx(full[0][1]["outer_loss"], rel=2e-2)
    assert rows[0][1]["gradient_norm"] == pytest.approx(full[0][1]["gradient_norm"], rel=0.2)


def test_drawn_attackers_reach_the_hypergradient(monkeypatch):
    """Every concept's own draw: kind, rate, rank, K, optimizer and captions."""
    lora = {**LORA, "lr": [1e-2, 1e-1], "ranks": [1, 3], "optimizer": "sgd"}
    method = preset("mima", steps=4, attackers={"lora": lora, "full": FULL}, k_max=3)
    made, theta = objective(method, seed=SEED)
    seen = []

    def spy(*given, **options):
        seen.append(given[1])
        return hypergradient(*given, **options)

    monkeypatch.setattr("immunize.mima.method.hypergradient", spy)
    for step in (1, 3):
        made.gradient(theta, step)
        for concept, problem in zip(made.concepts, seen.pop(), strict=True):
            drawn, found = method.draw(SEED, concept.name, step), problem.settings
            assert problem.seed == derive(SEED, "mima", "factors", concept.name, step)
            assert found == drawn.settings
            pool = concept.inner.template(drawn.template)
            batch = pool.batch(2, SEED, concept.name, step, "lower", found.steps - 1)
            assert problem.loss(theta, found.steps - 1) == made.denoiser.loss(batch, theta)
