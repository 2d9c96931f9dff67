"""The tracker's own process: reads one JSON message a line on stdin, writes to W&B or trackio.

Messages: ``start`` (the run's config), ``log`` (live points), ``finish`` (paths of record and report). When
stdin closes without ``finish`` the run was killed and the tracker's run ends as crashed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from lab import record as records


class Backend(Protocol):
    def start(self, config: dict[str, Any]) -> None: ...
    def log(self, prefix: str, step: int, values: dict[str, float]) -> None: ...
    def publish(self, record: records.Record, report: Path) -> None: ...
    def close(self, failed: bool) -> None: ...


def tidy_run_name(config: dict[str, Any]) -> str:
    return f"{config['immunize']['name']} on {config['scenario']['name']}"


def curve_points(curve: dict[str, Any]) -> list[tuple[float, dict[str, float]]]:
    """(step, {arm: value}) of a record's curve, without missing points."""
    arms = [k for k, v in curve.items() if isinstance(v, list) and k != "step"]
    points = []
    for i, step in enumerate(curve["step"]):
        values = {arm: curve[arm][i] for arm in arms if i < len(curve[arm]) and curve[arm][i] is not None}
        if step is not None and values:
            points.append((step, values))
    return points


def columns_and_rows(table: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    columns = list(dict.fromkeys(key for row in table for key in row))
    return columns, [[row.get(c) for c in columns] for row in table]


def summary_values(record: records.Record) -> dict[str, float]:
    """Metric values and interval ends, flat: ``rir``, ``rir_low``, ``rir_high``."""
    flat = {}
    for name, item in record["metrics"].items():
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            if item[part] is not None:
                flat[name + suffix] = item[part]
    return flat


class WandbBackend:
    """One W&B run per record: group = study, job type = scenario; offline when there is no key."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.defined: set[str] = set()

    def _mode(self) -> Any:
        mode = self.options["mode"]
        if mode != "auto":
            return mode
        import netrc

        has_key = bool(os.environ.get("WANDB_API_KEY"))
        try:
            has_key = has_key or any("wandb" in host for host in netrc.netrc().hosts)
        except (OSError, netrc.NetrcParseError):
            has_key = has_key or False  # no readable netrc: only the environment can hold a key
        return "online" if has_key else "offline"

    def start(self, config: dict[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True, save_code=False,
            init_timeout=float(self.options["init_timeout_s"]),
        )  # fmt: skip
        common: dict[str, Any] = {
            "dir": self.options["folder"], "project": self.options["project"], "entity": self.options["entity"],
            "group": config["name"], "job_type": config["scenario"]["name"], "name": tidy_run_name(config),
            "tags": [config["immunize"]["name"], config["backbone"]["name"], *config["attacks"]],
            "config": config, "settings": settings,
        }  # fmt: skip
        mode = self._mode()
        try:
            self.run = wandb.init(mode=mode, **common)
        except (wandb.Error, OSError, TimeoutError) as error:
            if mode == "offline":
                raise
            print(f"W&B is not reachable with this key ({type(error).__name__}); logging offline", file=sys.stderr)
            self.run = wandb.init(mode="offline", **common)

    def _point(self, prefix: str, step: float, values: dict[str, float]) -> None:
        if prefix not in self.defined:
            self.run.define_metric(f"{prefix}/step", hidden=True)
            self.run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
            self.defined.add(prefix)
        self.run.log({f"{prefix}/step": step} | {f"{prefix}/{k}": v for k, v in values.items()})

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        self._point(prefix, step, values)

    def publish(self, record: records.Record, report: Path) -> None:
        import wandb

        for name, curve in record["curves"].items():
            for step, values in curve_points(curve):
                self._point(f"curves/{name}", step, values)
        metrics = [{"metric": name, **item} for name, item in record["metrics"].items()]
        tables = {"metrics": metrics, **record["tables"]}
        for name, table in tables.items():
            if table:
                columns, rows = columns_and_rows(table)
                text = [[v if isinstance(v, float | int | None) else str(v) for v in row] for row in rows]
                self.run.log(
                    {f"tables/{name}": wandb.Table(columns=list[str | int](columns), data=text, allow_mixed_types=True)}
                )
        for name, png in render_curves(record, report.parent).items():
            self.run.log({f"images/{name}": wandb.Image(str(png))})
        self.run.summary.update(summary_values(record))
        self.run.summary.update({"status": record["status"], "content_hash": record["content_hash"]})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)


class TrackioBackend:
    """The same view in trackio's local database (``TRACKIO_DIR``, by default below the outputs folder)."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def start(self, config: dict[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(Path(config["paths"]["outputs"]).resolve() / "trackio"))
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=self.options["project"], name=f"{tidy_run_name(config)} {Path(self.options['folder']).name}",
            group=config["name"], config=config, embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        self.trackio.log({f"{prefix}/{k}": v for k, v in values.items()}, step=step)

    def publish(self, record: records.Record, report: Path) -> None:
        import pandas as pd

        for name, curve in record["curves"].items():
            for step, values in curve_points(curve):
                self.trackio.log({f"curves/{name}/{k}": v for k, v in values.items()}, step=round(step))
        metrics = [{"metric": name, **item} for name, item in record["metrics"].items()]
        for name, table in {"metrics": metrics, **record["tables"]}.items():
            if table:
                columns, rows = columns_and_rows(table)
                frame = pd.DataFrame([[str(v) if isinstance(v, list | dict) else v for v in r] for r in rows])
                frame.columns = pd.Index(columns)
                self.trackio.log({f"tables/{name}": self.trackio.Table(dataframe=frame)})
        for name, png in render_curves(record, report.parent).items():
            self.trackio.log({f"images/{name}": self.trackio.Image(str(png))})
        self.trackio.log(summary_values(record))

    def close(self, failed: bool) -> None:
        self.trackio.finish()


def render_curves(record: records.Record, folder: Path) -> dict[str, Path]:
    """One PNG per curve of the record, for dashboards that show pictures."""
    from eval.report.plots import curve_png

    out = folder / "images"
    out.mkdir(exist_ok=True)
    return {name: curve_png(name, curve, out / f"{name}.png") for name, curve in record["curves"].items()}


BACKENDS: dict[str, type[Any]] = {"wandb": WandbBackend, "trackio": TrackioBackend}


def main(argument: str) -> int:
    options = json.loads(argument)
    backend: Backend = BACKENDS[options["name"]](options)
    finished = False
    for line in sys.stdin:
        message = json.loads(line)
        if message["event"] == "start":
            backend.start(message["config"])
        elif message["event"] == "log":
            backend.log(message["prefix"], message["step"], message["values"])
        else:
            record = records.read(Path(message["record"]))
            backend.publish(record, Path(message["report"]))
            finished = record["status"] == "ok"
            break
    backend.close(failed=not finished)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
