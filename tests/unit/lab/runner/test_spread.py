"""Who computes which stage, and that all of a run's processes find all of them."""

import json

import pytest
import torch
from ranks_together import together
from spread_cases import cells, spread

from lab.core.cache import StageCache, StageCheckpoint
from lab.runner.spread import SerialExecutor, plan

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("parts", "size", "queue", "teams"),
    [
        ([1, 1, 1], 2, [0, 1, 2], []),
        ([0, 3], 2, [0], [(1, range(0, 2))]),  # one immunization beside its baseline model
        ([3, 3, 3], 2, [0, 1], [(2, range(0, 2))]),  # whole ones first, the last one shared
        ([2], 3, [], [(0, range(0, 2))]),  # no more processes than parts
        ([4, 4], 3, [], [(0, range(0, 1)), (1, range(1, 3))]),
        ([3, 1], 2, [1, 0], []),  # what can be split comes last, and here each process has one
        ([], 4, [], []),
    ],
)
def test_plan(parts, size, queue, teams):
    assert plan(parts, size) == (queue, teams)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_plan_names_every_stage_once_and_no_process_twice(size):
    for parts in ([0, 1, 2, 3, 4, 5], [4] * 7, [0, 0, 2], [1] * 6):
        queue, teams = plan(parts, size)
        assert sorted([*queue, *(i for i, _ in teams)]) == list(range(len(parts)))
        members = [rank for _, ranks in teams for rank in ranks]
        assert len(set(members)) == len(members)
        assert set(members) <= set(range(size))
        assert all(1 <= len(ranks) <= parts[i] for i, ranks in teams)


def test_a_process_alone_leaves_the_stages_to_the_run(tmp_path):
    alone = SerialExecutor()
    assert (
        alone.compute(StageCache(tmp_path), cells(tmp_path, ["one-1"]), lambda _: 1, "test")
        == set()
    )
    assert alone.same([1]) == [1]
    assert alone.facts() == {}
    error = ValueError()
    assert alone.cause(error) is error


def computed_by(folder, name):
    return sorted(int(path.suffix[1:]) for path in folder.glob(f"{name}.*"))


def test_three_processes_compute_every_stage_once_and_share_the_last(tmp_path):
    names = ["light-1", "one-1", "metric-1", "two-1", "metric-2"]
    whole = together(
        1, spread, str(tmp_path / "alone"), names, folder=_made(tmp_path, "alone"), bare=True
    )
    folder = _made(tmp_path, "three")
    found = together(3, spread, str(folder), names, folder=folder, bare=True)
    for _, values in found:
        assert values["computed"] == 5
        assert values["facts"]["processes"] == 3
        assert values == found[0][1]
    for name in names:
        assert len(computed_by(folder, name)) == (2 if name == "two-1" else 1), name
    alone, three = whole[0][1]["values"], found[0][1]["values"]
    assert [v.get("size") for v in three] == [1, 1, None, 2, None]
    assert [v.get("mean") for v in three] == [None, None, 1.0, None, 2.0]
    assert (
        [v.get("total") for v in three]
        == [v.get("total") for v in alone]
        == [15.0, 15.0, None, 15.0, None]
    )
    again = together(3, spread, str(folder), names, folder=folder, bare=True)
    assert [values["computed"] for _, values in again] == [0, 0, 0]


def test_a_team_continues_from_its_leaders_checkpoint(tmp_path):
    (cell,) = cells(tmp_path, ["three-1"])
    path = StageCache(tmp_path / "cache").folder(cell.stage, cell.key).with_suffix(".ckpt")
    StageCheckpoint(path).save({"total": torch.tensor([100.0])}, {"begun": 1})
    for _, values in together(2, spread, str(tmp_path), ["three-1"], folder=tmp_path, bare=True):
        assert values["values"] == [{"resumed_at": 1, "size": 2, "total": 112.0}]
    assert not path.exists()


def test_all_processes_know_of_a_stage_that_failed_and_the_others_are_computed(tmp_path):
    names = ["lost-1", "one-1", "one-2", "one-3"]
    found = [
        values
        for _, values in together(2, spread, str(tmp_path), names, folder=tmp_path, bare=True)
    ]
    assert found[0] == found[1]
    assert found[0]["computed"] == 3
    assert [v and v["total"] for v in found[0]["values"]] == [None, 15.0, 15.0, 15.0]
    (failure,) = found[0]["failed"].values()
    assert (failure["type"], failure["message"]) == ("ValueError", "a defect")
    assert "spread_cases.py" in failure["traceback"]
    assert len(computed_by(tmp_path, "lost-1")) == 1, "nobody tries again"


@pytest.mark.parametrize("name", ["bad-1", "diverges-1"])
def test_a_failure_is_told_by_its_own_process_and_echoed_by_the_others(tmp_path, name):
    found = [
        values
        for _, values in together(2, spread, str(tmp_path), [name], folder=tmp_path, bare=True)
    ]
    own = [values for values in found if not values["echo"]]
    assert len(own) == 1
    told = "a defect" if name == "bad-1" else "no number"
    assert told in own[0]["cause"]
    assert own[0]["now"] == f"immunize {name}"
    (other,) = [values for values in found if values["echo"]]
    assert told in other["cause"], json.dumps(found)
    assert other["cause"].startswith("process ")


def _made(parent, name):
    folder = parent / name
    folder.mkdir()
    return folder
