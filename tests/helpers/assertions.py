"""What tests expect of metrics."""

import pytest
import torch


def assert_values(metrics, expected, **tolerance):
    """The metrics that ``expected`` names have its values: an int exactly, a float within
    `pytest.approx`.
    """
    for name, value in expected.items():
        exact = isinstance(value, int)
        assert metrics[name].value == (value if exact else pytest.approx(value, **tolerance)), name


def same_weights(a, b):
    """Return whether two modules have the same parameters and buffers, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
