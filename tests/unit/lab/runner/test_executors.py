"""Which process computes which stage, and that all of a run's processes know all results."""

import pytest
import torch
from executor_cases import execute, make_stages
from ranks_together import together

from lab.core.cache import StageCache, StageCheckpoint
from lab.runner.executors import ProcessStates, split

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("shards", "size", "alone", "together"),
    [
        ([1, 1, 1], 2, [0, 1, 2], []),
        ([0, 3], 2, [0], [1]),  # one immunization beside its baseline model
        ([3, 3, 3], 2, [0, 1], [2]),  # whole ones first, the last one together
        ([2, 1], 3, [1], [0]),
        ([0, 1], 2, [1, 0], []),  # what costs nothing comes last
        ([], 4, [], []),
    ],
)
def test_split(shards, size, alone, together):
    assert split(shards, size) == (alone, together)


def run(folder, size, names):
    folder.mkdir(exist_ok=True)
    return [v for _, v in together(size, execute, str(folder), names, folder=folder, bare=True)]


def test_three_processes_compute_every_stage_once_and_the_last_one_together(tmp_path):
    names = ["light-1", "one-1", "metric-1", "two-1", "metric-2"]
    (alone,) = run(tmp_path / "alone", 1, names)
    three = run(tmp_path / "three", 3, names)
    for values in three:
        assert values == three[0]
    for name in names:
        processes = list((tmp_path / "three").glob(f"{name}.*"))
        assert len(processes) == (3 if name == "two-1" else 1), name
    results = three[0]["results"]
    assert [r.get("size") for r in results] == [1, 1, None, 3, None]
    assert [r.get("total") for r in results] == [r.get("total") for r in alone["results"]]
    assert all(result["hit"] for result in run(tmp_path / "three", 3, names)[0]["results"])


def test_a_team_continues_from_its_leaders_checkpoint(tmp_path):
    (stage,) = make_stages(tmp_path, ["three-1"])
    path = StageCache(tmp_path / "cache").folder(*stage.place).with_suffix(".ckpt")
    StageCheckpoint(path).save({"total": torch.tensor([100.0])}, {"begun": 1})
    for values in run(tmp_path, 2, ["three-1"]):
        assert values["results"] == [{"resumed_at": 1, "size": 2, "total": 112.0, "hit": False}]
    assert not path.exists()


@pytest.mark.parametrize(("name", "message"), [("bad-1", "a defect"), ("diverges-1", "no number")])
def test_a_failure_is_told_by_its_own_process_and_known_to_the_others(tmp_path, name, message):
    results = run(tmp_path, 2, [name])
    assert sorted(values["echo"] for values in results) == [False, True]
    assert all(message in values["cause"] for values in results), results
    failure = ProcessStates(tmp_path / "ranks").first_failure()
    assert failure.message == message
    assert "executor_cases.py" in failure.traceback
