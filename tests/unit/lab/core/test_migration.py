"""Records of schema 1.x under the names of today."""

import json
from pathlib import Path

import pytest
from hydra.utils import get_object

from lab.core import record
from lab.core.migration import migrate, result_of
from lab.core.sources import ROOT


def targets(node):
    if isinstance(node, dict):
        yield from [node["_target_"]] if "_target_" in node else []
        node = list(node.values())
    for value in node if isinstance(node, list) else []:
        yield from targets(value)


@pytest.mark.slow
def test_every_committed_record_is_read_and_its_targets_exist():
    records = ROOT / "outputs" / "records"
    loaded, broken = record.readable(record.find([str(records)], Path("outputs")))
    assert not broken
    assert len(loaded) == len(list(records.rglob("*.json")))
    for target in {t for one in loaded for t in targets(one["config"])}:
        assert callable(get_object(target)), target


def test_options_and_columns_of_schema_2_2_have_their_names_of_today():
    undo = record.read(ROOT / "outputs/records/lite/undo.json")
    assert {"keep_samples", "target_samples"} < undo["config"]["immunize"].keys()
    assert "images" in undo["config"]["attacks"]["lora"]
    assert all("significant" in check for check in undo["tables"]["verdict"])
    sweep = record.read(ROOT / "outputs/records/class_image_options/preset.json")
    assert sweep["name"] == "class_image_options/none"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"value": 1.5, "passed": True}, "passes"),
        ({"value": 1.0}, "fails"),
        ({"value": 1.0, "bound": "lower"}, "inconclusive"),
        ({"value": 1.0, "bound": "upper"}, "fails"),
        ({"value": None}, "inconclusive"),
        ({"value": 1.5}, "inconclusive"),  # not measured in every seed
        ({"value": 1.5, "required": "≤ 1.25"}, "fails"),
        ({"value": 1.0, "required": "≤ 1.25", "bound": "lower"}, "inconclusive"),
        ({"value": 0.3, "low": -0.1, "required": "interval above 0"}, "fails"),
    ],
)
def test_without_a_result_a_limit_or_a_gap_leaves_a_check_inconclusive(
    changes: dict, word: str
) -> None:
    base = {"passed": False, "required": "≥ 1.25", "low": None, "bound": None}
    assert result_of(base | changes) == word


def test_an_inconclusive_verdict_has_no_value():
    path = ROOT / "outputs/records/house_price_table/kappa_corridor.json"
    old = json.loads(path.read_text()) | {"schema": "2.3", "cells": []}
    verdict = old["metrics"]["verdict"]
    assert verdict["note"].startswith("inconclusive")
    verdict["value"] = 0  # as up to 2.3
    assert migrate(old)["metrics"]["verdict"]["value"] is None


def test_a_verdict_without_results_gets_them():
    old = json.loads((ROOT / "outputs/records/lite/undo.json").read_text()) | {"schema": "2.0"}
    now = record.read(ROOT / "outputs/records/lite/undo.json")
    for check in old["tables"]["verdict"]:
        del check["result"]
    note = old["metrics"]["verdict"]["note"]
    old["metrics"]["verdict"]["note"] = note.removeprefix("fails. ")
    migrated = migrate(old)
    assert migrated["metrics"]["verdict"]["note"] == note
    results = [[c["result"] for c in r["tables"]["verdict"]] for r in (migrated, now)]
    assert results[0] == results[1]
