"""Marks of cases."""

import pytest


def with_slow(values, slow):
    """The values as cases of a test; those in ``slow`` run with the slow tests only."""
    return [pytest.param(v, marks=pytest.mark.slow) if v in slow else v for v in values]
