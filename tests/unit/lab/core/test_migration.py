"""Records of schema 1.x under the names of today."""

from pathlib import Path

from hydra.utils import get_object

from lab.core import record
from lab.core.sources import ROOT


def targets(node):
    if isinstance(node, dict):
        yield from [node["_target_"]] if "_target_" in node else []
        node = list(node.values())
    for value in node if isinstance(node, list) else []:
        yield from targets(value)


def test_committed_records_are_read_and_their_targets_exist():
    """One of every folder, which one program wrote; the figures of the documentation read more."""
    first = {path.parent: str(path) for path in (ROOT / "outputs" / "records").rglob("*.json")}
    loaded, broken = record.readable(record.find([*first.values()], Path("outputs")))
    assert not broken
    assert len(loaded) == len(first)
    for target in {t for one in loaded for t in targets(one["config"])}:
        assert callable(get_object(target)), target
