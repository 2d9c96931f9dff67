"""Fixtures of several modules here."""

import pytest
from tracking_runs import forget_key, run_folder


@pytest.fixture
def folder(tmp_path):
    return run_folder(tmp_path)


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    forget_key(monkeypatch, tmp_path)
