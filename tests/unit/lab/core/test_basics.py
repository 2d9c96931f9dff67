"""Seeding, intervals, source hashes, budgets, frozen prefixes."""

import math

import numpy as np
import pytest
import torch
from assertions import same_weights
from torch import nn

from eval.stats.intervals import score_samples
from lab.core import sources
from lab.core.hashing import digest, state_hash
from lab.core.seeding import derive, generator
from lab.core.types import Budget, FeatureModel, Trajectory
from lab.models.activations import features, prefix


def test_streams_repeat_and_differ():
    a, b = (torch.rand(4, generator=generator(0, "attack", 1)) for _ in range(2))
    assert torch.equal(a, b)
    labels = ((), ("a",), ("a", 1), ("b",))
    assert len({derive(seed, *each) for seed in (0, 1) for each in labels}) == 8


def test_the_bootstrap_over_ten_seeds_covers_the_mean_of_known_normal_data():
    rng = np.random.default_rng(0)
    # no seed effect: the interval must cover 3 most of the time
    samples = [rng.normal(3.0, 1.0, (10, 30)).tolist() for _ in range(100)]
    found = [score_samples(sample, "higher", draws=300) for sample in samples]
    assert 85 <= sum(score.low <= 3.0 <= score.high for score in found) <= 100


def test_few_seeds_take_student_t_and_many_the_bootstrap():
    found = score_samples(
        [[1.0, 3.0], [4.0], [6.0]], "higher"
    )  # seed means 2, 4, 6: t(0.975, 2) = 4.3027
    assert (found.value, found.interval) == (4.0, "across_seeds")
    assert found.high - found.value == pytest.approx(4.302653 * 2 / math.sqrt(3))
    geometric = score_samples(
        [[math.exp(2)], [math.exp(4)], [math.exp(6)]], "higher", aggregate="geomean"
    )
    assert math.log(geometric.low) == pytest.approx(found.low)
    many = [[v] for v in np.random.default_rng(0).normal(0.0, 1.0, 10)]
    assert (
        score_samples(many, "higher", draws=50).high != score_samples(many, "higher").high
    )  # resampled


def test_budget_snapshots():
    steps = Budget(horizon=20, multiple=5, points=12).snapshots()
    assert steps[0] == 0
    assert {20, 100} <= set(steps)
    assert len(steps) <= 13


def test_trajectory_at_takes_the_last_point_before():
    found = Trajectory([0, 5, 20], {"loss": [3.0, 2.0, 1.0]})
    assert [found.at("loss", s) for s in (0, 4, 5, 19, 100)] == [3.0, 3.0, 2.0, 2.0, 1.0]


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return FeatureModel(
        [("a", nn.Linear(4, 5)), ("b", nn.Sequential(nn.BatchNorm1d(5), nn.ReLU()))], 5
    )


def test_prefix_equals_forward_in_batches_and_is_memoised():
    model, x = tiny_model(), torch.randn(37, 4)
    assert torch.allclose(prefix(model, x, 1, batch=8), model.run(x, 0, 1))
    assert torch.allclose(features(model, x, batch=8), model(x))
    assert prefix(model, x, 1) is prefix(model, x, 1)
    with torch.no_grad():
        model.blocks[0].weight.add_(1.0)
    assert torch.allclose(prefix(model, x, 1), model.run(x, 0, 1))


def test_prefix_tells_structures_apart_that_share_their_weights():
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 5), torch.randn(9, 4)
    plain = FeatureModel([("a", linear)], 5)
    rectified = FeatureModel([("a", nn.Sequential(linear, nn.ReLU()))], 5)
    shifted = type("Shifted", (FeatureModel,), {"inputs": lambda self, x: x + 1})(
        [("a", linear)], 5
    )
    for model in (plain, rectified, shifted):
        assert torch.allclose(features(model, x), model(x))


def test_same_weights_and_digest_see_one_bit():
    a, b = tiny_model(), tiny_model()
    assert same_weights(a, b)
    with torch.no_grad():
        b.blocks[0].bias[0] = torch.nextafter(b.blocks[0].bias[0], torch.tensor(9.0))
    assert not same_weights(a, b)
    assert digest(a.blocks[0].bias) != digest(b.blocks[0].bias)


def write_modules(folder, **modules):
    folder.mkdir(exist_ok=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


def changes(module, path):
    """Whether the hash of ``module`` follows a change of the file ``path``."""
    hashes = set()
    for content in ("X = 1\n", "X = 2\n"):
        path.write_text(content)
        sources.source_hash.cache_clear()
        sources._imports.cache_clear()
        hashes.add(sources.source_hash(module))
    return len(hashes) == 2


def test_source_hash_follows_imports_of_the_project(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    lab = tmp_path / "lab"
    write_modules(lab, __init__="", a="from lab import b\nimport json\n", b="", c="")
    assert changes("lab.a", lab / "b.py")
    assert not changes("lab.a", lab / "c.py")
    sources.source_hash.cache_clear()
    sources._imports.cache_clear()


def test_source_hash_of_an_own_module_follows_its_helpers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own_package_x"
    write_modules(
        tmp_path, own_attack_x="import json\nfrom own_helper_x import X\n", own_helper_x=""
    )
    write_modules(package, __init__="", attack="from .part import X\nfrom . import more\n", part="")
    assert changes("own_attack_x", tmp_path / "own_helper_x.py")
    assert changes("own_package_x.attack", package / "more.py")


def test_the_hash_of_a_state_knows_names_shapes_and_dtypes():
    a = torch.arange(4, dtype=torch.float32)
    states = [{"a": a}, {"b": a}, {"a": a.view(2, 2)}, {"a": a.view(torch.int32)}]
    assert len({state_hash(state) for state in [*states, {"a": a, "b": a}]}) == 5
