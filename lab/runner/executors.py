"""Where the stages of a run are computed: in this process, or spread over several.

Processes meet in the stage cache. Each computes its share of the missing stages; where fewer
immunizations are left than processes, all processes compute one together
(`lab.core.distributed.Team`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lab.core.cache import Artifact
from lab.core.distributed import PeerLost, SharedCheckpoint, Team, working
from lab.core.errors import RunFailed
from lab.core.hashing import write_atomically
from lab.core.types import Checkpoint
from lab.runner.batch import SIGNALS
from lab.runner.pipeline import Stage

log = logging.getLogger(__name__)
Result = TypeVar("Result")
# longest wait for the stage of another process; one that dies closes its connection at once
_PATIENCE = timedelta(days=30)
_GRACE_S = 3.0  # for another process to write why it ended


class Executor:
    """Computes the stages of a run in this process.

    Attributes:
        rank: number of this process; None in a run of one.
        is_main: whether this process records and prints.
    """

    rank: int | None = None
    is_main = True

    def map(
        self,
        compute: Callable[[Stage], Result],
        stages: Sequence[Stage],
        shards: Callable[[Stage], int],
    ) -> Iterable[Result]:
        """Return ``compute(stage)`` of each stage in order, on every process.

        Args:
            shards: into how many parts a stage can be split; 0 for one that costs nothing.
        """
        return map(compute, stages)  # one after another, as they are asked for

    def cause(self, error: BaseException) -> BaseException:
        """Return why the run ends: ``error``, or what happened in another process before."""
        return error

    def facts(self) -> dict[str, Any]:
        """Return what the record's provenance says about the processes."""
        return {}


class ProcessStates:
    """How the processes of a run ended: a file ``N.json`` for each, in a folder that all see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, rank: int, state: str, failure: RunFailed | None = None) -> None:
        """Note ``state``: running, done, stopped or failed."""
        body = {"state": state, "time": time.time(), "failure": failure and asdict(failure)}
        write_atomically(self.folder / f"{rank}.json", (json.dumps(body) + "\n").encode())

    def read(self) -> dict[int, dict[str, Any]]:
        """Return what each process noted last, by its number."""
        files = self.folder.glob("[0-9]*.json")
        return {int(path.stem): json.loads(path.read_text()) for path in files}

    def first_failure(self) -> RunFailed | None:
        """Return what failed first, if anything did."""
        failed = [state for state in self.read().values() if state["failure"]]
        first = min(failed, key=lambda state: state["time"], default=None)
        return RunFailed(**first["failure"]) if first else None

    def clear(self, ranks: Sequence[int]) -> None:
        """Forget an earlier run in this folder: of all processes on the machine of process 0."""
        for rank in self.read():
            if 0 in ranks or rank in ranks:
                (self.folder / f"{rank}.json").unlink(missing_ok=True)


class DistributedExecutor(Executor):
    """Spreads stages over the processes that `lab.cluster.launch` started.

    Args:
        states: where processes note how they end.
        stopped: whether the user wants to stop.
        timeout_s: longest wait for another process inside one step.
    """

    def __init__(
        self, states: ProcessStates, stopped: Callable[[], bool], timeout_s: float
    ) -> None:
        self.states, self.stopped = states, stopped
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        rank, self.size = dist.get_rank(), dist.get_world_size()
        self.rank = rank
        self.is_main = rank == 0
        self.team = Team(self.size, rank)
        self.patient = Team(self.size, rank, dist.new_group(backend="gloo", timeout=_PATIENCE))

    def map(
        self,
        compute: Callable[[Stage], Result],
        stages: Sequence[Stage],
        shards: Callable[[Stage], int],
    ) -> list[Result]:
        keys = [stage.key for stage in stages]
        parts = [shards(stage) for stage in stages] if self.is_main else []
        first_keys, parts = self.patient.broadcast_object((keys, parts))
        if first_keys != keys:
            raise RuntimeError(
                f"process {self.rank} would compute other stages than the first one: do "
                "code, data and packages differ?"
            )
        alone, together = split(parts, self.size)
        own = alone[self.patient.rank :: self.size]
        log.info("%d stages here, %d by all processes", len(own), len(together))
        results = self.patient.gather({i: compute(stages[i]) for i in own})
        for i in together:
            results[i] = self._compute_together(compute, stages[i])
        return [results[i] for i in range(len(stages))]

    def _compute_together(self, compute: Callable[[Stage], Result], stage: Stage) -> Result:
        """Compute one stage with all processes; the main one holds its lock and writes it."""
        log.info("stage %s, with %d processes", stage.title, self.size)
        begun = False

        def lead(checkpoint: Checkpoint) -> Artifact:
            nonlocal begun
            begun = True
            self.patient.broadcast_object(True)
            with working(self.team):
                return stage.compute(SharedCheckpoint(checkpoint, self.team))

        if not self.is_main:
            if self.patient.broadcast_object(None):
                with working(self.team):
                    stage.compute(SharedCheckpoint(None, self.team))
            return self.patient.broadcast_object(None)
        result = compute(replace(stage, compute=lead))
        if not begun:  # another run computed it in the meantime
            self.patient.broadcast_object(False)
        return self.patient.broadcast_object(result)

    def cause(self, error: BaseException) -> BaseException:
        """Return the failure of another process, or the user's wish to stop, before ``error``.

        When a process ends early, the others lose their connection or are interrupted. From here
        on no signal may interrupt the report of the end.
        """
        for number in (signal.SIGINT, *SIGNALS):
            signal.signal(number, signal.SIG_IGN)
        if not isinstance(error, PeerLost | KeyboardInterrupt):
            return error
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline:
            if failure := self.states.first_failure():
                return failure
            if self.stopped():
                return KeyboardInterrupt()
            time.sleep(0.1)
        what = "another process of the run was killed from outside, or did not answer within"
        return RunFailed("Killed", f"{what} launch.timeout_s: {error}")

    def facts(self) -> dict[str, Any]:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        return {"processes": self.size, "machines": self.size // local}


def split(shards: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    """Return the stages that one process computes alone, and those that all compute together.

    Stages that can be split are dealt out whole while there is one for every process.

    Args:
        shards: of each stage, see `Executor.map`.
        size: number of processes.
    """
    divisible = [i for i, n in enumerate(shards) if n > 1]
    together = divisible[len(divisible) // size * size :]
    alone = sorted(set(range(len(shards))) - set(together), key=lambda i: shards[i] == 0)
    return alone, together
