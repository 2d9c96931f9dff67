"""``launch=cpu`` and ``launch=multi_gpu``: one run in several processes, started by ``accelerate
launch``.

This process composes once, writes the resolved config and waits; the processes never enter Hydra.
Their stdin is a pipe from here: when it closes they end in order, be it that the user stops the run
or that this process was killed. (Signals would reach accelerate first, which ends its processes
after 30 seconds and prints a traceback of its own.)
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lab.core import record as records
from lab.core.errors import RankFailed, UserError
from lab.core.hashing import write_atomically
from lab.core.options import choice, count, number
from lab.core.sources import ROOT
from lab.runner.experiment import Run, run_once

log = logging.getLogger(__name__)
CONFIG, RANKS = "launch.yaml", "ranks"
_GRACE = 120  # seconds that processes have for the step they are at, the record and the trackers
_ATTEMPTS = 3  # another process may take the port between its choice and its use


@dataclass(frozen=True)
class Launch:
    """How a run is started; names are those of accelerate's own flags.

    Attributes:
        name: ``none`` | ``cpu`` (gloo) | ``multi_gpu`` (nccl).
        num_processes: on all machines together. num_machines, machine_rank: of how many, and which
            one this is.
        main_process_ip, main_process_port: where machine 0 listens; None on one machine, for a free
            port.
        timeout_s: longest wait for another process inside one step. check_every: steps between two
            comparisons of the parameters' hashes. args: further flags of ``accelerate launch``.
    """

    name: str
    num_processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    timeout_s: float = 1800.0
    check_every: int = 10
    args: tuple[str, ...] = ()

    @staticmethod
    def read(config: Any) -> Launch:
        """
        Raises:
            UserError: an option that cannot work on this machine.
        """
        if not isinstance(config, DictConfig):
            raise UserError("launch", config, "must be none, cpu or multi_gpu.")
        plain: Any = OmegaConf.to_container(config)
        given: dict[str, Any] = {str(key): value for key, value in plain.items()}
        name = choice("launch.name", given.get("name"), ("none", "cpu", "multi_gpu"))
        if name == "none":
            return Launch("none")
        if name == "multi_gpu" and not torch.cuda.is_available():
            told = "torch sees no CUDA device here; use launch=cpu, or none for one process."
            raise UserError("launch", name, told)
        machines = count("launch.num_machines", given["num_machines"])
        if given["num_processes"] is None:
            given["num_processes"] = machines * (
                torch.cuda.device_count() if name == "multi_gpu" else 1
            )
        count("launch.num_processes", given["num_processes"])
        count("launch.machine_rank", given["machine_rank"], 0, machines - 1)
        number("launch.timeout_s", given["timeout_s"], above=0)
        count("launch.check_every", given["check_every"])
        if given["main_process_port"] is not None:
            count("launch.main_process_port", given["main_process_port"], 1, 65535)
        found = Launch(**{**given, "args": tuple(str(flag) for flag in given["args"] or ())})
        found._check_machines()
        return found

    def _check_machines(self) -> None:
        if self.num_processes % self.num_machines:
            told = f"must be a multiple of launch.num_machines={self.num_machines}."
            raise UserError("launch.num_processes", self.num_processes, told)
        if self.name == "multi_gpu" and self.local > torch.cuda.device_count():
            told = (
                f"that is {self.local} on this machine, where torch sees "
                f"{torch.cuda.device_count()} CUDA device(s)."
            )
            raise UserError("launch.num_processes", self.num_processes, told)
        if self.num_machines > 1:
            for key, value in (("ip", self.main_process_ip), ("port", self.main_process_port)):
                if value is None:
                    told = "several machines need to know where the first one listens."
                    raise UserError(f"launch.main_process_{key}", value, told)

    @property
    def local(self) -> int:
        """Processes on this machine."""
        return self.num_processes // self.num_machines

    @property
    def ranks(self) -> range:
        """Numbers of the processes on this machine."""
        return range(self.machine_rank * self.local, (self.machine_rank + 1) * self.local)

    def threads(self, given: int | None) -> int:
        """CPU threads of each process: as told, else the cores that this process may use,
        divided.
        """
        if given is not None:
            return given
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        if self.local > cores:
            log.warning(
                "launch.num_processes=%d: there are %d cores for %d processes",
                self.num_processes,
                cores,
                self.local,
            )
        return max(cores // self.local, 1)

    def port(self) -> int:
        """The port to meet at.

        Raises:
            UserError: it is taken on the first of several machines. On one machine another is
                chosen.
        """
        port = self.main_process_port
        if self.num_machines > 1:
            assert port is not None
            if self.machine_rank == 0 and not _free(port):
                told = (
                    "is in use by another process: choose another one, the same on every machine."
                )
                raise UserError("launch.main_process_port", port, told)
            return port
        if port is not None:
            if _free(port):
                return port
            log.warning("launch.main_process_port=%d is in use; another one is taken", port)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def command(self, config: Path, threads: int, port: int) -> list[str]:
        """``accelerate launch … -m lab.runner.worker --config FILE``."""
        flags: dict[str, Any] = {
            "num_processes": self.num_processes,
            "num_machines": self.num_machines,
            "machine_rank": self.machine_rank,
            "main_process_port": port,
            "mixed_precision": "no",
            "dynamo_backend": "no",
            "num_cpu_threads_per_process": threads,
        }
        if self.main_process_ip is not None:
            flags["main_process_ip"] = self.main_process_ip
        # --multi_gpu is accelerate's name for several processes; --cpu starts one, whatever their
        # number
        mode = (
            "--multi_gpu"
            if self.num_processes > 1
            else "--cpu"
            if self.name == "cpu"
            else "--num_processes=1"
        )
        plain = [f"--{key}={value}" for key, value in flags.items()]
        command = [sys.executable, "-m", "accelerate.commands.launch", mode, *plain, *self.args]
        return [*command, "-m", "lab.runner.worker", "--config", str(config), "--watch_stdin"]


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def launch(cfg: DictConfig, folder: Path) -> None:
    """Run what ``cfg`` selects, into ``folder``, in as many processes as ``cfg.launch`` says.

    Raises:
        UserError: wrong options, also those that the processes find; another run's record in
            ``folder``.
        RankFailed: one of them failed or died.
    """
    if not cfg.dry_run:
        records.refuse_other(folder / "record.json", cfg)
    if cfg.dry_run or (isinstance(cfg.launch, DictConfig) and cfg.launch.get("name") == "none"):
        Launch.read(cfg.launch)
        run_once(cfg, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "record.json"
    first = not OmegaConf.select(cfg, "launch.machine_rank")
    options = None
    try:
        if first:
            record.unlink(
                missing_ok=True
            )  # of an earlier run in this folder: what is there afterwards is of this one
        options = Launch.read(cfg.launch)
        threads = options.threads(cfg.threads)
        config = folder / (CONFIG if first else f"launch-{options.machine_rank}.yaml")
        plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        write_atomically(config, OmegaConf.to_yaml(plain).encode())
        code = _attempts(options, config, threads)
        failure = _first_failure(folder, options.ranks)
        if failure is not None or code != 0 or (first and not record.is_file()):
            raise _as_error(failure, folder, options.ranks, code) from None
    except (Exception, KeyboardInterrupt) as error:
        if (first or options is None) and not record.is_file():
            _record(cfg, folder, error)
        raise


def _attempts(options: Launch, config: Path, threads: int) -> int:
    """Start the processes and wait; once more where they could not even meet. Returns accelerate's
    exit code.
    """
    folder = config.parent / RANKS
    folder.mkdir(exist_ok=True)
    for attempt in range(_ATTEMPTS):
        for rank in options.ranks:
            (folder / f"{rank}.json").unlink(missing_ok=True)
        port = options.port()
        code = _wait(options.command(config, threads, port), _environment(options, threads))
        begun = any((folder / f"{rank}.json").is_file() for rank in options.ranks)
        if code == 0 or begun or options.num_machines > 1 or _free(port):
            break
        log.warning(
            "port %d was taken at the last moment (attempt %d of %d)", port, attempt + 1, _ATTEMPTS
        )
    return code


def _environment(options: Launch, threads: int) -> dict[str, str]:
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    env["OMP_NUM_THREADS"] = str(threads)
    if options.name == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


def _wait(command: Sequence[str], env: dict[str, str]) -> int:
    log.info("start %s", " ".join(command))
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_deaf_to_batch_signals,
    )
    assert process.stdin is not None
    try:
        return process.wait()
    except KeyboardInterrupt:
        print("stopping: the processes end the step they are at …", file=sys.stderr, flush=True)
        process.stdin.close()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            log.warning("the processes did not end within %d s and are killed", _GRACE)
        raise
    finally:
        if not process.stdin.closed:
            process.stdin.close()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(40)  # accelerate kills its processes after 30
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _deaf_to_batch_signals() -> None:
    """A batch system sends these to every process; accelerate would die of them before its
    processes are done.
    """
    for number_ in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number_, signal.SIG_IGN)


# ── what became of it


def _states(folder: Path, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
    files = {rank: folder / RANKS / f"{rank}.json" for rank in ranks}
    return {rank: json.loads(path.read_text()) for rank, path in files.items() if path.is_file()}


def _first_failure(folder: Path, ranks: Sequence[int]) -> dict[str, Any] | None:
    failed = [state["failure"] for state in _states(folder, ranks).values() if state["failure"]]
    return min(failed, key=lambda failure: (failure["echo"], failure["order"])) if failed else None


def _as_error(
    failure: dict[str, Any] | None, folder: Path, ranks: Sequence[int], code: int
) -> Exception:
    states = _states(folder, ranks)
    silent = sorted(rank for rank, state in states.items() if state["state"] == "running")
    if silent and (failure is None or failure["echo"]):
        which = (
            f"process {silent[0]}"
            if len(silent) == 1
            else "processes " + ", ".join(map(str, silent))
        )
        told = (
            f"{which} ended without a word: killed from outside, for want of memory "
            "perhaps (see the messages above)."
        )
        return RankFailed(rank=silent[0], type="Killed", message=told)
    if failure is None:
        told = (
            f"accelerate ended with code {code} before the processes had begun; see its "
            "messages above."
        )
        return RankFailed(rank=None, type="LaunchFailed", message=told)
    if failure["key"] is not None:
        return UserError(failure["key"], failure["value"], failure["fix"])
    if failure["told"] is None:
        print(f"traceback of process {failure['rank']}:\n{failure['traceback']}", file=sys.stderr)
    known = {name: failure[name] for name in ("rank", "type", "message", "told", "step", "cell")}
    return RankFailed(**known, key=failure["part"])


def _record(cfg: DictConfig, folder: Path, error: BaseException) -> None:
    """The record of a run whose main process could not write one."""
    run = Run(cfg, folder)
    run.fail(error)
    try:
        run.finish(None)
    except OSError as unwritable:
        print(f"no record could be written to {folder}: {unwritable}", file=sys.stderr)
