"""What every tracker shows of a run, computed from its config and record alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from eval.report.words import shortened
from lab.core import record as records

IMMUNIZE, ATTACK = STAGES = ("immunize", "attack")  # each has a step axis of its own
_NAMED = ("immunize.", "attacks.", "erase.", "backbone.", "scenario.", "budget.")
_NAME_LENGTH, _TAG_LENGTH = 100, 64


def run_id(folder: Path) -> str:
    """Return the id of the run in ``folder``, the same whenever the run is logged again."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


def run_name(config: dict[str, Any], folder: Path) -> str:
    """``kappa lr=0.05 on house_price``: immunizer, what the command line changed, scenario."""
    path = folder / ".hydra" / "overrides.yaml"
    words = yaml.safe_load(path.read_text()) if path.is_file() else []
    pairs = [str(word).lstrip("+").partition("=") for word in words]
    changed = [f"{key.split('.')[-1]}={value}" for key, _, value in pairs if key.startswith(_NAMED)]
    words = [config["immunize"]["name"], *changed, "on", config["scenario"]["name"]]
    return shortened(" ".join(words), _NAME_LENGTH)


def tags(config: dict[str, Any]) -> list[str]:
    """Return study, immunizer, backbone and attackers."""
    names = [config["name"], config["immunize"]["name"], config["backbone"]["name"]]
    return [str(tag)[:_TAG_LENGTH] for tag in dict.fromkeys([*names, *config["attacks"]])]


def curves(record: records.Record, stage: str) -> pd.DataFrame:
    """Return all curves of ``stage``, which share one axis: a row per step.

    A curve over immunization steps belongs to ``immunize``, every other one to ``attack``. Columns
    are ``STAGE/CURVE/baseline`` and ``STAGE/CURVE/immunized``; limits of a band end in ``_low`` and
    ``_high``.
    """
    frames = [pd.DataFrame()]
    for name, curve in record["curves"].items():
        if curve["x"].startswith("immunization") == (stage == IMMUNIZE):
            lists = {k: v for k, v in curve.items() if isinstance(v, list) and k != "step"}
            frame = pd.DataFrame(lists, index=curve["step"], dtype=float)
            frame.columns = [f"{stage}/{name}/{key.replace(':', '_')}" for key in frame]
            frames.append(frame)
    return pd.concat(frames, axis=1).sort_index()


def curve_points(record: records.Record) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Yield (stage, step, values) of all curves; missing values are left out."""
    for stage in STAGES:
        for step, values in curves(record, stage).dropna(how="all").iterrows():
            yield stage, float(step), values.dropna().to_dict()


def summary_values(record: records.Record) -> dict[str, float]:
    """Return metric values and interval ends, flat: ``rir``, ``rir_low``, ``rir_high``."""
    return {
        f"{name}_{part}".removesuffix("_value"): score[part]
        for name, score in record["metrics"].items()
        for part in ("value", "low", "high")
        if score[part] is not None
    }


def log_media(
    module: Any, run: Any, record: records.Record, folder: Path, **table_options: Any
) -> None:
    """Log tables and image grids.

    Args:
        module: ``wandb``, or ``trackio``, which has the same interface.
        run: what its ``init`` returned.
        folder: of the record.
    """
    metrics = [{"metric": name, **score} for name, score in record["metrics"].items()]
    for name, rows in {"metrics": metrics, **record["tables"]}.items():
        frame = pd.DataFrame(rows, dtype=object)
        frame = frame.where(frame.notna(), None)
        frame = frame.map(lambda value: str(value) if isinstance(value, list | dict) else value)
        if rows:
            run.log({f"tables/{name}": module.Table(dataframe=frame, **table_options)})
    for name, image in record.get("images", {}).items():
        path = folder / image["path"]
        if path.is_file():
            run.log({f"images/{name}": module.Image(str(path), caption=image["caption"])})
