"""The merge against the optimum of its stated problem, its transpose, and where its rows come
from.
"""

from functools import partial
from typing import get_args

import pytest
import torch
from bilevel_cases import CAPTIONS, batches, micro_model, problem

from immunize.merge.build import (
    Scope,
    concept_rows,
    distinct_rows,
    group_of,
    record_inputs,
    regularizer_rows,
    scope_names,
)
from immunize.merge.closed_form import Merge, MergeAccumulator, factorize
from immunize.merge.learned import LearnedWeights, learn
from lab.core.errors import Diverged, UserError
from lab.core.seeding import generator
from lab.models.diffusion import word_positions

DRAW = partial(torch.randn, generator=generator(0, "merge"), dtype=torch.float64)
OUT, D = 7, 12
C = (DRAW(3, D), DRAW(2, D))
REGULAR = DRAW(40, D)
BASE = {"k": DRAW(OUT, D), "kernel": DRAW(OUT, 3, 2, 2), "other": DRAW(OUT)}
ADAPTED = [{x: y + 0.1 * DRAW(y.shape) for x, y in BASE.items()} for _ in C]


def closed(lam: float = 0.0, mu: float = 0.0, regular: torch.Tensor = REGULAR) -> Merge:
    factors = {"text": factorize(C, regular, lam=lam, mu=mu)}
    return Merge(2, factors, {"k": "text", "kernel": "text"})


def learned(kind) -> Merge:
    weights = LearnedWeights({x: BASE[x] for x in ("k", "kernel")}, 2, kind, rank=2)
    weights.parameters = {x: y + 0.1 * DRAW(y.shape) for x, y in weights.parameters.items()}
    return Merge(2, learned=weights)


def every_merge() -> dict[str, Merge]:
    return {
        "closed": closed(),
        "soft": closed(0.3, 0.2),
        "mean": Merge(2),
        "sparse": learned("sparse"),
        "low_rank": learned("low_rank"),
        "gate": learned("gate"),
    }


# the linear map


@pytest.mark.parametrize("rows", [40, 6])  # 6 < d: the R × R system
@pytest.mark.parametrize(("lam", "mu"), [(0, 0), (0.5, 0), (0, 0.3), (0.5, 0.3)])
def test_is_the_optimum_of_its_stated_problem(rows, lam, mu):
    """KKT: the gradient of the objective lies in the rows of C (μ = 0: and X Cᵀ = V), relative to
    ‖W_n − W‖.
    """
    if rows < D and lam == 0:
        with pytest.raises(UserError, match=r"merge\.lam"):
            closed(lam, mu, REGULAR[:rows])
        return
    regular, c = REGULAR[:rows], torch.cat(C)
    merge = closed(lam, mu, regular)
    found = merge(BASE, ADAPTED)
    for name in ("k", "kernel"):
        w, x = BASE[name].flatten(1), found[name].flatten(1)
        v = torch.cat(
            [a[name].flatten(1) @ rows_n.T for a, rows_n in zip(ADAPTED, C, strict=True)], 1
        )
        slope = (x - w) @ (regular.T @ regular) + lam * (x - w)
        if mu:
            residual = slope + (x @ c.T - v) @ c / mu
        else:
            multipliers = torch.linalg.lstsq(c.T, slope.T).solution
            residual = torch.cat([slope - multipliers.T @ c, x @ c.T - v], 1)
        assert float(residual.norm() / slope.norm()) < 1e-10
    assert torch.allclose(
        found["other"], (ADAPTED[0]["other"] + ADAPTED[1]["other"]) / 2, rtol=1e-14
    )
    gap = merge.report["constraint_residual"]
    assert gap < 1e-12 if mu == 0 else 1e-3 < gap < 1


@pytest.mark.parametrize("kind", every_merge())
def test_adjoint_is_the_transpose(kind):
    """⟨Merge(x) − Merge(0), y⟩ = ⟨x, Mergeᵀ y⟩, and equal arguments come out as they went in."""
    merge = every_merge()[kind]
    y = {x: DRAW(z.shape) for x, z in BASE.items()}
    direct, parts = merge.adjoint_direct(y), [merge.adjoint_part(y, n) for n in range(2)]
    zero = {x: torch.zeros_like(z) for x, z in BASE.items()}
    assert all(bool((z == 0).all()) for z in merge(zero, [zero, zero]).values())
    left = sum(float((merge(BASE, ADAPTED)[x] * y[x]).sum()) for x in BASE)
    pairs = zip((BASE, *ADAPTED), (direct, *parts), strict=True)
    right = sum(float((a[x] * part[x]).sum()) for a, part in pairs for x in BASE)
    assert left == pytest.approx(right, rel=1e-12)
    torch.testing.assert_close(merge(BASE, [BASE, BASE]), BASE, rtol=1e-13, atol=0)
    whole = {x: direct[x] + parts[0][x] + parts[1][x] for x in BASE}
    torch.testing.assert_close(whole, y, rtol=1e-12, atol=1e-14)


def test_float32_merges_tiny_changes_accurately():
    """W_n − W of relative size 1e-6, as an α of the paper gives: the change itself keeps five
    digits.
    """
    single = {x: y.float() for x, y in BASE.items()}
    moved = [{"k": single["k"] + 1e-6 * DRAW(OUT, D).float()} for _ in C]
    exact = closed()({"k": single["k"].double()}, [{"k": m["k"].double()} for m in moved])["k"]
    factors = factorize(C, REGULAR).to(single["k"])
    running = MergeAccumulator(Merge(2, {"text": factors}, {"k": "text"}), single)
    for n, some in enumerate(moved):
        running.add(n, running.contribution(n, some))
    change = torch.cat([running.thin["k"][n] for n in range(2)], 1) @ torch.cat(factors.lefts)
    expected = exact - single["k"].double()
    assert float((change - expected).norm() / expected.norm()) < 1e-5


def test_repeats_bit_for_bit_and_reports_conditioning():
    assert all(torch.equal(closed()(BASE, ADAPTED)[x], closed()(BASE, ADAPTED)[x]) for x in BASE)
    report = closed().report
    s = torch.linalg.svdvals(REGULAR)
    assert report["cond_regularizer"] == pytest.approx(float((s[0] / s[-1]) ** 2), rel=1e-10)
    c = torch.cat(C)
    inner = torch.linalg.eigvalsh(c @ torch.linalg.inv(REGULAR.T @ REGULAR) @ c.T)
    assert report["cond_constraint"] == pytest.approx(float(inner[-1] / inner[0]), rel=1e-9)
    assert 1 < report["effective_rank"] <= 5


# ── where the rows come from


def test_concept_rows_are_those_of_the_words():
    """The encoder is causal: changing the words changes their rows and nothing before them."""
    model = micro_model()
    prompt = "a painting of a fox in the style of mosaic"
    places = word_positions(model, prompt, "mosaic")
    ids = model.tokens([prompt])[0, places].tolist()
    assert model.tokenizers[0].decode(ids).strip() == "mosaic"
    hidden, other = (model.text([t]).hidden[0] for t in (prompt, prompt.replace("mosaic", "neon")))
    assert torch.allclose(hidden[: places[0]], other[: places[0]])
    assert not torch.allclose(hidden[places[0]], other[places[0]])
    rows, _ = concept_rows(model, [prompt, prompt, "a fox in mosaic style"], "mosaic")
    assert torch.allclose(rows[: len(places)], hidden[places])
    assert len(rows) == 2 * len(places)  # equal rows once
    assert regularizer_rows(model, CAPTIONS).shape == (len(CAPTIONS) * 32, 32)


def test_shared_rows_go_and_a_concept_of_shared_rows_needs_mu(caplog):
    both = DRAW(1, D)
    first = torch.cat([DRAW(3, D), both]), ["big", "red", "fox", "style"]
    second = torch.cat([both, DRAW(1, D)]), ["style", "cat"]
    found, dropped = distinct_rows([first, second])
    assert [len(x) for x in found] == [3, 1]
    assert dropped == ["style"]
    assert "leaves out the rows of style" in caplog.text
    with pytest.raises(UserError, match=r"merge\.mu.*style"):
        distinct_rows([first, (both, ["style"])])
    soft, _ = distinct_rows([first, (both, ["style"])], mu=0.1)
    assert "concept 2 shares all its tokens (style)" in caplog.text
    assert "mu=0.1" in caplog.text
    assert [len(x) for x in soft] == [3, 1]


def test_scopes_are_nested_and_named_after_the_unet():
    unet = micro_model().unet
    found = {scope: set(scope_names(unet, scope)) for scope in get_args(Scope)}
    assert found["kv"] < found["qkv"] < found["attn2"] < found["attention"] < found["all"]
    assert found["down"] | found["up"] < found["all"]
    assert len(found["qkv"]) == 3 * len(found["kv"]) // 2
    assert all(".attn2.to_k." in x or ".attn2.to_v." in x for x in found["kv"])


def test_recorded_inputs_are_what_the_weights_multiply():
    """Rows times the weight, plus bias, are rows of the layer's output, for matrices and kernels
    alike.
    """
    model = micro_model()
    shapes = dict(model.unet.named_parameters())
    names = [x for x in shapes if shapes[x].dim() > 1 and "time_emb" not in x]
    data = batches(model, ("mosaic",), 1)[0]
    rows = record_inputs(model, names, data, 5, 0)
    modules, outputs = dict(model.unet.named_modules()), {}
    for name in names:
        owner = name.rsplit(".", 1)[0]
        modules[owner].register_forward_hook(
            lambda m, a, out, owner=owner: outputs.update({owner: out})
        )
    z, text, noise, t = data[0]
    model.predict(model.noised(z, noise, t)[0], t, text)
    for name in names:
        owner = name.rsplit(".", 1)[0]
        module, out = modules[owner], outputs[owner].detach()
        flat = (
            out.flatten(2).transpose(1, 2).flatten(0, 1)
            if module.weight.dim() == 4
            else out.flatten(0, -2)
        )
        bias = 0 if module.bias is None else module.bias
        made = rows[group_of(name)] @ module.weight.detach().flatten(1).T + bias
        assert float((made[:, None] - flat).norm(dim=2).min(1).values.max()) < 1e-9
        module._forward_hooks.clear()


@pytest.mark.parametrize("scope", ["attention", "all"])
def test_constraints_hold_on_recorded_inputs(scope):
    """X C_nᵀ = W_n C_nᵀ for the very inputs of concept n, at every layer in scope; the rest is the
    mean.
    """
    p = problem(scope)
    base = dict(p.theta)
    moved = [{x: y + 0.1 * DRAW(y.shape) for x, y in base.items()} for _ in range(2)]
    found = p.merge(base, moved)
    assert set(p.merge.members) <= set(scope_names(p.model.unet, scope))
    for name, value in found.items():
        factors = p.merge.factors_of(name)
        if factors is None:
            torch.testing.assert_close(
                value, (moved[0][name] + moved[1][name]) / 2, rtol=1e-12, atol=1e-13
            )
            continue
        for n, c in enumerate(factors.rights):
            left, right = value.flatten(1) @ c, moved[n][name].flatten(1) @ c
            assert float((left - right).norm() / right.norm()) < 1e-7


# learned weights


def quadratic(n: int):
    return lambda p: sum(
        (p[x] - ADAPTED[n][x]).square().mean() * (3 if n else 1) for x in ("k", "kernel")
    )


@pytest.mark.parametrize("kind", ["sparse", "low_rank", "gate"])
def test_learned_weights_start_at_the_mean_and_lower_their_loss(kind):
    merge = Merge(2, learned=LearnedWeights({x: BASE[x] for x in ("k", "kernel")}, 2, kind, rank=2))
    mean = {x: (ADAPTED[0][x] + ADAPTED[1][x]) / 2 for x in BASE}
    torch.testing.assert_close(merge(BASE, ADAPTED), mean, rtol=1e-12, atol=1e-13)
    before = {x: y.clone() for x, y in merge.learned.parameters.items()}  # type: ignore[union-attr]
    losses = [quadratic(0), quadratic(1)]
    start = sum(loss(merge(BASE, ADAPTED)) for loss in losses)
    learn(merge.learned, merge, BASE, ADAPTED, losses, steps=20, lr=0.02)
    assert sum(loss(merge(BASE, ADAPTED)) for loss in losses) < start
    after = merge.learned.parameters  # type: ignore[union-attr]
    assert any(not torch.equal(after[x], before[x]) for x in before)
    assert not any(x.requires_grad for x in after.values())


def test_sparsity_gives_exact_zeros():
    merge = Merge(2, learned=LearnedWeights({"k": BASE["k"]}, 2, "sparse"))
    base, moved = {"k": BASE["k"]}, [{"k": a["k"]} for a in ADAPTED]
    loss = lambda p: p["k"].square().mean()  # noqa: E731
    learn(merge.learned, merge, base, moved, [loss], steps=40, lr=0.02, sparsity=0.5)
    assert 0 < merge.learned.density() < 1
    with pytest.raises(Diverged):
        learn(merge.learned, merge, base, moved, [lambda p: loss(p) * float("nan")])
