"""What happens when a multirun begins and ends: where it goes, one leaderboard and one report over
its records.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

sweep_codes: list[int] = []  # exit codes of failed jobs, also of those that ran in other processes
_CODES = {"failed": 1, "preempted": 130}


class SweepLeaderboard(Callback):
    """Writes ``leaderboard.{md,csv,html}`` and ``report.html`` beside the runs of a multirun."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from lab.core.sources import ROOT

        if (stated := config.get("sweep")) is not None:
            out = sys.stdout if config.dry_run else sys.stderr
            print(f"{config.name}: {told_cost(_jobs(config), stated)}", file=out, flush=True)
        if str(config.hydra.launcher._target_).startswith("hydra._internal"):
            return  # jobs run here, one after another
        if (
            ROOT / "pyproject.toml"
        ).is_file():  # jobs run the code of this checkout, whatever is installed
            os.environ["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
            )
        place = Path(config.hydra.sweep.dir)
        print(
            f"sweep: {place}\nprogress: python run.py action=status 'records=[{place}]'",
            file=sys.stderr,
            flush=True,
        )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from lab.cli.actions import publish
        from lab.cluster.lost import lost_runs
        from lab.core.record import readable

        folder = Path(config.hydra.sweep.dir)
        paths = sorted(folder.rglob("record.json"), key=_order)
        found, broken = readable(paths)
        for (
            error
        ) in broken:  # an exception would end this function, and with it the codes of the others
            print(f"error: {error}", file=sys.stderr)
            sweep_codes.append(1)
        for record in found:
            if record["status"] in _CODES:
                mended = record["status"] == "failed" and record["error"]["key"] is not None
                sweep_codes.append(2 if mended else _CODES[record["status"]])
        if found:  # a dry run has none
            publish(found, folder, lost_runs([folder]))
        jobs = _jobs(config) or 0
        others = (
            config.dry_run
            or config.action != "run"
            or OmegaConf.select(config, "launch.machine_rank")
        )
        if jobs > len(paths) and not others:
            sweep_codes.append(1)
            told = f"of {jobs} jobs {jobs - len(paths)} left no record"
            print(
                f"{told}: killed, or see their messages; `python run.py action=status "
                f"'records=[{folder}]'`"
            )


def _order(path: Path) -> tuple[float, str]:
    """By the job's number, with which a folder of `hydra.sweep.subdir` begins unless the user chose
    another one.
    """
    number = path.parent.name.split("-")[0]
    return int(number) if number.isdecimal() else math.inf, str(path)


def _jobs(config: DictConfig) -> int | None:
    """How many jobs the sweep has by YAML and command line; None where Hydra alone can tell, as
    with ``glob(*)``.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not str(config.hydra.sweeper._target_).endswith(f".{BasicSweeper.__name__}"):
        return None
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    try:
        overrides = OverridesParser.create().parse_overrides(
            [*params, *config.hydra.overrides.task]
        )
        return len(BasicSweeper.split_arguments(overrides, None)[0])
    except HydraException:
        return None


def told_cost(jobs: int | None, stated: DictConfig) -> str:
    """The cost of a sweep is that of all its runs as the YAML has them."""
    if jobs is None or jobs == stated.runs:
        return f"{stated.runs} runs; cost: {stated.cost}"
    if jobs < stated.runs:
        return f"{jobs} of {stated.runs} runs; the whole costs {stated.cost}"
    return f"{jobs} runs, in place of {stated.runs} which cost {stated.cost}"
