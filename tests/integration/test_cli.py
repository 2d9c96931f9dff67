"""`python run.py` as a user calls it: results, errors with exit code 2, actions, sweeps."""

import signal

import pytest
from entry_point import FAST, record_of
from processes import ended, start, until

import immunize.kappa.method
from immunize.kappa.method import SpectralTrainer

STUDY = [word for word in FAST if "epochs" not in word]


def test_the_closed_form_reaches_the_bound_on_real_data(cli, tmp_path):
    metrics = record_of(cli(*STUDY, "immunize=kappa_closed_form").out, tmp_path)["metrics"]
    assert metrics["rir_bound_ratio"]["value"] == pytest.approx(1, abs=1e-6)
    assert metrics["rir"]["value"] == pytest.approx(metrics["rir_bound"]["value"], rel=1e-6)
    assert metrics["rir"]["value"] > 10


def test_a_run_ends_with_its_record_and_the_second_time_hits_the_cache(cli, tmp_path):
    first = record_of(cli(*FAST).out, tmp_path)
    assert (first["status"], first["immunizer"], first["metrics"]["rir"]["n"]) == ("ok", "kappa", 1)
    assert first["provenance"]["cache_hits"] == 0
    assert {c["model"] for c in first["stages"]} == {"baseline", "immunized", None}
    assert next((tmp_path / "outputs").rglob("report.html")).is_file()
    second = record_of(cli(*FAST).out, tmp_path)
    assert (second["provenance"]["cache_misses"], second["content_hash"]) == (
        0,
        first["content_hash"],
    )
    assert [c["seconds"] for c in second["stages"]] == [c["seconds"] for c in first["stages"]]


@pytest.mark.parametrize(
    ("words", "skipped"),
    [([*STUDY, "immunize=none"], "verdict"), ([*FAST, "attacks=none"], "convergence")],
)
def test_a_run_without_an_immunizer_or_without_attacks(cli, tmp_path, words, skipped):
    assert skipped in record_of(cli(*words).out, tmp_path)["skipped"]


def test_dry_run_prints_the_plan_and_computes_nothing(cli, tmp_path):
    cli(*FAST, "dry_run=true")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    cli(*FAST)
    assert "10 stages, 10 cached" in cli(*FAST, "dry_run=true").out
    assert "10 stages, 6 cached, about" in cli(*FAST, "dry_run=true", "force=attack").out


def test_what_is_printed(cli, tmp_path):
    out, err = cli(*FAST, "fail_on=fails", code=3)
    assert "\nrun folder: outputs/runs/house_price/" in err
    assert "10 stages, 0 cached, about" in err
    assert "[4/10] attack linear_probe on LotArea (house_price), immunized, seed 0 … ETA" in err
    assert out.startswith("✗ kappa fails: ")
    assert "harmful slowdown" in out
    assert "\033" not in out + err
    assert len(out.splitlines()) < 15
    assert "kappa_pencil_baseline" in cli(*FAST, "verbose=true").out


@pytest.mark.parametrize("mistake", ["scenario.path=/nowhere", "force=all", "eval=[]", "x=1"])
def test_a_mistake_leaves_nothing_behind(cli, tmp_path, mistake):
    assert "run folder" not in cli(*FAST, mistake, code=2).err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_a_record_and_the_next_run_continues(cli, tmp_path, monkeypatch):
    class Interrupted(SpectralTrainer):
        def descend(self, step):
            if step == 9:
                raise KeyboardInterrupt
            return super().descend(step)

    with monkeypatch.context() as patch:
        patch.setattr(immunize.kappa.method, "SpectralTrainer", Interrupted)
        out, err = cli(*FAST, "immunize.checkpoint_every=4", code=130)
    assert "continues" in err
    stopped = record_of(out, tmp_path)
    assert (stopped["status"], stopped["error"]["last_good_step"]) == ("preempted", 8)
    assert [c["status"] for c in stopped["stages"]][:2] == ["ok", "pending"]
    out = cli(*FAST, "immunize.checkpoint_every=4").out
    assert record_of(out, tmp_path)["provenance"]["cache_hits"] == 1  # the baseline model


def test_a_diverged_case_is_counted_and_said(cli, tmp_path):
    record = record_of(cli(*FAST, "immunize=kappa_paper_house_price").out, tmp_path)
    assert (record["status"], record["metrics"]) == ("diverged", {})
    assert record["error"]["last_good_step"] >= 0
    assert [c["status"] for c in record["stages"] if c["model"] == "immunized"] == ["diverged"]


def test_the_wiring_preset_runs_every_stage_in_few_steps(cli, tmp_path):
    told = cli("experiment=house_price", "debug=wiring", "immunize.epochs=1")
    record = record_of(told.out, tmp_path)
    assert {c["kind"] for c in record["stages"]} == {"immunize", "attack", "eval"}
    assert (record["seeds"], record["config"]["tracker"]) == ([0], {})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_preempted_record_and_a_checkpoint(tmp_path, number):
    options = [
        "experiment=house_price",
        "tracker=none",
        "threads=1",
        "seeds=[0,1,2,3,4,5,6,7]",
        "immunize.epochs=2000",
    ]
    process = start(tmp_path, *options)
    until(lambda: list(tmp_path.rglob("*.ckpt")), "a checkpoint")
    process.send_signal(number)
    out, _ = ended(process, code=130)
    assert record_of(out, tmp_path)["status"] == "preempted"
    assert list(tmp_path.rglob("*.ckpt"))
