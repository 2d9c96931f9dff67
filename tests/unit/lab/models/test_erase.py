"""UCE (arXiv 2308.14761) against the formula written out, and what it does to a tiny model."""

import dataclasses

import pytest
import torch
from assertions import same_weights
from pydantic import ValidationError
from tiny_diffusion import tiny_case, tiny_diffusion
from tiny_sd import tiny_pipeline

from lab.core.data import Erasure
from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel, encoded
from lab.models.erase import (
    Uce,
    aligned,
    keys_and_values,
    right_factor,
    rows,
)

MOSAIC = Erasure(
    "mosaic",
    "mosaic",
    ("a fox in the style of mosaic", "mosaic art of a fox", "a fox in mosaic style"),
    ("a photo of a fox", "a photo of a fox", "a photo of a fox"),
    ("a photo of a fox", "a fox in the style of sketch"),
)
NEON = Erasure(
    "neon",
    "neon",
    ("a fox by the neon artist",),
    ("a photo of a fox",),
    ("a lion", "a photo of a fox"),
)


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture(scope="module")
def case():
    return tiny_case()


def erase(model, case, *erased, **options):
    return Uce(**options)(model, dataclasses.replace(case, erased=erased), seed=0)


def draw(n, d, *labels):
    return torch.randn(n, d, generator=generator(0, "erase", *labels), dtype=torch.float64)


# ---- the solve


@pytest.mark.parametrize("keep", [0, 20])
def test_normal_equations(keep):
    """The gradient of the paper's objective (eq. 5), written as a loss, vanishes at W'."""
    d = 24
    c, target, k, w = draw(9, d, "c"), draw(9, d, "t"), draw(keep, d, "k"), draw(7, d, "w")
    p, ridge = 0.3, 0.5
    x = (w @ right_factor(c, target, k, p, ridge)).requires_grad_()
    loss = (
        (c @ x.T - target @ w.T).square().sum()
        + p * (k @ (x - w).T).square().sum()
        + ridge * (x - w).square().sum()
    )
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.norm() <= 1e-10 * w.norm() * (c.norm() ** 2 + k.norm() ** 2)


def test_limits():
    c, target, k = draw(9, 24, "c"), draw(9, 24, "t"), draw(5, 24, "k")
    eye = torch.eye(24, dtype=torch.float64)
    assert torch.equal(right_factor(c[:0], target[:0], k, 0.3, 0.5), eye)
    assert (right_factor(c, c, k, 0.3, 0.5) - eye).norm() < 1e-12
    exact = right_factor(c, target, k[:0], 0, 1e-9)  # nine rows in 24 dimensions can be met
    torch.testing.assert_close(c @ exact.T, target, atol=1e-6, rtol=1e-6)


def test_equals_the_formula_with_an_inverse_for_every_matrix(model, case):
    edited = erase(model, case, MOSAIC, NEON, preserve_weight=0.2, ridge=0.7)
    pairs = [rows(model, e) for e in (MOSAIC, NEON)]
    c, target = (torch.cat(part).double() for part in zip(*pairs, strict=True))
    texts = ["a photo of a fox", "a fox in the style of sketch", "a lion"]  # each once
    k = encoded(model, texts).flatten(0, 1).double()
    inverse = torch.linalg.inv(
        c.T @ c + 0.2 * k.T @ k + 0.7 * torch.eye(c.shape[1], dtype=torch.float64)
    )
    new = keys_and_values(edited.unet)
    for name, weight in keys_and_values(model.unet).items():
        w = weight.double()
        want = ((target @ w.T).T @ c + 0.2 * (k @ w.T).T @ k + 0.7 * w) @ inverse
        torch.testing.assert_close(new[name].double(), want, atol=1e-6, rtol=1e-5)


# ---- the edit


def test_only_keys_and_values_of_cross_attention_move(model, case):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edited = erase(model, case, MOSAIC)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    moved = {
        name
        for name, tensor in edited.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    assert moved == {name for name in before if name.endswith(ends)}


@pytest.mark.parametrize("layout", ["sd2", "xl"])
def test_every_layout(layout, case):
    model = DiffusionModel.from_pipeline(tiny_pipeline(layout))
    old, new = keys_and_values(model.unet), keys_and_values(erase(model, case, MOSAIC).unet)
    assert all(not torch.equal(old[name], new[name]) for name in old)


def test_one_anchor_for_all_and_part_of_what_is_preserved(model, case):
    assert same_weights(
        erase(model, case, MOSAIC, anchor="a photo").unet,
        erase(model, case, dataclasses.replace(MOSAIC, anchors=("a photo",) * 3)).unet,
    )
    assert not same_weights(
        erase(model, case, MOSAIC, anchor="a photo").unet, erase(model, case, MOSAIC).unet
    )
    kept = [dataclasses.replace(MOSAIC, preserve=MOSAIC.preserve[:n]) for n in range(3)]
    for n, less in enumerate(kept):
        assert same_weights(
            erase(model, case, MOSAIC, preserve=n).unet, erase(model, case, less).unet
        )


# ---- rows


def test_positions_are_aligned_at_the_end_token_and_in_the_padding():
    for places, rows_of_anchor in {
        # prompt  S a b C d E p p    anchor  S x y E p p p p      (start 3, ends 5 and 3)
        (3, 5, 3): [1, 2, 3, 6, 7],
        # anchor  S x y z u v E p: its words reach into the prompt's padding
        (3, 5, 6): [4, 5, 6, 7, 7],
        # equal lengths
        (2, 4, 4): [2, 3, 4, 5, 6, 7],
        # a short anchor has no row for every word: its first word stands in
        (1, 6, 2): [1, 1, 1, 1, 1, 2, 7],
        # anchor fills the context: its end token stands in for padding
        (2, 3, 7): [6, 7, 7, 7, 7, 7],
    }.items():
        assert aligned(*places, 8) == rows_of_anchor


def test_rows_run_from_the_first_word_to_the_end_of_the_context(model):
    tokenizer, context = model.tokenizers[0], model.tokenizers[0].model_max_length
    c, target = rows(model, MOSAIC)
    hidden = encoded(model, MOSAIC.prompts)
    first = [
        len(tokenizer(prompt.split("mosaic")[0].strip(), add_special_tokens=False).input_ids) + 1
        for prompt in MOSAIC.prompts
    ]
    assert len(c) == len(target) == sum(context - start for start in first)
    assert torch.equal(c[: context - first[0]], hidden[0, first[0] :])
    assert not torch.isclose(c, target).all(1).any()


# ---- refused


def test_refused(model, case):
    with pytest.raises(UserError, match="has no concept to erase; use erase=none"):
        erase(model, case)
    with pytest.raises(UserError, match=r"is not in the .*did you mean mosaic"):
        erase(model, case, dataclasses.replace(MOSAIC, words="mosaik"))
    with pytest.raises(ValidationError, match="ridge"):
        Uce(ridge=0)
