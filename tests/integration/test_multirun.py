"""`python run.py -m …`: every group, the leaderboard at the end, jobs that fail."""

import re

import pytest
from entry_point import FAST

from lab.core import record as records

EVERY_GROUP = {
    "scenario": ["scenario=house_price,mnist_harm_set"],
    "backbone": ["backbone=linear,linear_release"],
    "erase": ["experiment=first_run", "erase=none,uce"],
    "immunize": ["immunize=none,kappa"],
    "attacks": ["attacks=[linear_probe],[probe_adam,probe_newton]"],
    "eval": ["eval=[conditioning],[geometry]"],
    "tracker": ["tracker=[none],[trackio]"],
    "launch": ["launch=none,cpu"],
    "experiment": ["experiment=house_price,first_run"],
    "debug": ["debug=smoke,wiring"],
}
FAST_GROUPS = ("immunize", "attacks", "debug")  # a part, a list of parts, options of several


@pytest.mark.parametrize(
    "group",
    [g if g in FAST_GROUPS else pytest.param(g, marks=pytest.mark.slow) for g in EVERY_GROUP],
)
def test_every_group_can_be_swept(cli, tmp_path, group):
    words = EVERY_GROUP[group]
    study = [] if any(w.startswith("experiment=") for w in words) else ["experiment=house_price"]
    out = cli("-m", *study, *words, "dry_run=true").out
    assert len(re.findall(r"^\d+ stages", out, flags=re.M)) == 2, out
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.slow
def test_a_sweep_ends_with_one_leaderboard_and_goes_on_after_a_failed_job(cli, tmp_path):
    grid = ["immunize=kappa,kappa_well_only", "immunize.lambda_p=1,-1"]
    err = cli("-m", *FAST, *grid, code=2).err
    board = next(tmp_path.rglob("leaderboard.md")).read_text()
    found = [records.read(p)["status"] for p in tmp_path.rglob("record.json")]
    assert found == ["ok", "ok"], err  # a refused job leaves nothing behind
    assert "kappa_well_only" in board
    assert len(list(tmp_path.rglob(".hydra"))) == 2
