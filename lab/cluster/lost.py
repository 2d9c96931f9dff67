"""Runs that were killed leave no record; tables show them all the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lab.cluster.status import CONTINUE, HYDRA, lines_of, run_folders
from lab.core import record as records
from lab.core.record import Record


def lost_runs(places: Sequence[Path]) -> list[Record]:
    """A stand-in for the record of every killed run below ``places``, with status ``failed`` and no
    figures.

    What a run was to do is read from Hydra's notes; one killed before they were written is left
    out.
    """
    folders = [
        f
        for f in run_folders([p for p in places if p.is_dir()])
        if not (f / "record.json").is_file()
    ]
    found = [_stand_in(line.where) for line in lines_of(folders) if line.state == "killed"]
    return [record for record in found if record is not None]


def _stand_in(folder: Path) -> Record | None:
    try:
        cfg = OmegaConf.load(folder / HYDRA / "config.yaml")
        config = OmegaConf.to_container(cfg, resolve=True)
    except (OSError, OmegaConfBaseException):
        return None
    if (
        not isinstance(cfg, DictConfig)
        or not isinstance(config, dict)
        or cfg.get("action", "run") != "run"
    ):
        return None
    immunizer = str(cfg.immunize.name)
    return {
        "name": f"{cfg.name}/{immunizer}",
        "status": "failed",
        "scenario": str(cfg.scenario.name),
        "backbone": str(cfg.backbone.name),
        "immunizer": immunizer,
        "attacks": list(cfg.attacks),
        "seeds": list(cfg.seeds) if OmegaConf.is_list(cfg.seeds) else [cfg.seeds],
        "config": records.clean(config),
        "metrics": {},
        "notes": [],
        "content_hash": folder.name,
        "error": {
            "type": "Killed",
            "message": f"left no record; {CONTINUE}",
            "key": None,
            "last_good_step": None,
        },
    }
