"""What every tracker shows of a run, computed from its config and record alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from lab.core import record as records
from lab.core.types import BASELINE

IMMUNIZE, ATTACK, EVAL = STAGES = ("immunize", "attack", "eval")  # job types
_NAMED = (
    "immunize.",
    "attacks.",
    "erase.",
    "backbone.",
    "scenario.",
    "budget.",
)  # overrides worth a place in the name
_NAME_LENGTH, _TAG_LENGTH = 100, 64


def run_id(folder: str | Path, stage: str) -> str:
    """The W&B id of one stage of the run in ``folder``: the same run is the same id wherever it is
    logged again.
    """
    return f"{hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:12]}-{stage}"


def run_name(config: dict[str, Any], folder: str | Path) -> str:
    """``kappa eta=0.05 on house_price``: the immunizer, what the command line changed, the
    scenario.
    """
    path = Path(folder) / ".hydra" / "overrides.yaml"
    given = yaml.safe_load(path.read_text()) if path.is_file() else []
    pairs = [str(o).lstrip("+").partition("=") for o in given]
    changed = [
        f"{key.rsplit('.', 1)[-1]}={value}" for key, _, value in pairs if key.startswith(_NAMED)
    ]
    name = " ".join([config["immunize"]["name"], *changed, "on", config["scenario"]["name"]])
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def tags(config: dict[str, Any]) -> list[str]:
    """Study, immunizer, backbone and attackers."""
    found = [
        config["name"],
        config["immunize"]["name"],
        config["backbone"]["name"],
        *config["attacks"],
    ]
    return [str(tag)[:_TAG_LENGTH] for tag in dict.fromkeys(found)]


def stage_of(curve: dict[str, Any]) -> str:
    """A curve over immunization steps belongs to the first stage, every other one to the attack."""
    return IMMUNIZE if str(curve.get("x", "")).startswith("immunization") else ATTACK


def curve_rows(record: records.Record, stage: str) -> list[tuple[float, dict[str, float]]]:
    """(step, values) over the steps of all curves of ``stage``, which so share one axis; missing
    points are left out.

    Keys are ``CURVE/baseline`` and ``CURVE/immunized``, whatever the immunizer's name, so that the
    curves of several runs fall into one panel; limits of a band end in ``_low`` and ``_high``.
    """
    rows: dict[float, dict[str, float]] = {}
    for name, curve in record["curves"].items():
        if stage_of(curve) != stage:
            continue
        for key, values in curve.items():
            if not isinstance(values, list) or key == "step":
                continue
            model_name, _, limit = key.partition(":")
            shown = f"{name}/{_side(model_name, record)}{f'_{limit}' if limit else ''}"
            for step, value in zip(curve["step"], values, strict=False):
                if step is not None and value is not None:
                    rows.setdefault(float(step), {})[shown] = value
    return sorted(rows.items())


def _side(model_name: str, record: records.Record) -> str:
    if model_name == BASELINE:
        return "baseline"
    return "immunized" if model_name == record["immunizer"] else model_name


def columns_and_rows(table: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    columns = list(dict.fromkeys(key for row in table for key in row))
    return columns, [[row.get(c) for c in columns] for row in table]


def tables(record: records.Record) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """The metrics and every table of the record that has rows, as columns and rows."""
    metrics = [{"metric": name, **item} for name, item in record["metrics"].items()]
    return {
        name: columns_and_rows(t)
        for name, t in {"metrics": metrics, **record["tables"]}.items()
        if t
    }


def summary_values(record: records.Record) -> dict[str, float]:
    """Metric values and interval ends, flat: ``rir``, ``rir_low``, ``rir_high``."""
    flat = {}
    for name, item in record["metrics"].items():
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            if item[part] is not None:
                flat[name + suffix] = item[part]
    return flat


def grids(record: records.Record, folder: Path) -> dict[str, tuple[Path, str]]:
    """Picture grids of the record: name → (file, caption), those that are there."""
    found = {
        name: (folder / image["path"], image["caption"])
        for name, image in record.get("images", {}).items()
    }
    return {name: item for name, item in found.items() if item[0].is_file()}


def plots(record: records.Record, folder: Path) -> dict[str, Path]:
    """One PNG per curve, with its interval band, which dashboards do not draw."""
    from eval.report.plots import curve_png

    out = folder / "plots"
    out.mkdir(exist_ok=True)
    return {
        name: curve_png(name, curve, out / f"{name}.png")
        for name, curve in record["curves"].items()
    }


def weights(record: records.Record) -> dict[str, Path]:
    """``CASE/seedN`` → the file in the stage cache with what the immunizer changed, those that are
    there.
    """
    cache = Path(record["config"].get("paths", {}).get("cache", ""))
    found = {}
    for cell in record["cells"]:
        if (
            cell["stage"] == IMMUNIZE
            and cell["status"] == "ok"
            and cell["model"] not in (None, BASELINE)
        ):
            folder = cache / IMMUNIZE / cell["key"][:2] / cell["key"]
            if (folder / "tensors.safetensors").is_file():
                found[f"{cell['case']}/seed{cell['seed']}"] = folder / "tensors.safetensors"
    return found
