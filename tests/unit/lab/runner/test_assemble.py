"""Attacks of a composed config: several settings of one, and options without an attack."""

import pytest
from presets import composed

from lab.core.errors import UserError
from lab.runner.assemble import assemble

FIRST_RUN = "experiment=first_run"


def attacks(*overrides):
    return assemble(composed(*overrides)).attacks


def test_every_setting_of_a_search_without_steps_is_an_attack():
    found = attacks(
        FIRST_RUN, "attacks=[lora_fast]", "attacks.lora_fast.search={space: {rank: [1, 2]}}"
    )
    assert [*found] == ["lora_fast (rank 1)", "lora_fast (rank 2)"]
    assert [part.config["rank"] for part in found.values()] == [1, 2]
    assert [part.obj.rank for part in found.values()] == [1, 2]
    assert all(part.config["search"] is None for part in found.values())


def test_attacks_of_one_name_are_refused():
    space = "{space: {rank: [1, 2]}}"
    with pytest.raises(UserError, match=r"attacks\.lora_fast\.name"):
        attacks(
            FIRST_RUN,
            "attacks=[lora,lora_fast]",
            "attacks.lora_fast.name=lora",
            *(f"attacks.{name}.search={space}" for name in ("lora", "lora_fast")),
        )


def test_options_of_attacks_that_are_not_selected_are_left_out():
    assert [*attacks("sweeps=lite", "attacks=[lora_fast]")] == ["lora_fast"]
    assert [*assemble(composed("sweeps=lite", "eval=[utility]")).metrics] == ["utility"]
    for none in ([FIRST_RUN, "attacks=[]"], ["sweeps=lite", "attacks=[]"]):
        with pytest.raises(UserError, match="names no choice"):
            attacks(*none)
