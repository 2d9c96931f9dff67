"""What happens when a multirun begins and ends: its cost and place, then one leaderboard and one
report over its records, and its exit code.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lab.cli.errors import EXIT_DEFECT, EXIT_USER
from lab.core.sources import ROOT
from lab.runner.batch import EXIT_INTERRUPTED, discard


class SweepLeaderboard(Callback):
    """Writes ``leaderboard.{md,csv}`` and ``report.html`` beside the runs of a multirun."""

    def __init__(self) -> None:
        self.codes = [0]  # exit codes of the jobs that ran in this process

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        place = config.hydra.sweep.dir
        atexit.register(discard, Path(place))  # of a sweep whose jobs cannot be composed
        if planned := config.get("sweep"):
            out = sys.stdout if config.dry_run else sys.stderr
            print(f"{config.name}: {describe_cost(planned)}", file=out, flush=True)
        if str(config.hydra.launcher._target_).startswith("hydra._internal"):
            return  # jobs run in this process, one after another
        if (ROOT / "pyproject.toml").is_file():  # jobs run this checkout, whatever is installed
            known = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), known]))
        status = f"python run.py action=status 'records=[{place}]'"
        print(f"sweep: {place}\nprogress: {status}", file=sys.stderr, flush=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status == JobStatus.COMPLETED and isinstance(job_return.return_value, int):
            self.codes.append(job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Publish the records and end the process with the worst exit code of the jobs.

        Raises:
            SystemExit: a job failed; Hydra only warns of other exceptions.
        """
        from lab.cli.tables import publish
        from lab.cluster.status import read_process, read_queue, run_folders, state_of
        from lab.core.record import readable

        folder = Path(config.hydra.sweep.dir)
        loaded, broken = readable(sorted(folder.rglob("record.json"), key=_order))
        for error in broken:
            print(f"error: {error}", file=sys.stderr)
        failed = [EXIT_DEFECT for _ in broken]
        if loaded:  # a dry run has none
            publish(loaded, folder)
        unrecorded = [p for p in run_folders([folder]) if not (p / "record.json").is_file()]
        queue = read_queue() if unrecorded else None
        for place in unrecorded:
            state, _, message = state_of(place, read_process(place), queue)
            if state in ("failed", "killed"):
                print(f"error: {place.name}: {message}", file=sys.stderr)
                failed.append(EXIT_USER if state == "failed" else EXIT_DEFECT)
        discard(folder)
        if code := max([*self.codes, *failed, *map(exit_code, loaded)]):
            sys.exit(code)


def exit_code(record: dict[str, Any]) -> int:
    """Return the exit code of the job that wrote ``record``."""
    if record["status"] == "preempted":
        return EXIT_INTERRUPTED
    if record["status"] != "failed":
        return 0
    return EXIT_DEFECT if record["error"]["key"] is None else EXIT_USER


def _order(path: Path) -> tuple[float, str]:
    """Sort by the job's number, with which its folder begins unless the user chose other names."""
    number = path.parent.name.split("-")[0]
    return int(number) if number.isdecimal() else math.inf, str(path)


def describe_cost(planned: DictConfig) -> str:
    """Return how many runs a sweep has and its cost, as its YAML states both."""
    return f"{planned.runs} runs in its YAML; cost: {planned.cost}"
