"""Words that are rewritten before Hydra reads them."""

import pytest
from release_examples import composed

from lab.cli.arguments import rewritten


def test_a_folder_stands_for_a_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("released", "minisd", "it's"):
        (tmp_path / name).mkdir()
    words = [
        "backbone=released",
        "backbone=minisd",
        "backbone=/no/such",
        "backbone=it's",
        "backbone=sd",
        "seeds=[0]",
    ]
    assert rewritten(words) == [
        "backbone.path=released",
        "backbone=minisd",
        "backbone.path=/no/such",
        r"backbone.path='it\'s'",
        "backbone=sd",
        "seeds=[0]",
    ]
    assert composed("experiment=audit", *rewritten(["backbone=it's"])).backbone.path == "it's"


@pytest.mark.parametrize("word", ["dry_run=true", "dry_run=True", "+dry_run=1"])
def test_a_dry_run_goes_without_its_launcher(word, capsys):
    words = ["-m", "seeds=[0]", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", word]
    found = rewritten(words)
    assert [w for w in found if "launcher" in w] == []
    assert [w for w in found if w.startswith("hydra.sweep.dir=")] != []
    assert "planned here" in capsys.readouterr().err
    kept = ["-m", "hydra/launcher=joblib", "dry_run=true", "dry_run=false"]
    assert rewritten(kept) == kept


def test_a_folder_of_the_users_own_stays():
    words = ["action=status", "hydra.run.dir=here"]
    assert rewritten(words) == words
    assert "hydra.run.dir=." in rewritten(["action=status"])
    for action in ("run", "train", "audit", "search"):
        assert rewritten([f"action={action}"]) == [f"action={action}"]
