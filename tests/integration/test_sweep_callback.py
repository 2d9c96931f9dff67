"""What a sweep ends with: leaderboard, missing jobs, exit code."""

import json

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf
from presets import composed

from lab.cli.callbacks import SweepLeaderboard
from lab.core.errors import UserError


def read(path):
    record = json.loads(path.read_text())
    if record["status"] == "damaged":
        raise UserError("records", path, "was altered.")
    return record


@pytest.fixture
def end(tmp_path, monkeypatch):
    """Ends a sweep: names of the published records, exit code."""
    published = []
    monkeypatch.setattr("lab.cli.tables.publish", lambda found, folder: published.extend(found))
    monkeypatch.setattr("lab.core.record.read", read)

    def call(*folders):
        for name, status, key in folders:
            (tmp_path / name).mkdir(parents=True)
            body = {"status": status, "error": {"key": key}, "name": name}
            (tmp_path / name / "record.json").write_text(json.dumps(body))
        cfg = composed(f"hydra.sweep.dir={tmp_path}", return_hydra_config=True)
        cfg.hydra.mode = RunMode.MULTIRUN
        with pytest.raises(SystemExit) as ended:
            SweepLeaderboard().on_multirun_end(cfg)
        return [record["name"] for record in published], ended.value.code

    return call


def test_the_exit_code_is_the_worst_of_the_jobs_whatever_their_folders_are_called(end):
    folders = [
        ("eta=1", "failed", None),
        ("10-b", "ok", None),
        ("9-a", "failed", "seeds"),
        ("eta=0/x", "ok", None),
    ]
    assert end(*folders) == (["9-a", "10-b", "eta=0/x", "eta=1"], 2)


def test_a_damaged_record_and_a_killed_job_are_told_and_stop_nothing(end, tmp_path, capsys):
    (tmp_path / "2-c/.hydra").mkdir(parents=True)
    OmegaConf.save(composed(), tmp_path / "2-c/.hydra/config.yaml")
    assert end(("0-a", "damaged", None), ("1-b", "ok", None)) == (["1-b"], 1)
    err = capsys.readouterr().err
    assert "0-a/record.json: was altered." in err
    assert "2-c: no record and no living process" in err
