"""What tests expect of metrics."""

import pytest


def assert_values(metrics, expected, **tolerance):
    """The metrics that ``expected`` names have its values, within `pytest.approx`."""
    assert {name: metrics[name].value for name in expected} == pytest.approx(expected, **tolerance)
