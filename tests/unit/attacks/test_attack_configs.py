"""Every file of conf/attacks composes, and its target takes exactly the options that it lists."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate

from attacks.probes.optimizers import OPTIMIZERS
from lab.core.types import Attacker

FOLDER = Path(__file__).resolve().parents[3] / "conf" / "attacks"
REAL = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "none")


def composed(*names: str) -> dict:
    with initialize_config_dir(str(FOLDER.parent), version_base="1.3"):
        return compose(overrides=[f"+attacks=[{','.join(names)}]"]).attacks


@pytest.mark.parametrize("name", REAL)
def test_builds_under_its_own_key_and_lists_every_option(name: str) -> None:
    cfg = composed(name)
    assert list(cfg) == [name]
    options = inspect.signature(get_class(cfg[name]._target_)).parameters.keys()
    assert cfg[name].keys() - {"_target_", "_convert_"} == options
    attacker = instantiate(cfg[name], _convert_="all")
    assert isinstance(attacker, Attacker)
    assert attacker.name == name


def test_a_list_of_attacks_keeps_them_apart_and_none_adds_nothing() -> None:
    assert list(composed("linear_probe", "probe_adam", "none")) == ["linear_probe", "probe_adam"]
    assert dict(composed("none")) == {}


def test_every_optimizer_has_a_file() -> None:
    names = [name for name in REAL if name.startswith(("probe", "linear"))]
    assert {composed(name)[name].optimizer for name in names} == set(OPTIMIZERS)
