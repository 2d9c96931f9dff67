"""What a multirun says before and after its jobs."""

import json

import pytest
from entry_point import call_entry
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

import run  # noqa: F401 - registers a resolver of the config
from lab.cli.callbacks import SweepLeaderboard, _jobs, sweep_codes, told_cost
from lab.core.errors import UserError
from lab.core.sources import ROOT


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call_entry(monkeypatch, capfd, *arguments)


def test_the_cost_is_told_before_the_jobs(cli):
    code, out, err = cli(
        "sweeps=corridor_figure", "dry_run=true", "immunize.lambda_h=1e-3", "seeds=[0]"
    )
    assert code == 0, err
    assert out.startswith("corridor_figure: 2 of 4 runs; the whole costs 1 minute on two cores\n")
    assert "left no record" not in out


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "4 runs; cost: 1 minute on two cores"),
        (["immunize.lambda_h=1e-3"], "2 of 4 runs; the whole costs 1 minute on two cores"),
        (["seeds=[0],[1]"], "8 runs, in place of 4 which cost 1 minute on two cores"),
        (
            ["immunize=kappa,kappa_opt", "immunize.lambda_h=1e-3"],
            "4 runs; cost: 1 minute on two cores",
        ),
    ],
)
def test_the_cost_is_that_of_the_runs_as_the_yaml_has_them(overrides, told):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["sweeps=corridor_figure"], return_hydra_config=True)
    cfg.hydra.overrides.task = overrides
    assert told_cost(_jobs(cfg), cfg.sweep) == told


def config(folder, *overrides):
    """As Hydra hands it to callbacks; its jobs go to ``folder``."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[f"hydra.sweep.dir={folder}"], return_hydra_config=True)
    cfg.hydra.mode = RunMode.MULTIRUN
    cfg.hydra.overrides.task = list(overrides)
    return cfg


def test_a_sweep_that_hydra_alone_can_count_is_not_counted(tmp_path):
    cfg = config(tmp_path, "immunize=glob(kappa*)")
    assert _jobs(cfg) is None
    cfg.hydra.overrides.task = ["immunize=kappa,none", "seeds=[0],[1],[2]"]
    assert _jobs(cfg) == 6
    cfg.hydra.sweeper = OmegaConf.create({"_target_": "of.another.Sweeper"})
    assert _jobs(cfg) is None


@pytest.fixture
def ended(tmp_path, monkeypatch, capsys):
    """(folders of the published records in their order, exit codes, output, errors) of a sweep of
    four jobs.
    """
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
        sweep_codes.clear()
        SweepLeaderboard().on_multirun_end(config(tmp_path, "immunize=kappa,none", "seeds=[0],[1]"))
        codes = sorted(sweep_codes)
        sweep_codes.clear()
        return [record["name"] for record in published], codes, *capsys.readouterr()

    return call


def read(path):
    record = json.loads(path.read_text())
    if record["status"] == "damaged":
        raise UserError("records", path, "was altered.")
    return record


def test_folders_of_the_users_own_naming_keep_leaderboard_and_codes(ended):
    folders = [
        ("eta=1", "failed", None),
        ("10-b", "ok", None),
        ("9-a", "failed", "seeds"),
        ("eta=0/x", "ok", None),
    ]
    names, codes, out, _ = ended(*folders)
    assert names == ["9-a", "10-b", "eta=0/x", "eta=1"]
    assert codes == [1, 2]
    assert "left no record" not in out


def test_jobs_without_a_record_are_counted_and_a_damaged_one_stops_nothing(ended):
    names, codes, out, err = ended(("0-a", "damaged", None), ("1-b", "preempted", None))
    assert names == ["1-b"]
    assert codes == [1, 1, 130]
    assert "of 4 jobs 2 left no record" in out
    assert "0-a/record.json: was altered." in err
    assert "records=" in out
