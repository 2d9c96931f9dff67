"""What `action=new` writes runs as it is."""

import importlib

import pytest


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("immunizer", marks=pytest.mark.slow),
        pytest.param("attacker", marks=pytest.mark.slow),
        "metric",
        "scenario",
    ],
)
def test_a_new_method_passes_the_test_that_is_written_with_it(cli, tmp_path, monkeypatch, kind):
    name = f"fresh_{kind}"
    for code in (0, 2):  # the folder is there already
        cli("action=new", f"kind={kind}", f"name={name}", "path=own", code=code)
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    test = importlib.import_module(f"test_{name}")
    getattr(test, f"test_{name}_runs_and_repeats")(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"own", "out"}


def test_a_name_that_is_taken_is_refused(cli, tmp_path):
    err = cli("action=new", "kind=metric", "name=torch", code=2).err
    assert "name=torch: must be a module name that is free" in err
