"""One process of a run of several, started by `lab.cluster.launch` through ``accelerate launch``.

The config is resolved already. The folder of its file is the run's: process 0 writes the record,
the report and ``run.log``; the others print into ``ranks/N.log``. ``ranks/N.json`` says how each
process ended. What is written there ends the process with code 0; accelerate would print a
traceback of its own for any other code.
"""

from __future__ import annotations

import _thread
import logging.config
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from lab.core.errors import UserError
from lab.core.sources import ROOT
from lab.runner.batch import interruptible
from lab.runner.executors import DistributedExecutor, Executor, ProcessStates
from lab.runner.experiment import describe, run_once

# seconds from the request to stop to the end by force, of a process that waits inside a device call
_GRACE = 90


def watch_stdin() -> threading.Event:
    """Interrupt this process when stdin closes; return the event that is set then.

    The parent closes it to stop the run, or is no more.
    """
    stopped = threading.Event()

    def wait() -> None:
        while os.read(0, 4096):
            pass
        stopped.set()
        _thread.interrupt_main()
        time.sleep(_GRACE)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    return stopped


def redirect_output(folder: Path, rank: int) -> None:
    """Log as a run of one process does; only process 0 writes to the terminal."""
    settings = OmegaConf.load(ROOT / "conf" / "hydra" / "job_logging" / "quiet.yaml")
    settings.handlers.file.filename = str(folder / "run.log")
    if rank > 0:
        output = os.open(
            folder / "ranks" / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
        )
        os.dup2(output, 1)
        os.dup2(output, 2)
        settings.root.handlers = ["console"]
        settings.handlers.console.level = "INFO"
    plain: Any = OmegaConf.to_container(settings)
    logging.config.dictConfig(plain)


def take_device(cfg: DictConfig) -> None:
    """Select this process's GPU.

    Raises:
        UserError: all processes would use one device.
    """
    if not torch.cuda.is_available():
        return
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = cfg.backbone.get("device", "auto")
    if device not in ("auto", "cuda") and cfg.launch.num_processes != 1:
        fix = "would put every process there; with launch=multi_gpu each takes its own: use auto."
        raise UserError("backbone.device", device, fix)


def work(config: Path, rank: int, stopped: threading.Event) -> None:
    """Do this process's part of the run, and note how it ended."""
    states = ProcessStates(config.parent / "ranks")
    executor = Executor()
    try:
        with interruptible():
            cfg = OmegaConf.load(config)
            assert isinstance(cfg, DictConfig)
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # first: the others wait here
                executor = DistributedExecutor(states, stopped.is_set, cfg.launch.timeout_s)
            take_device(cfg)
            run_once(cfg, config.parent, executor)
    except (Exception, KeyboardInterrupt) as error:
        cause = executor.cause(error)
        if isinstance(cause, KeyboardInterrupt):
            states.write(rank, "stopped")
        else:
            states.write(rank, "failed", describe(cause, rank=executor.rank))
    else:
        states.write(rank, "done")
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    """Entry of ``python -m lab.runner.worker CONFIG``."""
    config, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
    ProcessStates(config.parent / "ranks").write(rank, "running")
    redirect_output(config.parent, rank)
    work(config, rank, watch_stdin())


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no wait for threads of process groups whose other ends are gone
