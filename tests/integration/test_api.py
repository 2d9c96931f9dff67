"""The Python functions give what the command line writes."""

import pytest
from entry_point import FAST

from lab.api import compare, leaderboard, run
from lab.core.errors import UserError


def test_run_leaderboard_and_compare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run(FAST)
    other = run([word for word in FAST if "epochs" not in word] + ["immunize=kappa_closed_form"])
    assert (first["immunizer"], other["status"]) == ("kappa", "ok")
    table = leaderboard([first, other.folder])
    assert sorted(table["method"]) == ["kappa", "kappa_closed_form"]
    assert {"group", "verdict", "RIR"} <= set(table.columns)
    difference = compare([first, other]).loc["rir"]
    assert difference["difference"] == pytest.approx(difference["b"] - difference["a"])
    with pytest.raises(UserError, match="no immunized record"):
        leaderboard([])
    with pytest.raises(UserError, match="seeds"):
        run([*FAST, "seeds=[]"])
    assert len(list(tmp_path.rglob("record.json"))) == 2
