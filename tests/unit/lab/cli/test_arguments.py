"""Words of the command line that are checked and rewritten before Hydra reads them."""

import pytest
from release_examples import composed

from lab.cli.arguments import rewrite
from lab.core.errors import UserError


def test_a_folder_stands_for_a_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("released", "minisd", "it's"):
        (tmp_path / name).mkdir()
    words = ["released", "minisd", "/no/such", "it's", "sd"]
    assert rewrite([f"backbone={word}" for word in words]) == [
        "backbone.path=released",
        "backbone=minisd",
        "backbone.path=/no/such",
        r"backbone.path='it\'s'",
        "backbone=sd",
    ]
    assert composed("experiment=audit", *rewrite(["backbone=it's"])).backbone.path == "it's"


def test_a_dry_run_goes_without_its_launcher():
    launcher = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert not [word for word in rewrite([*launcher, "dry_run=True"]) if "launcher" in word]
    kept = [*launcher, "dry_run=true", "dry_run=false"]
    assert rewrite(kept) == kept


def test_a_list_for_a_group_of_one_choice_is_refused():
    """Hydra would merge the two files and name the mixture after the last."""
    with pytest.raises(UserError, match="takes one choice; for a run of each: -m immunize=kappa,"):
        rewrite(["immunize=[kappa,kappa_opt]"])
    assert rewrite(["attacks=[lora]"]) == ["attacks=[lora]"]
