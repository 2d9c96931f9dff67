"""The one entry point: `python run.py` composes YAML from conf/ and does what `action` says."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

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


OmegaConf.register_new_resolver("project_root", lambda: str(ROOT), replace=True)
OmegaConf.register_new_resolver("quick_precision", _quick_precision, replace=True)
# conf/hydra/launcher holds what differs from a plug-in's file of the same name, which Hydra merges
# but warns about
warnings.filterwarnings(
    "ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema"
)

EXIT_USER, EXIT_BUG = 2, 1
_worst = 0  # exit code of the process: a failed job of a sweep must not stop the others


def _failed(code: int) -> None:
    global _worst
    _worst = max(_worst, code)


def dispatch(cfg: DictConfig) -> None:
    """Do what ``cfg.action`` says; errors that a user can mend raise
    `lab.core.errors.UserError`.
    """
    from hydra.core.hydra_config import HydraConfig

    from lab.runner.batch import claimed

    folder = Path(HydraConfig.get().runtime.output_dir)
    with claimed(
        folder, cfg.action, bool(OmegaConf.select(cfg, "launch.machine_rank")) or cfg.dry_run
    ):
        _act(cfg, folder)  # its imports take seconds


_LISTS = ("attacks", "eval", "tracker")  # groups of several choices at once; see conf/config.yaml


def _check_choices() -> None:
    """Hydra merges a list of choices of any group into one mixture, named after the last."""
    from hydra.core.hydra_config import HydraConfig

    from lab.core.errors import UserError

    for word in HydraConfig.get().overrides.task:
        group, _, chosen = word.lstrip("+").partition("=")
        if chosen.startswith("[") and group not in _LISTS and (ROOT / "conf" / group).is_dir():
            told = f"takes one choice; for a run of each: -m {group}={chosen.strip('[]')}."
            raise UserError(group, chosen, told)


def _check_added() -> None:
    """A key that the command line adds with ``+`` and nothing reads would stand in the record as if
    it did.
    """
    from hydra.core.hydra_config import HydraConfig

    from lab.core.errors import UserError

    known = HydraConfig.get()
    words: Any = OmegaConf.to_container(known.overrides.task, resolve=False)
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        group = key in known.runtime.choices or "." in key or "/" in key or "@" in key
        added = word.startswith("+") and not word.startswith(
            "++"
        )  # ++ sets what may be there already
        if added and not group and not any(f"${{{key}" in other for other in words):
            raise UserError(
                key, value, "is no key of this project, and nothing reads it: leave it out."
            )


def _act(cfg: DictConfig, folder: Path) -> None:
    from lab.cli.requested import check_read
    from lab.core.errors import UserError, nearest

    _check_choices()
    _check_added()

    if cfg.action == "run":
        from lab.cluster.launch import launch

        check_read(cfg)
        return launch(cfg, folder)
    from lab.cli.actions import ACTIONS

    if cfg.action not in ACTIONS:
        raise UserError("action", cfg.action, nearest(str(cfg.action), ["run", *ACTIONS]))
    check_read(cfg)
    ACTIONS[cfg.action](cfg)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def job(cfg: DictConfig) -> None:
    """One job of a run or multirun. Exceptions are told here, so that a sweep goes on with its
    other jobs.
    """
    from lab.runner.batch import fail_job, interruptible
    from lab.runner.failed_stages import describe

    try:
        with interruptible(job=True):
            dispatch(cfg)
    except Exception as error:
        failure = describe(error)
        message, code = failure.user_message, EXIT_USER
        if message is None:
            print(failure.traceback, file=sys.stderr)
            message, code = ": ".join(filter(None, [failure.key, str(failure)])), EXIT_BUG
        print(f"error: {message}", file=sys.stderr)
        _failed(code)
        fail_job(code)


def main() -> None:
    """Console entry; exit code 0 done, 2 wrong input, 1 defect, 130 interrupted."""
    os.environ.setdefault(
        "HYDRA_FULL_ERROR", "1"
    )  # composition errors reach us instead of Hydra's printer
    from lab.cli.arguments import rewritten
    from lab.cli.callbacks import sweep_codes
    from lab.runner.batch import EXIT_INTERRUPTED, interruptible
    from lab.runner.failures import explain

    warnings.formatwarning = lambda message, *_, **__: (
        f"warning: {message}\n"
    )  # to a user, not to whoever reads the code
    sys.argv[1:] = rewritten(sys.argv[1:])
    try:
        with interruptible():  # a batch system's SIGTERM leaves a record, like Ctrl-C
            job()
        while sweep_codes:  # of jobs that ran in processes of a launcher
            _failed(sweep_codes.pop())
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        _failed(EXIT_INTERRUPTED)
    except Exception as error:
        told = explain(error, sys.argv[1:])
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        _failed(EXIT_USER)
    sys.exit(_worst)


if __name__ == "__main__":
    from run import (
        main as by_name,
    )  # launchers hand `job` to other processes by the name of its module

    by_name()
