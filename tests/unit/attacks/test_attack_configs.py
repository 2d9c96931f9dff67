"""Every file of conf/attacks composes, and its target takes exactly the options that it lists."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class

FOLDER = Path(__file__).resolve().parents[3] / "conf" / "attacks"
REAL = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "none")


@pytest.mark.parametrize("name", REAL)
def test_lists_every_option(name: str) -> None:
    with initialize_config_dir(str(FOLDER.parent), version_base="1.3"):
        node = compose(overrides=[f"+attacks=[{name}]"]).attacks[name]
    options = inspect.signature(get_class(node._target_)).parameters.keys()
    assert node.keys() - {"_target_", "_convert_"} == options
