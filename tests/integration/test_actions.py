"""`python run.py action=…` over records, and what such a call leaves behind."""

import csv
import json
import re
import shutil

import pytest
from entry_point import FAST

from lab.core import record as records
from lab.runner.experiment import Run


@pytest.mark.slow
def test_actions_on_two_records(cli, tmp_path):
    cli(*FAST)
    cli(*FAST, "immunize=kappa_well_only")
    assert "kappa_well_only" in cli("action=leaderboard", "tracker=none").out
    assert (tmp_path / "outputs/leaderboard.csv").read_text().count("\n") >= 3
    cli("action=report")
    assert (tmp_path / "outputs/report.html").is_file()
    paths = [str(p) for p in sorted(tmp_path.rglob("record.json"))]
    assert "RIR" in cli("action=compare", f"records=[{paths[0]},{paths[1]}]").out
    assert "2 ok" in cli("action=status", "records=[outputs/runs]").out
    assert "records=nowhere" in cli("action=status", "records=[outputs/runs,nowhere]", code=2).err


def test_a_record_that_cannot_be_read_is_told_and_the_others_are_summed_up(cli, tmp_path):
    cli(*FAST)
    broken = next(tmp_path.rglob("record.json")).parent.parent / "broken" / "record.json"
    broken.parent.mkdir()
    broken.write_text("{")
    for action, file in (("leaderboard", "leaderboard.md"), ("report", "report.html")):
        assert str(broken.relative_to(tmp_path)) in cli(f"action={action}", code=2).err
        assert (tmp_path / "outputs" / file).is_file()
    assert "1 unreadable" in cli("action=status").out


def test_a_command_that_was_repeated_has_one_row(cli, tmp_path):
    cli(*FAST)
    run = next(tmp_path.rglob("record.json")).parent
    again = json.loads((run / "record.json").read_text())
    again["provenance"]["started"] = "2100-01-01T00:00:00+00:00"
    shutil.copytree(run, run.parent / "again")
    records.write(again, run.parent / "again" / "record.json")
    assert "1 of 2 records repeat another one's content" in cli("action=leaderboard").out
    (row,) = csv.DictReader((tmp_path / "outputs/leaderboard.csv").open())
    assert (row["label"], row["rank"]) == ("kappa", "1")
    cli("action=compare", f"records=[{run},{run.parent / 'again'}]")


def test_a_run_killed_in_the_folder_of_an_earlier_one_does_not_pass_for_it(
    cli, tmp_path, monkeypatch
):
    class Killed(BaseException):
        """Leaves as little behind as `kill -9`."""

    def killed(run):
        raise Killed

    place = f"hydra.run.dir={tmp_path / 'run'}"
    cli(*FAST, place)
    assert (tmp_path / "run/record.json").is_file()
    monkeypatch.setattr(Run, "execute", killed)
    with pytest.raises(Killed):
        cli(*FAST, place)
    assert not (tmp_path / "run/record.json").exists()


def test_a_finished_record_is_not_replaced_by_another_run(cli, tmp_path):
    place = f"hydra.run.dir={tmp_path / 'run'}"
    cli(*FAST, place)
    first = (tmp_path / "run/record.json").read_bytes()
    err = cli(*FAST, "immunize=kappa_opt", place, code=2).err
    assert re.search(r"hydra\.run\.dir=.*run: holds the record of another run \(.*/kappa\)", err)
    assert (tmp_path / "run/record.json").read_bytes() == first


@pytest.mark.parametrize(
    "words",
    [
        ["action=status"],
        ["action=leaderboard"],
        ["action=nonsense"],
        ["action=list", "group=immunize"],
        ["action=search"],
        ["-m", *FAST, "seeds=[0,0],[1,1]"],
        [*FAST, "dry_run=true"],
        ["-m", *FAST, "immunize=kappa,kappa_opt", "dry_run=true"],
    ],
)
def test_what_only_looks_leaves_nothing_behind(cli, tmp_path, words):
    (tmp_path / "outputs" / "runs").mkdir(parents=True)
    cli(*words, code=None)
    assert [p for p in tmp_path.rglob("*") if p.name not in ("outputs", "runs")] == []
