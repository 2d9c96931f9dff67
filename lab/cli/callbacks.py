"""What happens when a multirun begins and ends: its cost and place, then one leaderboard and one
report over its records, and its exit code.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lab.cli.errors import EXIT_DEFECT, EXIT_INTERRUPTED, EXIT_USER


class SweepLeaderboard(Callback):
    """Writes ``leaderboard.{md,csv,html}`` and ``report.html`` beside the runs of a multirun."""

    def __init__(self) -> None:
        self.codes = [0]  # exit codes of the jobs that ran in this process

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from lab.core.sources import ROOT

        if (planned := config.get("sweep")) is not None:
            out = sys.stdout if config.dry_run else sys.stderr
            cost = describe_cost(count_jobs(config), planned)
            print(f"{config.name}: {cost}", file=out, flush=True)
        if str(config.hydra.launcher._target_).startswith("hydra._internal"):
            return  # jobs run in this process, one after another
        if (ROOT / "pyproject.toml").is_file():  # jobs run this checkout, whatever is installed
            known = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), known]))
        place = config.hydra.sweep.dir
        print(f"sweep: {place}\nprogress: {_status(place)}", file=sys.stderr, flush=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if isinstance(job_return.return_value, int):
            self.codes.append(job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Publish the records and end the process with the worst exit code of the jobs.

        Raises:
            SystemExit: a job failed; Hydra only warns of other exceptions.
        """
        from lab.cli.actions import publish
        from lab.cluster.status import lost_runs
        from lab.core.record import readable

        folder = Path(config.hydra.sweep.dir)
        paths = sorted(folder.rglob("record.json"), key=_order)
        found, broken = readable(paths)
        codes = [*self.codes, *map(_code, found)]
        for error in broken:
            print(f"error: {error}", file=sys.stderr)
            codes.append(EXIT_DEFECT)
        if found:  # a dry run has none
            publish(found, folder, lost_runs([folder]))
        expected = count_jobs(config) or 0
        is_partial = bool(OmegaConf.select(config, "launch.machine_rank"))
        if config.action == "run" and not (config.dry_run or is_partial) and expected > len(paths):
            codes.append(EXIT_DEFECT)
            print(
                f"of {expected} jobs {expected - len(paths)} left no record: killed, or see their "
                f"messages; `{_status(folder)}`"
            )
        if max(codes):
            sys.exit(max(codes))


def _status(folder: str | Path) -> str:
    return f"python run.py action=status 'records=[{folder}]'"


def _code(record: dict[str, Any]) -> int:
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


def count_jobs(config: DictConfig) -> int | None:
    """Return the number of jobs of a sweep; None where only Hydra knows it, as for ``glob(*)``."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not str(config.hydra.sweeper._target_).endswith(f".{BasicSweeper.__name__}"):
        return None
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    words = [*params, *config.hydra.overrides.task]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
        return len(BasicSweeper.split_arguments(overrides, None)[0])
    except HydraException:
        return None


def describe_cost(jobs: int | None, planned: DictConfig) -> str:
    """Return how many runs a sweep has and its cost; the cost is that of all runs of the YAML."""
    if jobs is None or jobs == planned.runs:
        return f"{planned.runs} runs; cost: {planned.cost}"
    if jobs < planned.runs:
        return f"{jobs} of {planned.runs} runs; the whole costs {planned.cost}"
    return f"{jobs} runs, in place of {planned.runs} which cost {planned.cost}"
