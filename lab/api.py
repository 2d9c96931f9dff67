"""The project from Python: four functions that do what the command line does.

from lab.api import audit, compare, leaderboard, run

record = run(["experiment=house_price", "immunize=kappa_opt"])
print(record["metrics"]["rir"])
leaderboard(["outputs/records/house_price_table", record])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from eval.report import leaderboard as ranking
from eval.report.compare import compare_all
from eval.report.words import UNMEASURED
from lab.cli.actions import act
from lab.cli.arguments import register_resolvers, rewrite
from lab.core import record as records
from lab.core.errors import UserError
from lab.core.record import Record
from lab.core.sources import ROOT

Records = Sequence[Mapping[str, Any] | Path | str]


def run(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Record:
    """Do a run, or read it from the cache, as ``python run.py OVERRIDES`` does.

    Args:
        overrides: words of the command line, e.g. ``["experiment=house_price", "seeds=[0]"]``.
        config_dir: folder with configs of your own, as ``--config-dir``.

    Returns:
        the record (``record.json``); its ``folder`` holds the report too.

    Raises:
        UserError: wrong input; nothing was computed.
        RunFailed: an attack or a metric failed; the record in the run folder says which.
    """
    return records.read(_act(overrides, config_dir) / "record.json")


def audit(path: str | Path, concepts: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Attack one checkpoint, as ``python run.py action=audit`` does.

    Args:
        path: folder of the checkpoint, in diffusers layout.
        concepts: YAML file that lists what must not be learned; None for those of the scenario.
        options: further keys, e.g. ``attacks="[lora]"``.

    Returns:
        what ``verdict.json`` holds: the verdict (passes, fails or inconclusive), its checks and
        limits.

    Raises:
        UserError: see `run`.
    """
    words = {"action": "audit", "path": path, "concepts": concepts, **options}
    folder = _act([f"{key}={value}" for key, value in words.items() if value is not None])
    return json.loads((folder / "verdict.json").read_text())


def compare(of: Records) -> pd.DataFrame:
    """Compare two records, or each of several with the first, as ``python run.py action=compare``
    does.

    Args:
        of: at least two records, or files or folders that hold them.

    Returns:
        a row per metric: its values ``a`` and ``b``, the ``difference`` b − a with its 95 %
        interval (``low``, ``high``), and which is better. ``attrs`` also holds the settings that
        differ. Of more than two records a row per figure and record, with p-values that are
        corrected for the number of records (`eval.report.compare.compare_many`).

    Raises:
        UserError: fewer than two records, or two that cannot be compared.
    """
    return compare_all(load(of))


def leaderboard(of: Records) -> pd.DataFrame:
    """Rank records, as ``python run.py action=leaderboard`` does.

    Args:
        of: records, or files or folders that hold them.

    Returns:
        a row per record, best first within its ``group`` (scenario, backbone, attacks): method,
        verdict, checks passed, attack success, relearning slowdown and benign cost, as text.
    """
    tables = [
        ranking.table(rows).assign(group=group)
        for group, rows in ranking.sections(ranking.leaderboard(load(of))).items()
    ]
    if not tables:
        raise UserError("records", of, "holds no immunized record.")
    return pd.concat(tables, ignore_index=True).fillna(UNMEASURED)


def load(of: Records) -> list[Record]:
    """Return records as they are, and those in files or folders."""
    loaded: list[Record] = []
    for item in of:
        if isinstance(item, Mapping):
            loaded.append(dict(item))
        else:
            loaded += [records.read(path) for path in records.find([str(item)], Path())]
    return loaded


def _act(overrides: Sequence[str], config_dir: str | Path | None = None) -> Path:
    """Compose the config and do what it says, through Hydra; return the run folder."""
    words = rewrite(overrides)
    if config_dir is not None:
        places = [f"'file://{Path(place).resolve()}'" for place in (config_dir, ROOT)]
        words.append(f"hydra.searchpath=[{','.join(places)}]")
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        job = hydra.run("config", _job, words, with_log_configuration=False)
    return job.return_value  # raises what the job raised


def _job(cfg: DictConfig) -> Path:
    folder = Path(HydraConfig.get().runtime.output_dir)
    act(cfg, folder)
    return folder
