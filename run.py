"""The one entry point: `python run.py` composes YAML from conf/ and does what `action` says."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import metadata
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lab.cli.arguments import register_resolvers, rewrite
from lab.core.sources import ROOT
from lab.runner.batch import EXIT_INTERRUPTED, fail_slurm_job, interruptible

register_resolvers()
# conf/hydra/launcher holds what differs from a plug-in's file of the same name, which Hydra merges
# but warns about
warnings.filterwarnings(
    "ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema"
)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def job(cfg: DictConfig) -> int:
    """Do one job of a run or multirun; return its exit code.

    Exceptions end here, so that a sweep goes on with its other jobs.
    """
    from lab.cli.actions import act
    from lab.cli.errors import report_error

    config = HydraConfig.get()
    try:
        with interruptible(job=True):
            code = act(cfg, Path(config.runtime.output_dir))
    except Exception as error:
        code = report_error(error)
    if code:
        fail_slurm_job(code)
        if config.mode != RunMode.MULTIRUN:
            sys.exit(code)  # Hydra drops what the job of a single run returns
    return code


def main() -> None:
    """Console entry; exit code 0 done, 1 defect, 2 wrong input, 3 `fail_on`, 130 interrupted."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # composition errors reach `report_error`
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if "--version" in sys.argv:
        print(f"immunization-bench {metadata.version('immunization-bench')}")
        return
    try:
        sys.argv[1:] = rewrite(sys.argv[1:])
        with interruptible():  # a batch system's SIGTERM leaves a record, like Ctrl-C
            job()
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        from lab.cli.errors import report_error

        sys.exit(report_error(error))


if __name__ == "__main__":
    from run import main as main_by_name  # launchers send `job` to processes by its module's name

    main_by_name()
