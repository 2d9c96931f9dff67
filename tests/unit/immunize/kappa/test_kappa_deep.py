"""Deep extractors, resuming, and the heads."""

import pytest
import torch
import torch.nn.functional as F
from assertions import same_weights
from attack_examples import interrupted
from small_cases import TinyNet, deep_case, immunize, linear_case, randn

from immunize.kappa.method import Kappa, KappaImma, KappaOpt
from immunize.kappa.trainer import Head, blocks_by_gradient
from lab.core.condition import condition_number, row_groups
from lab.core.errors import UserError
from lab.core.seeding import derive

BASE = dict(
    lambda_p=1.0, lambda_h=1e-2, scale="current", lr=0.01, steps=12, batch_size=16, supervised=0.1
)
MAKERS = {
    "kappa": lambda **o: Kappa(**(BASE | o)),
    "opt": lambda **o: KappaOpt(**(BASE | {"preconditioned": False, "lambda_h": 1.0} | o)),
    "imma": lambda **o: KappaImma(**({"lr": 1e-2, "steps": 12, "batch_size": 16} | o)),
}


def dense_gradient(case, rows, preconditioned):
    """Gradient of R_well(H_P)·1 through autograd; the dummy layer's inverse as a dense matrix."""
    model = TinyNet().double()
    y = model(case.benign.train.x[rows].double())
    h = y.T @ y
    values = torch.linalg.eigvalsh(h)
    p = int((values > 1e-12 * values[-1]).sum())
    objective = values[-1] ** 2 / 2 - h.square().sum() / (2 * p)
    (by_feature,) = torch.autograd.grad(objective, y, retain_graph=True)
    if preconditioned:
        by_feature = by_feature @ torch.linalg.inv(
            h.detach() + 0.1 * torch.eye(8, dtype=torch.float64)
        )
    y.backward(by_feature)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("preconditioned", [False, True])
def test_step_against_autograd(preconditioned):
    case = deep_case()
    options = dict(lambda_h=0.0, scale="none", supervised=0.0, preconditioned=preconditioned)
    options |= {"ridge_benign": 0.1} if preconditioned else {}
    trainer = MAKERS["kappa"](**options).trainer(TinyNet(), case, 0)
    trainer.descend(0)
    trainer.engine.finish()
    expected = dense_gradient(case, trainer.batch(0, 0), preconditioned)
    for parameter, reference in zip(trainer.engine.parameters, expected, strict=True):
        assert torch.allclose(
            parameter.grad.double(), reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max())
        )


def test_logged_kappa_is_the_grouped_mean():
    case = deep_case(n=250)
    model, _, log = immunize(MAKERS["kappa"](), case, TinyNet())
    features = model(case.benign.train.x).detach()
    groups = row_groups(len(features), seed=derive(0, "groups", 0))
    values = [condition_number(features[rows]) for rows in groups]
    assert log.rows[0]["kappa_benign"] == pytest.approx(sum(values) / 20, rel=1e-5)


def test_layers_that_the_model_lacks_are_refused():
    with pytest.raises(UserError, match=r"immunize\.layers"):
        immunize(MAKERS["kappa"](layers=["lst"]), deep_case(), TinyNet())
    with pytest.raises(UserError, match=r"immunize\.layers=4"):
        immunize(MAKERS["kappa"](layers=4, layer_choice="gradient"), deep_case(), TinyNet())


def test_more_layers_than_have_a_gradient_are_refused():
    model = TinyNet()
    model.blocks.append(torch.nn.Tanh())
    model.block_names = (*model.block_names, "without weights")
    with pytest.raises(UserError, match=r"immunize\.layers=4.*3 blocks"):
        immunize(MAKERS["kappa"](layers=4, layer_choice="gradient"), deep_case(), model)


@pytest.mark.parametrize("layers", [None, ["last"]])
@pytest.mark.parametrize("maker", ["kappa", "imma"])
def test_a_choice_of_layers_needs_a_count(maker, layers):
    with pytest.raises(UserError, match=r"immunize\.layer_choice=gradient"):
        MAKERS[maker](layers=layers, layer_choice="gradient")


def test_choice_of_layers_by_gradient():
    case, model = deep_case(n=100), TinyNet()
    ratios = []
    for task in case.tasks:
        head = Head(task, 8)
        head.fit(model(task.train.x).detach())
        loss = F.cross_entropy(model(task.train.x).double() @ head.w, task.train.y)
        slopes = torch.autograd.grad(loss, tuple(model.parameters()))  # weight and bias by turns
        ratios.append(
            [
                torch.cat([w.flatten(), b]).norm()
                for w, b in zip(slopes[::2], slopes[1::2], strict=True)
            ]
        )
    ranked = (torch.tensor(ratios[1]) / torch.tensor(ratios[0])).argsort(descending=True)
    names = [model.block_names[i] for i in ranked]
    assert blocks_by_gradient(model, case) == names != list(model.block_names[::-1])
    _, trained, _ = immunize(MAKERS["kappa"](layers=1, layer_choice="gradient"), case, model)
    moved = [
        not all(map(torch.equal, a.parameters(), b.parameters()))
        for a, b in zip(trained.blocks, model.blocks, strict=True)
    ]
    assert moved == [name == names[0] for name in model.block_names]


# resume

VARIANTS = {
    "kappa": lambda: MAKERS["kappa"](checkpoint_every=5),
    "adam": lambda: MAKERS["kappa"](checkpoint_every=5, optimizer="adam", lr=1e-3),
    "corridor": lambda: MAKERS["kappa"](
        checkpoint_every=5, lambda_schedule="corridor", lr_schedule="cosine"
    ),
    "running": lambda: MAKERS["kappa"](checkpoint_every=5, spectrum="running"),
    "imma": lambda: MAKERS["imma"](checkpoint_every=5),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["linear", "deep"])
def test_a_killed_job_resumes_bit_for_bit(variant, kind):
    case, model = (linear_case(), None) if kind == "linear" else (deep_case(), TinyNet())
    _, expected, expected_log = immunize(VARIANTS[variant](), case, model)
    _, resumed, log = interrupted(
        lambda kept: immunize(VARIANTS[variant](), case, model, checkpoint=kept), 2
    )
    assert same_weights(resumed, expected)
    assert (log.steps, log.rows) == (expected_log.steps, expected_log.rows)


# heads


@pytest.mark.parametrize("case", [linear_case(), deep_case()], ids=["squared", "cross-entropy"])
def test_head_gradients_against_autograd(case):
    task = case.benign
    head = Head(task, 6)
    head.w = randn(6, head.classes, seed=1)
    rows = torch.arange(3, 13)
    y = randn(10, 6, seed=2).requires_grad_(True)
    w = head.w.clone().requires_grad_(True)
    if task.kind == "regression":
        loss = F.mse_loss((y @ w)[:, 0], task.train.y[rows]) / 2
    else:
        loss = F.cross_entropy(y @ w, task.train.y[rows])
    by_y, by_w = torch.autograd.grad(loss, (y, w))
    value, ours_y, ours_w = head.loss(y.detach(), rows)
    assert value == pytest.approx(loss.item())
    assert torch.allclose(ours_y, by_y)
    assert torch.allclose(ours_w, by_w)
