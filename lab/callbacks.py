"""What happens when a multirun begins and ends: where it goes, one leaderboard and one report over its records."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

sweep_codes: list[int] = []  # exit codes of failed jobs, also of those that ran in other processes
_CODES = {"failed": 1, "preempted": 130}


class SweepLeaderboard(Callback):
    """Writes ``leaderboard.{md,csv,html}`` and ``report.html`` beside the runs of a multirun."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from lab.sources import ROOT

        if (stated := config.get("sweep")) is not None:
            out = sys.stdout if config.dry_run else sys.stderr
            print(f"{config.name}: {stated.runs} runs; cost: {stated.cost}", file=out, flush=True)
        if str(config.hydra.launcher._target_).startswith("hydra._internal"):
            return  # jobs run here, one after another
        if (ROOT / "pyproject.toml").is_file():  # jobs run the code of this checkout, whatever is installed
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        place = Path(config.hydra.sweep.dir)
        print(f"sweep: {place}\nprogress: python run.py action=status 'records=[{place}]'", file=sys.stderr, flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from lab.actions import publish
        from lab.record import read

        folder = Path(config.hydra.sweep.dir)
        paths = sorted(folder.rglob("record.json"), key=lambda p: int(p.parent.name.split("-")[0]))
        found = [read(path) for path in paths]
        for record in found:
            if record["status"] in _CODES:
                mended = record["status"] == "failed" and record["error"]["key"] is not None
                sweep_codes.append(2 if mended else _CODES[record["status"]])
        if found:  # a dry run has none
            publish(found, folder)
