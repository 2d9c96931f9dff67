"""Pairs of digits: protocols, disjoint negatives, shared memory, lossless columns."""

import pytest
import torch
from pydantic import ValidationError

from lab.scenarios.mnist import MnistPairs, digits


def full(x, y):
    """Rows as bytes of their nonzero values, comparable between column sets."""
    return {row[row > 0].numpy().tobytes() for row in x}


@pytest.fixture(scope="module")
def release():
    return MnistPairs(pairs=[[0, 1], [1, 0], [3, 8]]).load(0)


@pytest.fixture(scope="module")
def binary():
    return MnistPairs(protocol="one_vs_rest", pairs=[[0, 1], [3, 8]], name="binary").load(0)


def test_release_protocol_has_every_image_and_drops_pixels_that_change_no_gram_matrix(release):
    case = release.cases[2]
    assert [(task.name, task.role) for task in case.tasks] == [
        ("digit3", "benign"),
        ("digit8", "harmful"),
    ]
    pixels, labels = digits()
    for task, digit in zip(case.tasks, (3, 8), strict=True):
        assert torch.equal(task.train.y, torch.ones(400, dtype=torch.float64))
        x = torch.cat([task.train.x, task.test.x])
        own = torch.from_numpy(pixels[labels == digit].reshape(500, -1) / 255.0)
        # all images, each once
        assert torch.allclose(x.sum(1).sort().values, own.sum(1).sort().values)
        ours, theirs = torch.linalg.svdvals(x), torch.linalg.svdvals(own)
        assert torch.allclose(ours[:450], theirs[:450], atol=1e-10)


def test_one_vs_rest_negatives(binary):
    tasks = [task for case in binary.cases for task in case.tasks]
    rows, halves = [], []
    for task in tasks:
        assert task.train.y.sum() == 400 == len(task.train) - 400  # as many negatives as positives
        assert task.test.y.sum() == 100 == len(task.test) - 100
        negatives = [full(s.x[s.y == 0], s.y) for s in (task.train, task.test)]
        rows.append(negatives[0] | negatives[1])
        halves.append([full(s.x, s.y) for s in (task.train, task.test)])
    assert all(len(r) == 500 for r in rows)
    assert all(not rows[i] & rows[j] for i in range(4) for j in range(i))  # disjoint between tasks
    assert all(
        not a[0] & b[1] for a in halves for b in halves
    )  # no task trains on another's test image


def test_same_seed_same_bytes(binary):
    again = MnistPairs(protocol="one_vs_rest", pairs=[[0, 1], [3, 8]], name="binary").load(0)
    other = MnistPairs(protocol="one_vs_rest", pairs=[[0, 1], [3, 8]], name="binary").load(1)
    assert again.data_hash == binary.data_hash != other.data_hash


@pytest.mark.parametrize("pairs", ["some", [], [[1]], [[0, 10]]])
def test_pairs_that_cannot_work(pairs):
    with pytest.raises(ValidationError, match="pairs"):
        MnistPairs(pairs=pairs)
