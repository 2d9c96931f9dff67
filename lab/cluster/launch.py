"""``launch=cpu`` and ``launch=multi_gpu``: one run in several processes, by ``accelerate launch``.

This process composes once, writes the resolved config and waits; the processes never enter Hydra.
Their stdin is a pipe from here: when it closes they end in order, whether the user stops the run,
one of them fails, or this process is killed. (Signals would reach accelerate first, which ends its
processes after 30 seconds and prints a traceback of its own.)
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from lab.core import record as records
from lab.core.config import Count, Index, Positive, Text, bind, options
from lab.core.errors import RunFailed, UserError, explain
from lab.core.hashing import write_atomically
from lab.core.sources import ROOT
from lab.runner.executors import ProcessStates
from lab.runner.experiment import Run, run_once, write_failed_record

log = logging.getLogger(__name__)
_GRACE = 120  # seconds that processes have for the step they are at, the record and the trackers


@options
class Launch:
    """How a run is started; names are those of accelerate's own flags.

    Attributes:
        name: ``none`` | ``cpu`` (gloo) | ``multi_gpu`` (nccl).
        num_processes: on all machines together; None: one per GPU.
        num_machines, machine_rank: how many, and which one this is.
        main_process_ip, main_process_port: where machine 0 listens; None on one machine, for a free
            port.
        timeout_s: longest wait for another process inside one step.
        args: further flags of ``accelerate launch``.
    """

    name: Literal["none", "cpu", "multi_gpu"]
    num_processes: Count | None = 1
    num_machines: Count = 1
    machine_rank: Index = 0
    main_process_ip: Text | None = None
    main_process_port: Annotated[int, Field(strict=True, ge=1, le=65535)] | None = None
    timeout_s: Positive = 1800.0
    args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name == "multi_gpu" and not torch.cuda.is_available():
            fix = "torch sees no CUDA device here; use launch=cpu, or none for one process."
            raise UserError("launch", self.name, fix)
        if self.total % self.num_machines:
            fix = f"must be a multiple of launch.num_machines={self.num_machines}."
            raise UserError("launch.num_processes", self.total, fix)
        if self.num_machines > 1 and None in (self.main_process_ip, self.main_process_port):
            fix = "several machines need to know where the first one listens: set its port too."
            raise UserError("launch.main_process_ip", self.main_process_ip, fix)

    @property
    def total(self) -> int:
        """Processes on all machines."""
        gpus = torch.cuda.device_count() if self.name == "multi_gpu" else 1
        return self.num_processes or self.num_machines * gpus

    @property
    def ranks(self) -> range:
        """Numbers of the processes on this machine."""
        local = self.total // self.num_machines
        return range(self.machine_rank * local, (self.machine_rank + 1) * local)

    def command(self, config: Path, threads: int) -> list[str]:
        """Return ``accelerate launch … -m lab.runner.worker CONFIG``."""
        flags: dict[str, Any] = {
            "num_processes": self.total,
            "num_machines": self.num_machines,
            "machine_rank": self.machine_rank,
            "main_process_port": self.main_process_port or 0,  # 0: a free one
            "mixed_precision": "no",
            "dynamo_backend": "no",
            "num_cpu_threads_per_process": threads,
        }
        if self.main_process_ip is not None:
            flags["main_process_ip"] = self.main_process_ip
        # --multi_gpu is accelerate's name for several processes; --cpu starts one only
        mode = ["--multi_gpu"] if self.total > 1 else ["--cpu"] if self.name == "cpu" else []
        plain = [f"--{key}={value}" for key, value in flags.items()]
        command = [sys.executable, "-m", "accelerate.commands.launch", *mode, *plain, *self.args]
        return [*command, "-m", "lab.runner.worker", str(config)]


def launch(cfg: DictConfig, folder: Path) -> None:
    """Run what ``cfg`` selects, into ``folder``, in as many processes as ``cfg.launch`` says.

    Raises:
        UserError: wrong options, or another run's record in ``folder``.
        RunFailed: a process failed or was killed.
    """
    launched = bind(Launch, cfg.launch, "launch")
    record = folder / "record.json"
    if not cfg.dry_run:
        records.refuse_other(record, cfg)
    if cfg.dry_run or launched.name == "none":
        run_once(cfg, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    first_machine = launched.machine_rank == 0
    if first_machine:
        record.unlink(missing_ok=True)  # of an earlier run in this folder
    try:
        run_processes(launched, cfg, folder)
    except (Exception, KeyboardInterrupt) as error:
        # process 0 could write none; it writes none of a user's mistake
        if first_machine and not record.is_file() and explain(error) is None:
            run = Run(cfg, folder)
            run.waiting = list(run.pipeline.immunize_stages())
            run.fail(error)
            write_failed_record(run)
        raise


def run_processes(launched: Launch, cfg: DictConfig, folder: Path) -> None:
    """Start the processes of this machine and wait for their end."""
    config = folder / f"launch{launched.machine_rank or ''}.yaml"
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    write_atomically(config, OmegaConf.to_yaml(plain).encode())
    states = ProcessStates(folder / "ranks")
    states.clear(launched.ranks)
    threads = cfg.threads or max(torch.get_num_threads() // len(launched.ranks), 1)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    if launched.name == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    code = wait(launched.command(config, threads), env, states)
    failure = states.first_failure()
    ended = states.read()
    killed = [r for r in launched.ranks if r in ended and ended[r]["state"] == "running"]
    if killed and (failure is None or failure.type == "Killed"):
        message = f"process {killed[0]} was killed from outside, for want of memory perhaps"
        raise RunFailed("Killed", message)
    if failure is not None:
        raise failure
    if code != 0:
        message = f"accelerate ended with code {code}; see its messages above"
        raise RunFailed("LaunchFailed", message)


def wait(command: Sequence[str], env: dict[str, str], states: ProcessStates) -> int:
    """Run ``command`` until it ends, a process fails, or the user stops it; return its code."""
    log.info("start %s", " ".join(command))
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=ignore_batch_signals,
    )
    assert process.stdin is not None
    try:
        while process.poll() is None and states.first_failure() is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("stopping: the processes end the step they are at …", file=sys.stderr, flush=True)
        raise
    finally:
        process.stdin.close()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            log.warning("the processes did not end within %d s and are killed", _GRACE)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode


def ignore_batch_signals() -> None:
    """Ignore what a batch system sends to every process: accelerate would end at once."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
