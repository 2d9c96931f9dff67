"""The linear extractor and its builder."""

import pytest
import torch
from assertions import same_weights
from pydantic import ValidationError

from lab.core.data import Case, Split, Task
from lab.models.linear import LinearBackbone, LinearExtractor


def case(x):
    split = Split(x, torch.zeros(len(x), dtype=torch.float64))
    task = Task("t", "benign", "regression", split, split)
    return Case("c", task, (task,))


X = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_identity_is_the_default_and_changes_nothing():
    model = LinearBackbone().build(case(X), 3)
    assert (model.kind, model.block_names, model.feature_dim) == ("linear", ("theta",), 4)
    assert torch.equal(model(X), X)
    images = X.view(10, 2, 2)
    assert torch.equal(LinearBackbone().build(case(images), 0)(images), X)


def test_features_are_x_theta():
    theta = torch.arange(8.0).reshape(4, 2)
    model = LinearExtractor(theta)
    assert torch.equal(model(X), X @ theta.double())
    assert model(X.float()).dtype == torch.float64


def test_random_start_is_seeded_and_bounded():
    build = LinearBackbone(init="random").build
    first, second = build(case(X), 0), build(case(X), 1)
    assert same_weights(first, build(case(X), 0))
    assert not same_weights(first, second)
    assert float(first.theta.detach().abs().max()) <= 0.5


def test_other_options_are_refused():
    with pytest.raises(ValidationError, match="init"):
        LinearBackbone(init="identiy")
