"""`launch=cpu` as a user calls it: the same record from any number of processes, and an end that
tells why.
"""

import json
import os
import signal
import socket

import pytest
import yaml
from processes import TOKENS, ended, found_records, start, telling, until

from lab.core import record as records

pytestmark = pytest.mark.slow

RUN = [
    "experiment=house_price",
    "seeds=[0]",
    "budget.horizon=5",
    "budget.multiple=2",
    "budget.points=5",
    "immunize.epochs=2",
]
TWO = ["launch=cpu", "launch.num_processes=2"]


def rank_states(folder):
    return {
        int(p.stem): json.loads(p.read_text()) for p in next(folder.rglob("ranks")).glob("*.json")
    }


def faulty(folder, rank, kind, others=()):
    """Arguments of a run with `launch_faults.Fault` as its attacker, beside ``others``."""
    place = folder / "conf/attacks"
    place.mkdir(parents=True)
    options = {"_target_": "launch_faults.Fault", "rank": rank, "kind": kind, "folder": str(folder)}
    (place / "fault.yaml").write_text(yaml.safe_dump({"fault": options}))
    return [
        "--config-dir",
        str(folder / "conf"),
        *RUN,
        f"attacks=[{','.join(['fault', *others])}]",
        "tracker=none",
        *TWO,
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The record of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    ended(start(folder, *RUN, "tracker=none", "threads=1"))
    return found_records(folder)[0]


def test_three_processes_make_the_record_of_one_and_only_the_first_speaks(tmp_path, alone):
    env = os.environ | TOKENS | {"WANDB_MODE": "offline"}
    three = ["launch=cpu", "launch.num_processes=3"]
    out, err = ended(start(tmp_path, *RUN, "tracker=[wandb]", *three, env=env))
    assert out.strip().splitlines()[-1].startswith("record: ")
    (record,) = found_records(tmp_path)
    assert record["content_hash"] == alone["content_hash"]
    assert record["provenance"]["processes"] == 3
    for name, score in record["metrics"].items():
        assert score["value"] == alone["metrics"][name]["value"], name
    keys = [stage["key"] for stage in record["stages"]]
    assert len(set(keys)) == len(keys) == record["provenance"]["cache_misses"]
    assert {rank: state["state"] for rank, state in rank_states(tmp_path).items()} == dict.fromkeys(
        range(3), "done"
    )
    logged = list(tmp_path.rglob("offline-run-*/*.wandb"))
    assert len(logged) == 1, "one tracker, not one per process"
    assert telling(tmp_path, out, err) == []


@pytest.mark.parametrize(("rank", "kind"), [(1, "killed"), (0, "killed"), (1, "raises")])
def test_a_process_that_ends_too_early_ends_the_run_and_leaves_a_record(tmp_path, rank, kind):
    """The other one waits at that moment, or is in a stage of its own; here nothing may wait for a
    time limit.
    """
    _, err = ended(start(tmp_path, *faulty(tmp_path, rank, kind)), code=1, seconds=240)
    (record,) = found_records(tmp_path)
    assert record["status"] == "failed"
    if kind == "killed":
        assert record["error"]["type"] == "Killed"
        assert f"process {rank} was killed from outside" in err
    else:
        assert (record["error"]["type"], record["error"]["key"]) == (
            "ZeroDivisionError",
            "attacks.fault",
        )
        assert (
            f"error: attacks.fault: process {rank}: ZeroDivisionError: nothing to divide by" in err
        )
        assert "in __call__" in err, "the traceback of the process that failed"
        assert [stage["status"] for stage in record["stages"]].count("failed") == 1


def test_an_attacker_that_fails_leaves_the_same_record_from_two_processes(tmp_path, alone):
    found = []
    for name, several in (("one", []), ("two", TWO)):
        arguments = [
            word
            for word in faulty(tmp_path / name, 1, "defect", ["linear_probe"])
            if word not in TWO
        ]
        arguments = [word.replace(f"{tmp_path / name}/conf", "conf") for word in arguments]
        _, err = ended(
            start(tmp_path / name, *arguments, "threads=1", *several), code=1, seconds=240
        )
        assert err.count("Traceback") == 1
        assert "in __call__" in err
        found += found_records(tmp_path / name)
    one, two = found
    assert (two["status"], two["error"]["type"], two["error"]["key"]) == (
        "failed",
        "ZeroDivisionError",
        "attacks.fault",
    )
    assert {name for name, m in two["metrics"].items() if m["value"] is None} == {
        "verdict",
        "verdict_share",
    }
    for name, metric in two["metrics"].items():
        assert metric["value"] is None or metric["value"] == alone["metrics"][name]["value"], name
    assert {k: two[k] for k in ("error", "notes", "skipped")} == {
        k: one[k] for k in ("error", "notes", "skipped")
    }
    assert [c["status"] for c in two["stages"]] == [c["status"] for c in one["stages"]]
    assert rank_states(tmp_path / "two").keys() == {0, 1}
    assert two["provenance"]["cache_misses"] == one["provenance"]["cache_misses"]


def test_a_stopped_run_is_continued_by_two_processes_to_the_same_record(tmp_path):
    longer = [*RUN, "immunize.epochs=100", "immunize.checkpoint_every=20", "tracker=none"]
    process = start(tmp_path, *longer, *TWO)
    until(lambda: list(tmp_path.rglob("*.ckpt")) or process.poll() is not None, "no checkpoint")
    process.send_signal(signal.SIGTERM)
    ended(process, code=130)
    (record,) = found_records(tmp_path)
    assert record["status"] == "preempted"
    assert {state["state"] for state in rank_states(tmp_path).values()} == {"stopped"}
    assert "goes on from its checkpoint" not in logged(tmp_path)
    ended(start(tmp_path, *longer, *TWO))
    assert "goes on from its checkpoint" in logged(tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    ended(start(whole, *longer, "threads=1"))
    assert (
        found_records(tmp_path / "outputs")[-1]["content_hash"]
        == found_records(whole)[0]["content_hash"]
    )


def logged(folder):
    """What all processes logged."""
    return "".join(
        path.read_text() for path in (*folder.rglob("run.log"), *folder.rglob("ranks/*.log"))
    )


def test_two_machines_meet_at_the_address_that_they_are_told(tmp_path, alone):
    """Two parents, as on two machines with one file system; the second one writes no record and no
    report.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = [
        *RUN,
        "tracker=none",
        *TWO,
        "launch.num_machines=2",
        "launch.main_process_ip=127.0.0.1",
        f"launch.main_process_port={port}",
        f"hydra.run.dir={tmp_path}/run",
    ]
    machines = [start(tmp_path, *shared, f"launch.machine_rank={n}") for n in (0, 1)]
    outs = [ended(machine)[0] for machine in machines]
    assert "record: " in outs[0]
    assert "record: " not in outs[1]
    record = records.read(tmp_path / "run/record.json")
    assert (
        record["content_hash"],
        record["provenance"]["processes"],
        record["provenance"]["machines"],
    ) == (alone["content_hash"], 2, 2)


def test_a_wrong_option_that_the_processes_find_is_told_once(tmp_path):
    _, err = ended(
        start(tmp_path, *RUN, "tracker=none", *TWO, "attacks.linear_probe.loss=cubic"), code=2
    )
    assert (
        sum(
            "attacks.linear_probe.loss" in line
            for line in err.splitlines()
            if line.startswith("error:")
        )
        == 1
    )
    assert "Traceback" not in err
    assert found_records(tmp_path) == []
