"""One command for the release engineer: attack a checkpoint with a suite, end in one page that
names the cost.
"""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest
from entry_point import call_entry
from release_examples import composed, tiny_folder, world
from tiny_diffusion import tiny_case, tiny_diffusion

from attacks.diffusion.curriculum import Curriculum
from attacks.diffusion.lora import ConceptLora
from lab.core import record as records
from lab.core.errors import UserError
from lab.core.types import Budget
from lab.release.audit import audit, off_target, prepare
from lab.release.audit_cost import seconds_per_update, timed

SUITE = ["lora", "textual_inversion"]


def of_folder(root, backbone, *more):
    """Overrides of an audit of ``backbone`` on the concept folders below ``root``, in seconds."""
    skipped = ("experiment=", "immunize", "attacks", "eval=", "backbone", "budget.at")
    shared = [word for word in world(root, backbone) if not word.startswith(skipped)]
    small = [f"audit.search.{name}.steps=1" for name in ("lora", "textual_inversion")]
    small += [
        "attacks.lora.batch_size=2",
        "attacks.textual_inversion.batch_size=2",
        "budget.at=[0,2,4]",
    ]
    return ["experiment=audit", f"attacks=[{','.join(SUITE)}]", *shared, *small, *more]


@pytest.fixture
def call(monkeypatch, capfd):
    """The entry point in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        return call_entry(monkeypatch, capfd, *arguments)

    return call


# ---- the whole of it


@pytest.mark.slow
def test_one_command_ends_in_one_page(tmp_path, call):
    folder = tiny_folder(tmp_path / "a model, released")  # a comma and blanks are no list
    code, out, err = call(*of_folder(tmp_path, folder), f"backbone={folder}")
    assert code == 0, err
    (page,) = (tmp_path / "outputs").rglob("audit.md")
    text, record = page.read_text(), records.read(page.parent / "record.json")
    assert f"audit: {page}" in out
    assert page.with_suffix(".html").is_file()
    assert record["immunizer"] == "none"
    assert record["attacks"] == SUITE
    headline = re.search(r"^\*\*(.+)\*\*$", text, re.MULTILINE)
    assert headline is not None
    assert f"── {headline[1]}" in out
    assert re.match("Broken|Held|Not protected|Unclear", headline[1])
    assert "# Audit of a model, released" in text
    for name in SUITE:
        assert re.search(rf"^\| mosaic .*\| {name} \|", text, re.MULTILINE)
    assert "2 × 1 steps" in text  # the searches of audit.search
    assert "measured on" in text
    rows = record["tables"]["audit"]
    assert {r["concept"] for r in rows} == {"mosaic", "neon"}
    assert all(r["trials"] == 2 and r["parameters"] > 0 and r["pictures"] > 0 for r in rows)
    again, out, _ = call(*of_folder(tmp_path, folder), f"backbone={folder}", "dry_run=true")
    assert again == 0
    assert "0 misses" in out  # every stage was kept


# ---- wrong input


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["action=audit"], r"action=audit: .*experiment=audit"),
        (["experiment=audit", "attacks=none"], r"attacks=none: .*at least one attack"),
        (
            ["experiment=audit", "+audit.search.lorra={mode: grid}"],
            r"audit\.search\.lorra=.*did you mean lora",
        ),
        (["experiment=audit", "backbone=sd"], r"scorers=minisd: .*scorers=real"),
        (["experiment=audit", "scenario=house_price"], r"scenario=house_price: .*text-to-image"),
        (["experiment=audit", "launch=cpu"], r"launch=cpu: .*launch=none"),
        (["experiment=audit", "path=release"], r"path=release: .*backbone\.path=DIR"),
        (["experiment=audit", "immunize=mima"], r"immunize=mima: .*as it is: immunize=none"),
        (["experiment=audit", "erase=uce"], r"erase=uce: .*as it is: erase=none"),
        (["experiment=audit", "audit.search=5"], r"audit\.search=5: must be null or a group"),
    ],
)
def test_what_cannot_be_audited(overrides, told):
    with pytest.raises(UserError, match=told):
        audit(composed(*overrides))


def test_an_exported_extractor_is_told_as_what_it_is(tmp_path):
    (tmp_path / "export.json").write_text('{"kind": "linear"}')
    with pytest.raises(
        UserError, match=r"backbone\.path=.*: holds a linear model; audits are of text-to-image"
    ):
        audit(composed("experiment=audit", f"backbone.path={tmp_path}"))


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_damaged_facts_of_an_export_are_told_with_the_key(tmp_path, text):
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(UserError, match=r"backbone\.path=.*export\.json: .*action=verify"):
        audit(composed("experiment=audit", f"backbone.path={tmp_path}"))


@pytest.mark.slow
def test_an_export_that_was_immunized_against_other_targets_is_told(tmp_path):
    folder = tiny_folder(tmp_path / "released")
    facts = folder / "export.json"
    asked = composed("experiment=audit", f"backbone.path={folder}")
    assert off_target(asked) is None  # no export: nothing is known about its targets
    facts.write_text('{"kind": "diffusion", "case": "mosaic_neon"}')
    assert off_target(asked) is None
    facts.write_text('{"kind": "diffusion", "case": "watercolor_stained-glass"}')
    told = off_target(asked)
    assert told is not None
    assert "exported for case watercolor_stained-glass, and this audit attacks mosaic_neon" in told
    assert (
        off_target(composed("experiment=audit", f"backbone.path={folder}", "scenario.cases=all"))
        is None
    )


def test_a_folder_that_is_not_there_names_the_key(tmp_path, call):
    code, _, err = call(
        "experiment=audit",
        f"backbone={tmp_path / 'none'}",
        f"paths.outputs={tmp_path}",
        "tracker=none",
    )
    assert code == 2
    assert "backbone.path=" in err
    assert "there is no such folder" in err


def test_a_search_of_the_attackers_own_is_kept():
    own = "attacks.lora.search={mode: grid, steps: 7, space: {rank: [2]}}"
    found = prepare(composed("experiment=audit", own, "audit.search.full_finetune=null"))
    assert found.attacks.lora.search.steps == 7
    assert found.attacks.full_finetune.search is None
    assert found.attacks.textual_inversion.search.space.lr == [5e-3, 2e-2]


# ---- what an update costs


def ticking(*durations):
    """A clock that is read twice for each of ``durations``, then stands still."""
    now, order = 0.0, []
    for duration in durations:
        order += [now, now := now + duration]
    return itertools.chain(order, itertools.repeat(now)).__next__


def lora(**options):
    return ConceptLora(name="lora", batch_size=2, rank=2, families=(), **options)


def test_seconds_of_an_update_are_a_median_after_a_warm_up():
    model, task = tiny_diffusion(), tiny_case().targets[0]
    clock = ticking(1.0, 9.0, 2.0)
    assert timed(lora(), model, task, Budget(4), 0, clock) == pytest.approx(2.0)


def test_an_attacker_of_another_class_is_left_out_of_the_costs():
    own = SimpleNamespace(parts=SimpleNamespace(attacks={"mine": SimpleNamespace(obj=object())}))
    assert (
        seconds_per_update(own, [{"attack": "mine", "concept": "a", "case": "b", "seed": 0}]) == {}
    )


def test_a_curriculum_costs_the_mean_over_its_steps():
    stages = {
        "first": {"data": "prior", "share": 0.25, "attack": lora()},
        "second": {"data": "target", "share": 0.75, "attack": lora()},
    }
    attack = Curriculum(name="curriculum", stages=stages, families=())
    clock = ticking(1.0, 1.0, 1.0, 3.0, 3.0, 3.0)
    assert timed(
        attack, tiny_diffusion(), tiny_case().targets[0], Budget(4, 2), 0, clock
    ) == pytest.approx(2.5)
