"""trackio: the same view in a local database (``TRACKIO_DIR``, by default below the outputs
folder).
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lab.core import record as records
from lab.core.config import Positive, Text, config
from lab.tracking import views
from lab.tracking.trackers import Tracker


@config
class TrackioTracker(Tracker):
    """One trackio run per run, in the scenario's group."""

    project: Text
    timeout_s: Positive = 20.0

    def start(self, config: dict[str, Any], folder: Path) -> None:
        os.environ.setdefault(
            "TRACKIO_DIR", str(Path(config["paths"]["outputs"]).resolve() / "trackio")
        )
        import trackio

        with redirect_stdout(sys.stderr):  # stdout belongs to the summary and the record line
            self.run = trackio.init(
                project=self.project,
                name=f"{views.run_name(config, folder)} ({views.run_id(folder)[:6]})",
                group=config["scenario"]["name"],
                config={**config, "tags": views.tags(config)},
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        self.run.log({f"{prefix}/{key}": value for key, value in values.items()}, step=step)

    def publish(self, record: records.Record, report: Path) -> None:
        import trackio

        for _, step, values in views.curve_points(record):
            self.run.log(values, step=round(step))
        views.log_media(trackio, self.run, record, report.parent)
        self.run.log(views.summary_values(record))
        with redirect_stdout(sys.stderr):
            self.run.finish()
