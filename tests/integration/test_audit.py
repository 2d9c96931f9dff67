"""One command for the release engineer: attack a checkpoint with a suite, end in one page that
names the cost.
"""

from __future__ import annotations

import itertools
import re

import pytest
from entry_point import call_entry
from release_examples import composed, tiny_folder, world
from tiny_diffusion import tiny_case, tiny_diffusion

from attacks.diffusion.curriculum import Curriculum
from attacks.diffusion.lora import ConceptLora
from lab.core import record as records
from lab.core.errors import UserError
from lab.core.types import Budget
from lab.release.audit import (
    audit,
    find_other_targets,
    prepare,
    time_update,
)

SUITE = ["lora", "textual_inversion"]


def of_folder(root, backbone, *more):
    """Overrides of an audit of ``backbone`` on the concept folders below ``root``, in seconds."""
    skipped = ("experiment=", "immunize", "attacks", "eval=", "backbone", "budget.at")
    shared = [word for word in world(root, backbone) if not word.startswith(skipped)]
    small = [f"audit.search.{name}.steps=1" for name in SUITE]
    small += [f"attacks.{name}.batch_size=2" for name in SUITE] + ["budget.at=[0,2,4]"]
    return ["experiment=audit", f"attacks=[{','.join(SUITE)}]", *shared, *small, *more]


@pytest.mark.slow
def test_one_command_ends_in_one_page(tmp_path, monkeypatch, capfd):
    folder = tiny_folder(tmp_path / "a model, released")  # a comma and blanks are no list
    words = of_folder(tmp_path, folder, f"backbone={folder}")
    code, out, err = call_entry(monkeypatch, capfd, *words)
    assert code == 0, err
    (page,) = (tmp_path / "outputs").rglob("audit.md")
    text, record = page.read_text(), records.read(page.parent / "record.json")
    assert f"audit: {page}" in out
    assert (record["immunizer"], record["attacks"]) == ("none", SUITE)
    headline = re.search(r"^\*\*(.+)\*\*$", text, re.MULTILINE)
    assert re.match("Broken|Held|Not protected|Unclear", headline[1])
    assert "# Audit of a model, released" in text
    for name in SUITE:
        assert re.search(rf"^\| mosaic .*\| {name} \|", text, re.MULTILINE)
    rows = record["tables"]["audit"]
    assert {row["concept"] for row in rows} == {"mosaic", "neon"}
    assert all(row["trials"] == 2 and row["parameters"] > 0 for row in rows)
    code, out, _ = call_entry(monkeypatch, capfd, *words, "dry_run=true")
    assert code == 0
    assert "0 misses" in out  # every stage was kept


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["action=audit"], r"action=audit: .*experiment=audit"),
        (["experiment=audit", "attacks=none"], r"action=audit: .*attacks=\[lora\]"),
        (["experiment=audit", "+audit.search.lorra={mode: grid}"], r"did you mean lora"),
        (["experiment=audit", "backbone=sd"], r"scorers=minisd: .*scorers=real"),
        (["experiment=audit", "launch=cpu"], r"launch=cpu: .*launch=none"),
        (["experiment=audit", "immunize=mima"], r"immunize=mima: .*immunize=none"),
    ],
)
def test_what_cannot_be_audited(overrides, message):
    with pytest.raises(UserError, match=message):
        audit(composed(*overrides))


@pytest.mark.slow
def test_an_export_that_was_immunized_against_other_targets_is_reported(tmp_path):
    folder = tiny_folder(tmp_path / "released")
    cfg = composed("experiment=audit", f"backbone.path={folder}")
    (folder / "export.json").write_text('{"kind": "diffusion", "case": "mosaic_neon"}')
    assert find_other_targets(cfg) == []
    (folder / "export.json").write_text('{"case": "watercolor_stained-glass"}')
    (message,) = find_other_targets(cfg)
    assert "case watercolor_stained-glass, and this audit attacks mosaic_neon" in message


def test_a_search_of_the_attackers_own_is_kept():
    own = "attacks.lora.search={mode: grid, steps: 7, space: {rank: [2]}}"
    cfg = prepare(composed("experiment=audit", own, "audit.search.full_finetune=null"))
    assert cfg.attacks.lora.search.steps == 7
    assert cfg.attacks.full_finetune.search is None
    assert cfg.attacks.textual_inversion.search.space.lr == [5e-3, 2e-2]


# ---- what an update costs


def ticking(*durations):
    """A clock that is read twice for each of ``durations``, then stands still."""
    now, order = 0.0, []
    for duration in durations:
        order += [now, now := now + duration]
    return itertools.chain(order, itertools.repeat(now)).__next__


def timed(attack, budget, *durations):
    task = tiny_case().targets[0]
    return time_update(attack, tiny_diffusion(), task, budget, 0, ticking(*durations))


def test_seconds_of_an_update_are_a_median_and_of_a_curriculum_the_mean_over_its_steps():
    lora = ConceptLora(name="lora", batch_size=2, rank=2, families=())
    assert timed(lora, Budget(4), 1.0, 9.0, 2.0) == pytest.approx(2.0)
    stages = {
        "first": {"data": "prior", "share": 0.25, "attack": lora},
        "second": {"data": "target", "share": 0.75, "attack": lora},
    }
    attack = Curriculum(name="curriculum", stages=stages, families=())
    seconds = timed(attack, Budget(4, 2), 1.0, 1.0, 1.0, 3.0, 3.0, 3.0)
    assert seconds == pytest.approx(2.5)
