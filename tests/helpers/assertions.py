"""What tests expect of metrics."""

import pytest


def assert_values(metrics, expected, **tolerance):
    """The metrics that ``expected`` names have its values: an int exactly, a float within
    `pytest.approx`.
    """
    for name, value in expected.items():
        exact = isinstance(value, int)
        assert metrics[name].value == (value if exact else pytest.approx(value, **tolerance)), name
