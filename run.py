"""The one entry point: `python run.py` composes YAML from conf/ and does what `action` says."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parent
# threads that wait for each other sleep: a spinning one would hold the core that a busy machine
# needs for the other (tests/benchmarks/busy_threads.py); read when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _quick_precision(device: str) -> str:
    """For ``scenario.sampling.precision``: bfloat16 on a device that computes it; emulated, it
    takes far longer.
    """
    from lab.models.devices import computes_bfloat16, pick

    return "bfloat16" if computes_bfloat16(pick("backbone.device", device).type) else "weights"


def _checkpoint(fact: str, path: str) -> float:
    """For ``conf/scenario/folder.yaml``: resolution, steps or guidance that suit a checkpoint."""
    from lab.models.diffusion_backbone import read_sampling

    return read_sampling(path)[fact]


OmegaConf.register_new_resolver("project_root", lambda: str(ROOT), replace=True)
OmegaConf.register_new_resolver("quick_precision", _quick_precision, replace=True)
OmegaConf.register_new_resolver("checkpoint", _checkpoint, replace=True)
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
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from lab.cli.actions import act
    from lab.cli.errors import report_error
    from lab.runner.batch import fail_slurm_job, interruptible

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
    """Console entry; exit code 0 done, 1 defect, 2 wrong input, 3 audit failed, 130 interrupted."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # composition errors reach `report_error`
    from lab.cli.arguments import rewrite
    from lab.cli.errors import report_error
    from lab.runner.batch import EXIT_INTERRUPTED, interruptible

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        sys.argv[1:] = rewrite(sys.argv[1:])
        with interruptible():  # a batch system's SIGTERM leaves a record, like Ctrl-C
            job()
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        sys.exit(report_error(error))


if __name__ == "__main__":
    from run import main as main_by_name  # launchers send `job` to processes by its module's name

    main_by_name()
