"""What happens when a multirun ends: one leaderboard and one report over its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepLeaderboard(Callback):
    """Writes ``leaderboard.{md,csv,html}`` and ``report.html`` beside the runs of a multirun."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from lab.actions import publish
        from lab.record import read

        folder = Path(config.hydra.sweep.dir)
        paths = sorted(folder.rglob("record.json"), key=lambda p: int(p.parent.name.split("-")[0]))
        if paths:  # a dry run has none
            publish([read(path) for path in paths], folder)
