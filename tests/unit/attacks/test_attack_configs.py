"""Every file of conf/attacks composes, and its target takes exactly the options that it lists."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate

from attacks.finetune.adaptation import Adaptation
from attacks.probes.optimizers import OPTIMIZERS
from lab.core.types import Attacker

FOLDER = Path(__file__).resolve().parents[3] / "conf" / "attacks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
REAL = [name for name in NAMES if name != "none"]


def composed(*names: str) -> dict:
    with initialize_config_dir(str(FOLDER.parent), version_base="1.3"):
        return compose(overrides=[f"+attacks=[{','.join(names)}]"]).attacks


def options(target: str) -> set[str]:
    """Keyword options of a class, those of `Adaptation` behind ``**options`` included."""
    parameters = inspect.signature(get_class(target)).parameters
    names = {n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    return (
        names
        if len(names) == len(parameters)
        else names | inspect.signature(Adaptation.__init__).parameters.keys() - {"self"}
    )


def test_there_are_twenty_nine() -> None:
    assert len(NAMES) == 29


@pytest.mark.parametrize("name", REAL)
def test_builds_under_its_own_key_and_lists_every_option(name: str) -> None:
    cfg = composed(name)
    assert list(cfg) == [name]
    assert cfg[name].name == name
    assert cfg[name].keys() - {"_target_", "_convert_"} == options(cfg[name]._target_)
    attacker = instantiate(cfg[name], _convert_="all")
    assert isinstance(attacker, Attacker)
    assert attacker.name == name


def test_a_list_of_attacks_keeps_them_apart_and_none_adds_nothing() -> None:
    assert list(composed("linear_probe", "probe_adam", "none")) == ["linear_probe", "probe_adam"]
    assert dict(composed("none")) == {}


def test_every_optimizer_has_a_file() -> None:
    built = [
        instantiate(composed(name)[name]) for name in REAL if name.startswith(("probe", "linear"))
    ]
    assert {probe.optimizer for probe in built} == set(OPTIMIZERS)


def test_defaults_say_where_they_come_from() -> None:
    for path in [*FOLDER.glob("*.yaml"), *FOLDER.glob("base/*.yaml")]:
        for line in path.read_text().splitlines():
            key, _, value = line.strip().partition(": ")
            plain = not value or key.startswith(("-", "#")) or key in ("_target_", "name")
            exempt = key in ("optimizer", "standardize")  # the file is about this value
            assert plain or exempt or "#" in value, f"{path.name}: {line}"
