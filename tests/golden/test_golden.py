"""Numbers of today, so that a change of the code that should change no number can be told apart.

`python tests/golden/regenerate.py KEY ...` stores new values where a change is meant.
"""

from __future__ import annotations

import golden_cases as cases
import pytest

from lab.core.migration import current_name


@pytest.mark.parametrize("key", sorted({*cases.computations(), *cases.stored()}))
def test_the_value_is_the_stored_one(key: str) -> None:
    assert key in cases.stored(), f"no stored value: python tests/golden/regenerate.py {key}"
    assert key in cases.computations(), "stored, but no preset of this name and kind is in conf/"
    new = cases.computations()[key]()
    told = cases.differences(key, cases.stored()[key], new)
    assert not told, "\n".join(told)


@pytest.mark.parametrize("name", cases.STUDIES)
def test_the_program_gives_the_committed_figures_of_house_prices(name: str) -> None:
    found = cases.study(name)
    per_seed = {current_name(k): v for k, v in found["committed"].items()}
    missing = per_seed.keys() - found["found"].keys()
    assert not missing
    told = [
        f"{key}: {old} -> {found['found'][key]}"
        for key, old in per_seed.items()
        if not cases.close(old, found["found"][key], cases.STUDY_TOLERANCE, cases.ROUNDING)
    ]
    assert not told, "\n".join(told)


@pytest.mark.parametrize("table", sorted(cases.SMALL))
def test_every_small_option_is_a_key_of_some_preset(table: str) -> None:
    """An option that no preset has any more got another name: `SMALL` must follow."""
    group = table.partition("/")[0]
    names = [name for name in cases.presets(group) if f"{group}/{name}" not in cases.LEFT_OUT]
    known = {key for name in names for key in cases._composed(group)[name]}
    assert cases.SMALL[table].keys() <= known
