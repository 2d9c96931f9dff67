"""The saved W&B view: what it shows, and what is said where no server takes it."""

import json

import pytest
from fake_records import attacked
from omegaconf import OmegaConf

from lab.core import record as records
from lab.core.errors import UserError

interface = pytest.importorskip(
    "wandb_workspaces.workspaces.interface", reason="wandb-workspaces is not installed"
)
from lab.tracking.workspace import workspace  # noqa: E402


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """Two runs that were logged offline."""
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for name, slow in (("kappa", 3.4), ("kappa_opt", 1.9)):
        records.write(attacked(name, slow, 1.03, 300.0), tmp_path / "runs" / name / "record.json")
        (tmp_path / "runs" / name / "wandb" / f"offline-run-1-{name}").mkdir(parents=True)
    wandb = {
        "name": "wandb",
        "mode": "auto",
        "project": "p",
        "entity": "me",
        "init_timeout_s": 5,
        "timeout_s": 5,
    }
    return OmegaConf.create(
        {"records": [], "paths": {"runs": str(tmp_path / "runs")}, "tracker": {"wandb": wandb}}
    )


def test_the_view_overlays_runs_of_one_scenario(cfg, tmp_path, monkeypatch, capsys):
    sent = []

    def upsert(view):
        sent.append(view)
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    monkeypatch.setattr(interface.internal, "upsert_view2", upsert)
    monkeypatch.setattr(
        interface.wandb, "Api", lambda **_: None
    )  # only asked for the server's address
    monkeypatch.setattr(interface, "get_app_url", lambda _: "http://127.0.0.1:9")
    (tmp_path / "runs/kappa/wandb/offline-run-1-kappa/run-1.wandb.synced").touch()
    workspace(cfg)
    assert capsys.readouterr().out.count("wandb sync ") == 1
    (view,) = sent
    assert (view.entity, view.project, view.display_name) == ("me", "p", "Comparison: house_price")
    (condition,) = view.spec.section.run_sets[0].filters["filters"]
    assert (condition["key"]["name"], condition["value"]) == ("group", ["house_price"])
    sections = {
        s.name: [p.config for p in s.panels] for s in view.spec.section.panel_bank_config.sections
    }
    assert list(sections) == [
        "Figures, strongest attack first",
        "Curves: attack",
        "Curves: immunize",
    ]
    curve = next(
        p
        for p in sections["Curves: attack"]
        if "norm_ratio_harmful_linear_probe" in json.dumps(p.metrics)
    )
    assert curve.x_axis == "attack/step"
    name = "attack/norm_ratio_harmful_linear_probe"
    assert set(curve.metrics) == {f"{name}/baseline", f"{name}/immunized"}


@pytest.mark.slow
def test_no_server_no_key_and_no_tracker_are_told(cfg, monkeypatch):
    with pytest.raises(UserError, match=r"did not take the view.*action=leaderboard"):
        workspace(cfg)
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UserError, match="needs a key"):
        workspace(cfg)
    cfg.tracker = {}
    with pytest.raises(UserError, match="tracker=wandb"):
        workspace(cfg)
