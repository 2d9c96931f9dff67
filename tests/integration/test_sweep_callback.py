"""What is said before a sweep, and what it ends with: leaderboard, missing jobs, exit code."""

import json

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

import run  # noqa: F401 - registers a resolver of the config
from lab.cli.callbacks import SweepLeaderboard, count_jobs, describe_cost
from lab.core.errors import UserError
from lab.core.sources import ROOT


def config(*overrides, words=()):
    """The config as Hydra hands it to callbacks."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
    cfg.hydra.mode = RunMode.MULTIRUN
    cfg.hydra.overrides.task = list(words)
    return cfg


def test_the_cost_is_told_before_the_jobs(cli):
    words = ["sweeps=corridor_figure", "dry_run=true", "immunize.lambda_h=1e-3", "seeds=[0]"]
    code, out, err = cli(*words)
    assert code == 0, err
    assert out.startswith("corridor_figure: 2 of 4 runs; the whole costs 1 minute on two cores\n")
    assert "left no record" not in out


@pytest.mark.parametrize(
    ("words", "cost"),
    [
        ([], "4 runs; cost: 1 minute on two cores"),
        (["immunize.lambda_h=1e-3"], "2 of 4 runs; the whole costs 1 minute on two cores"),
        (["seeds=[0],[1]"], "8 runs, in place of 4 which cost 1 minute on two cores"),
    ],
)
def test_the_cost_is_that_of_the_runs_as_the_yaml_has_them(words, cost):
    cfg = config("sweeps=corridor_figure", words=words)
    assert describe_cost(count_jobs(cfg), cfg.sweep) == cost


def test_a_sweep_that_hydra_alone_can_count_is_not_counted():
    assert count_jobs(config(words=["immunize=glob(kappa*)"])) is None
    assert count_jobs(config(words=["immunize=kappa,none", "seeds=[0],[1],[2]"])) == 6
    cfg = config()
    cfg.hydra.sweeper = OmegaConf.create({"_target_": "of.another.Sweeper"})
    assert count_jobs(cfg) is None


@pytest.fixture
def end(tmp_path, monkeypatch, capsys):
    """Ends a sweep of four jobs: names of the published records, exit code, output, errors."""
    published = []
    monkeypatch.setattr(
        "lab.cli.actions.publish", lambda found, folder, lost: published.extend(found)
    )
    monkeypatch.setattr("lab.core.record.read", read)

    def call(*folders):
        for name, status, key in folders:
            (tmp_path / name).mkdir(parents=True)
            body = {"status": status, "error": {"key": key}, "name": name}
            (tmp_path / name / "record.json").write_text(json.dumps(body))
        cfg = config(f"hydra.sweep.dir={tmp_path}", words=["immunize=kappa,none", "seeds=[0],[1]"])
        with pytest.raises(SystemExit) as ended:
            SweepLeaderboard().on_multirun_end(cfg)
        return [record["name"] for record in published], ended.value.code, *capsys.readouterr()

    return call


def read(path):
    record = json.loads(path.read_text())
    if record["status"] == "damaged":
        raise UserError("records", path, "was altered.")
    return record


def test_the_exit_code_is_the_worst_of_the_jobs_whatever_their_folders_are_called(end):
    folders = [
        ("eta=1", "failed", None),
        ("10-b", "ok", None),
        ("9-a", "failed", "seeds"),
        ("eta=0/x", "ok", None),
    ]
    names, code, out, _ = end(*folders)
    assert names == ["9-a", "10-b", "eta=0/x", "eta=1"]
    assert code == 2
    assert "left no record" not in out


def test_jobs_without_a_record_are_counted_and_a_damaged_one_stops_nothing(end):
    names, code, out, err = end(("0-a", "damaged", None), ("1-b", "preempted", None))
    assert names == ["1-b"]
    assert code == 130
    assert "of 4 jobs 2 left no record" in out
    assert "0-a/record.json: was altered." in err
