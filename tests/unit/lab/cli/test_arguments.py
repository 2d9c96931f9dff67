"""Words of the command line that are checked and rewritten before Hydra reads them."""

import pytest

from lab.cli.arguments import rewrite
from lab.core.errors import UserError


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
