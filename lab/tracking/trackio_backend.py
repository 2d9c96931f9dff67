"""trackio: the same view in a local database (``TRACKIO_DIR``, by default below the outputs
folder).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lab.core import record as records
from lab.tracking import views


def folder_of(paths: dict[str, Any]) -> Path:
    """Where trackio's databases lie: ``TRACKIO_DIR``, else ``trackio`` in the outputs folder."""
    return Path(os.environ.get("TRACKIO_DIR") or Path(paths["outputs"]).resolve() / "trackio")


class TrackioBackend:
    """One trackio run per run, in the scenario's group."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def start(self, config: dict[str, Any]) -> None:
        os.environ["TRACKIO_DIR"] = str(folder_of(config["paths"]))
        import trackio

        self.trackio = trackio
        name = (
            f"{views.run_name(config, self.options['folder'])} "
            f"({views.run_id(self.options['folder'], '')[:6]})"
        )
        self.run = trackio.init(
            project=self.options["project"],
            name=name,
            group=config["scenario"]["name"],
            config={**config, "tags": views.tags(config)},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        self.trackio.log({f"{prefix}/{k}": v for k, v in values.items()}, step=step)

    def publish(self, record: records.Record, report: Path) -> None:
        import pandas as pd

        for stage in (views.IMMUNIZE, views.ATTACK):
            for step, values in views.curve_rows(record, stage):
                self.trackio.log({f"{stage}/{k}": v for k, v in values.items()}, step=round(step))
        for name, (columns, rows) in views.tables(record).items():
            frame = pd.DataFrame(
                [[str(v) if isinstance(v, list | dict) else v for v in r] for r in rows]
            )
            frame.columns = pd.Index(columns)
            self.trackio.log({f"tables/{name}": self.trackio.Table(dataframe=frame)})
        for name, (png, caption) in views.grids(record, report.parent).items():
            self.trackio.log({f"images/{name}": self.trackio.Image(str(png), caption=caption)})
        for name, png in views.plots(record, report.parent).items():
            self.trackio.log({f"plots/{name}": self.trackio.Image(str(png))})
        self.trackio.log(views.summary_values(record))

    def close(self, failed: bool) -> None:
        self.trackio.finish()
