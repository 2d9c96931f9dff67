"""Records of schema 1.x under the names of today."""

from pathlib import Path

import pytest
from hydra.utils import get_object

from lab.core import record
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
