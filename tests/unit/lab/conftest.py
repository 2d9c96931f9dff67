"""Fixtures of several modules here."""

import pytest
from minisd_words import world_prompts
from tracking_runs import forget_key, run_folder

from lab.minisd.train import networks


@pytest.fixture
def folder(tmp_path):
    return run_folder(tmp_path)


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    forget_key(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("words") / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return networks.train_tokenizer(world_prompts(), tokenizer_folder, 1280)
