"""What every tracker shows of a run, computed from its config and record alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lab.core import record as records
from lab.core.types import BASELINE

IMMUNIZE, ATTACK = STAGES = ("immunize", "attack")  # each has a step axis of its own
_NAMED = ("immunize.", "attacks.", "erase.", "backbone.", "scenario.", "budget.")
_NAME_LENGTH, _TAG_LENGTH = 100, 64


def run_id(folder: str | Path) -> str:
    """Return the id of the run in ``folder``, the same whenever the run is logged again."""
    return hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:12]


def run_name(config: dict[str, Any], folder: str | Path) -> str:
    """``kappa lr=0.05 on house_price``: immunizer, what the command line changed, scenario."""
    path = Path(folder) / ".hydra" / "overrides.yaml"
    words = yaml.safe_load(path.read_text()) if path.is_file() else []
    pairs = [str(word).lstrip("+").partition("=") for word in words]
    changed = [
        f"{key.rsplit('.', 1)[-1]}={value}" for key, _, value in pairs if key.startswith(_NAMED)
    ]
    name = " ".join([config["immunize"]["name"], *changed, "on", config["scenario"]["name"]])
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def tags(config: dict[str, Any]) -> list[str]:
    """Return study, immunizer, backbone and attackers."""
    names = [config["name"], config["immunize"]["name"], config["backbone"]["name"]]
    names += config["attacks"]
    return [str(tag)[:_TAG_LENGTH] for tag in dict.fromkeys(names)]


def curve_rows(record: records.Record, stage: str) -> list[tuple[float, dict[str, float]]]:
    """Return (step, values) over the steps of all curves of ``stage``, which share one axis.

    A curve over immunization steps belongs to ``immunize``, every other one to ``attack``. Missing
    points are left out. Keys are ``CURVE/baseline`` and ``CURVE/immunized``; limits of a
    band end in ``_low`` and ``_high``.
    """
    rows: dict[float, dict[str, float]] = {}
    for name, curve in record["curves"].items():
        is_immunization = str(curve.get("x", "")).startswith("immunization")
        if is_immunization != (stage == IMMUNIZE):
            continue
        for key, values in curve.items():
            if not isinstance(values, list) or key == "step":
                continue
            model_name, _, limit = key.partition(":")
            suffix = f"_{limit}" if limit else ""
            shown = f"{name}/{model_name}{suffix}"
            for step, value in zip(curve["step"], values, strict=False):
                if step is not None and value is not None:
                    rows.setdefault(float(step), {})[shown] = value
    return sorted(rows.items())


def curve_points(record: records.Record) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Yield (stage, step, values) of all curves; keys begin with the stage."""
    for stage in STAGES:
        for step, values in curve_rows(record, stage):
            yield stage, step, {f"{stage}/{key}": value for key, value in values.items()}


def tables(record: records.Record) -> dict[str, pd.DataFrame]:
    """Return the metrics and every table of the record that has rows; lists and dicts as text."""
    metrics = [{"metric": name, **score} for name, score in record["metrics"].items()]
    frames = {}
    for name, rows in {"metrics": metrics, **record["tables"]}.items():
        if rows:
            frame = pd.DataFrame(rows, dtype=object).astype(object)
            frame = frame.where(frame.notna(), None)
            frames[name] = frame.map(lambda v: str(v) if isinstance(v, list | dict) else v)
    return frames


def summary_values(record: records.Record) -> dict[str, float]:
    """Return metric values and interval ends, flat: ``rir``, ``rir_low``, ``rir_high``."""
    return {
        name + suffix: score[part]
        for name, score in record["metrics"].items()
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high"))
        if score[part] is not None
    }


def grids(record: records.Record, folder: Path) -> dict[str, tuple[Path, str]]:
    """Return the image grids that are on disk: name → (file, caption)."""
    images = record.get("images", {}).items()
    files = {name: (folder / image["path"], image["caption"]) for name, image in images}
    return {name: (path, caption) for name, (path, caption) in files.items() if path.is_file()}


def log_media(
    module: Any, run: Any, record: records.Record, folder: Path, **table_options: Any
) -> None:
    """Log tables, image grids and curves, with their interval bands, which dashboards do not draw.

    Args:
        module: ``wandb``, or ``trackio``, which has the same interface.
        run: what its ``init`` returned.
        folder: of the record. Trackers run at the same time, so each has its own folder for plots.
    """
    from eval.report.plots import curve_png

    for name, frame in tables(record).items():
        run.log({f"tables/{name}": module.Table(dataframe=frame, **table_options)})
    for name, (png, caption) in grids(record, folder).items():
        run.log({f"images/{name}": module.Image(str(png), caption=caption)})
    plots = folder / "plots" / module.__name__
    plots.mkdir(parents=True, exist_ok=True)
    for name, curve in record["curves"].items():
        png = curve_png(name, curve, plots / f"{name}.png")
        run.log({f"plots/{name}": module.Image(str(png))})


def files(record: records.Record, report: Path) -> dict[str, Path]:
    """Return name → path of record, report, image grids, and immunized weights in the cache."""
    folder = report.parent.resolve()
    cache = Path(record["config"].get("paths", {}).get("cache", "")).resolve() / IMMUNIZE
    images = [path.resolve() for path, _ in grids(record, folder).values()]
    paths = [folder / "record.json", report.resolve(), *images]
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    for cell in record["cells"]:
        if cell["stage"] == IMMUNIZE and cell["model"] not in (None, BASELINE):
            name = f"weights/{cell['case']}/seed{cell['seed']}.safetensors"
            named[name] = cache / cell["key"][:2] / cell["key"] / "tensors.safetensors"
    return {name: path for name, path in named.items() if path.is_file()}
