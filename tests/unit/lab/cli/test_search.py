"""The search over settings: its space, its table, and that it goes on after failures and
interruptions.
"""

import csv

import pytest
from fake_records import metric, record
from omegaconf import OmegaConf

from eval.report.pareto import Trial, to_csv, to_html, to_markdown
from lab.cluster import launch
from lab.core import record as records
from lab.core.errors import UserError

SMALL = ["sweeps=tune_kappa", "tracker=none", "search.startup=3"]


def write_record(cfg, folder, status="ok", values=(1.0, 1.0, 1.0)):
    """The record of a trial whose three objectives are given."""
    sides = ("higher", "higher", "lower")
    metrics = dict(zip(cfg.search.objectives.values(), map(metric, values, sides), strict=True))
    error = {"type": "Diverged", "message": "ran away", "key": None, "last_good_step": 3}
    parts = {"metrics": metrics} if status == "ok" else {"error": error}
    config = OmegaConf.to_container(cfg, resolve=True)
    records.write(record(status=status, config=config, **parts), folder / "record.json")


@pytest.fixture
def cli(cli, monkeypatch):
    """Calls the entry point with runs that take no time; ``seen`` holds the config of each."""
    seen = []

    def fake(cfg, folder):
        seen.append(cfg)
        lr = cfg.immunize.lr
        write_record(cfg, folder, values=(1 + lr, 2 - (lr - 0.2) ** 2, 1 + cfg.immunize.supervised))

    def call(*arguments, run=fake, code=0):
        monkeypatch.setattr(launch, "launch", run)
        seen.clear()
        return cli(*SMALL, *arguments, code=code)

    call.seen, call.fake = seen, fake
    monkeypatch.setattr(
        "lab.cli.tables.render", lambda found, out: out
    )  # tested elsewhere, and slow
    return call


def table(tmp_path):
    newest = max(tmp_path.rglob("pareto.csv"), key=lambda p: p.stat().st_mtime_ns)
    return list(csv.DictReader(newest.open())), newest.parent


def values(row):
    return {key: value for key, value in row.items() if key.startswith("immunize.")}


def test_a_search_tries_the_preset_first_and_ends_with_a_front(cli, tmp_path):
    cli("search.trials=5")
    rows, folder = table(tmp_path)
    assert [int(r["trial"]) for r in rows] == list(range(5))
    assert rows[0]["immunize.lr"] == "0.1"
    assert len({r["immunize.lr"] for r in rows}) == 5
    assert [c.immunize.lr for c in cli.seen] == [float(r["immunize.lr"]) for r in rows]
    assert any(r["front"] == "1" for r in rows)
    assert "immunize.lr=0.1" in (folder / "0-kappa/.hydra/overrides.yaml").read_text()


@pytest.mark.slow
def test_the_same_command_proposes_the_same_trials(cli, tmp_path):
    cli("search.trials=4")
    first, _ = table(tmp_path)
    cli("search.trials=4")
    again, _ = table(tmp_path)
    assert again == first
    cli("search.trials=2", "search.seed=1")
    assert values(table(tmp_path)[0][1]) != values(first[1])


def test_an_interrupted_search_keeps_its_table_and_goes_on(cli, tmp_path):
    def stops(cfg, folder):
        if folder.name == "3-kappa":
            raise KeyboardInterrupt
        cli.fake(cfg, folder)

    cli("search.trials=5", run=stops, code=130)
    before, _ = table(tmp_path)
    assert len(before) == 3
    cli("search.trials=5")
    after, _ = table(tmp_path)
    assert ([values(r) for r in after[:3]], len(after)) == ([values(r) for r in before], 5)


def test_a_trial_that_fails_or_diverges_stays_in_the_table_and_stops_nothing(cli, tmp_path):
    def some_fail(cfg, folder):
        number = int(folder.name.split("-")[0])
        if number == 1:
            write_record(cfg, folder, status="failed")
            raise UserError("immunize.lr", cfg.immunize.lr, "is too large.")
        if number == 2:
            write_record(cfg, folder, status="diverged")
        elif number == 3:
            write_record(cfg, folder, status="failed")
            raise ZeroDivisionError("a defect")
        else:
            cli.fake(cfg, folder)

    cli("search.trials=5", run=some_fail, code=1)
    rows, _ = table(tmp_path)
    assert "is too large" in rows[1]["failure"]
    assert rows[3]["failure"] == "ZeroDivisionError: a defect"
    assert [rows[i]["front"] for i in (1, 2, 3)] == ["0"] * 3


def test_a_preset_that_fails_stops_the_search(cli):
    def fails(cfg, folder):
        raise UserError("scenario.path", "x", "does not exist.")

    assert "scenario.path=x" in cli("search.trials=5", run=fails, code=2).err


def test_dry_run_prints_runs_cost_and_space(cli):
    out = cli("dry_run=true").out
    assert "tune_kappa: 24 trials, one after another; 24 runs in its YAML; cost: 10 min" in out
    assert not cli.seen


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("+search.space.etta=[1,2]", "search.space.etta"),
        ("~search.objectives", "search.objectives"),
        ("+scenario.split=test", "scenario.split"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(cli, argument, key):
    assert f"error: {key}" in cli(argument, code=2).err
    assert not cli.seen


def trial(number, a, b, failure=None):
    sides = {"a": "higher", "b": "lower"}
    metrics = {
        k: {
            "value": v,
            "low": None,
            "high": None,
            "n": 1,
            "better": sides[k],
            "interval": "point",
            "note": None,
            "unit": "",
        }
        for k, v in (("a", a), ("b", b))
    }
    return Trial(number, {"immunize.lr": number / 10}, {} if failure else metrics, failure)


def test_the_table_is_escaped_and_complete():
    objectives = {"a": "rir", "b": "slowdown_benign_worst"}
    trials = [trial(0, 1.0, 2.0), trial(1, 2.0, 1.0), trial(2, 0, 0, failure="<script> | broke")]
    assert "<script> | broke" not in to_html(objectives, trials, {1})
    assert "\\| broke" in to_markdown(objectives, trials, {1})
    rows = list(csv.DictReader(to_csv(objectives, trials, {1}).splitlines()))
    assert [(r["trial"], r["front"], r["rir"]) for r in rows] == [
        ("0", "0", "1.0"),
        ("1", "1", "2.0"),
        ("2", "0", ""),
    ]
