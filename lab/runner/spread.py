"""The stages of one run, spread over its processes: independent stages first, then the concepts
inside one.

Processes meet in the stage cache: one computes and writes an artefact, the others read it. So they
need to agree on two things only, which stages are missing and who computes which; whoever is free
takes the next one. What is left at the end of the immunizations is less than one per process: there
several processes share one, see `lab.core.distributed`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from lab.core.cache import Artifact, StageCache, StageCheckpoint
from lab.core.distributed import SharedCheckpoint, Team, broadcast_json, working
from lab.core.errors import RankFailed, UserError
from lab.core.progress import progress
from lab.runner.batch import SIGNALS
from lab.runner.losses import facts, is_recoverable
from lab.runner.pipeline import Cell

log = logging.getLogger(__name__)
_PATIENCE = timedelta(
    days=30
)  # for another stage to end; a process that dies is noticed at once, not by a clock


class SerialExecutor:
    """The process of a run that has one: nothing is spread."""

    main, size = True, 1
    started = False  # whether processes wait for each other from here on
    now: Cell | None = None  # what this process computes for all

    def __init__(self) -> None:
        self.failed: dict[
            str, dict[str, Any]
        ] = {}  # of stages without which the run goes on, see `lab.runner.losses`

    def compute(
        self, store: StageCache, cells: Sequence[Cell], parts: Callable[[Cell], int], label: str
    ) -> set[str]:
        """Compute the ``cells`` that are missing, on all processes; returns the keys of those that
        were.

        Args:
            parts: into how many parts a cell can be split; 0 for one that costs next to nothing.
        """
        return set()

    def same(self, value: Any) -> Any:
        """The main process's JSON-able ``value`` on all."""
        return value

    def cause(self, error: BaseException) -> BaseException:
        """Why the run ends, where ``error`` may be an echo of another process's end."""
        return error

    def facts(self) -> dict[str, Any]:
        """For the record's provenance."""
        return {}


def plan(parts: Sequence[int], size: int) -> tuple[list[int], list[tuple[int, range]]]:
    """Stages that whoever is free takes one after the other, and stages that a team computes, with
    its ranks.

    Args:
        parts: of each stage, see `SerialExecutor.compute`. size: number of processes.
    """
    heavy = sorted(
        (i for i, n in enumerate(parts) if n), key=lambda i: parts[i]
    )  # those that can be split come last
    light = [i for i, n in enumerate(parts) if not n]
    whole = len(heavy) // size * size
    rest = heavy[whole:]
    if all(parts[i] == 1 for i in rest):
        return heavy + light, []
    shares = [range(j * size // len(rest), (j + 1) * size // len(rest)) for j in range(len(rest))]
    return heavy[:whole] + light, [
        (i, share[: parts[i]]) for i, share in zip(rest, shares, strict=True)
    ]


def _echo(error: BaseException) -> bool:
    if isinstance(error, KeyboardInterrupt | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error).lower() for word in ("gloo", "nccl", "peer")
    )


class _MetricsAlone(MetaPathFinder):
    """A metric is computed whole by one process, while torchmetrics would wait for the others to
    gather with.

    Said to it when somebody imports it: the import takes seconds, and most runs never need it.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "torchmetrics.metric":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def alone(module: ModuleType) -> None:
                execute(module)
                _alone(module)

            spec.loader.exec_module = alone  # type: ignore[method-assign]
        return spec


def _alone(module: Any) -> None:
    module.jit_distributed_available = lambda: False


def _mark(cell: Cell) -> str:
    return f"lab/lost/{cell.stage}/{cell.label['attack']}"


class DistributedExecutor(SerialExecutor):
    """All processes of a run that was started by `lab.cluster.launch`; `torch.distributed` is set
    up here.

    Args:
        timeout_s: longest wait for another process inside one step.
        check_every: see `lab.core.distributed.Team`.
    """

    def __init__(self, timeout_s: float, check_every: int) -> None:
        super().__init__()
        self.counter, self.rank, self.size = next(iter(dist.rendezvous("env://")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        self.timeout, self.check_every = timedelta(seconds=timeout_s), check_every
        dist.init_process_group(
            backend, store=self.counter, rank=self.rank, world_size=self.size, timeout=self.timeout
        )
        self.everyone = dist.new_group(backend="gloo", timeout=_PATIENCE)
        if "torchmetrics.metric" in sys.modules:
            _alone(sys.modules["torchmetrics.metric"])
        else:
            sys.meta_path.insert(0, _MetricsAlone())
        self.main = self.rank == 0
        self.done: list[str] = []  # keys of what this process computed of the stages in hand
        self.phase = 0
        self.stopped: Callable[[], bool] = lambda: False  # whether the user asked for the end

    def close(self) -> None:
        dist.destroy_process_group()

    def same(self, value: Any) -> Any:
        return broadcast_json(value, 0, self.everyone)

    def check(self, told: dict[str, str]) -> None:
        """Every process must work on the same thing, into the same folder.

        Raises:
            UserError: names what differs on this one.
        """
        for key, value in self.same(told).items():
            if value != told[key]:
                fix = (
                    f"is {value!r} on the first machine: start the same command on all, "
                    "with paths that all see."
                )
                raise UserError(key, told[key], fix)

    # ── who computes what

    def compute(
        self, store: StageCache, cells: Sequence[Cell], parts: Callable[[Cell], int], label: str
    ) -> set[str]:
        self.started = True
        self.phase += 1
        keys = hashlib.sha256(json.dumps([cell.key for cell in cells]).encode()).hexdigest()
        missing = [i for i, cell in enumerate(cells) if not store.has(*cell.place, cell.parents)]
        first, missing = self.same([keys, missing])
        if first != keys:
            raise RuntimeError(
                f"process {self.rank} would compute other stages than the first one: do "
                "code, data and packages differ?"
            )
        todo, self.done = [cells[i] for i in missing], []
        queue, teams = plan([parts(cell) for cell in todo], self.size)
        self._tell(label, len(todo), queue, teams)
        for cell in progress(
            self._take([todo[i] for i in queue]), label, -(-len(queue) // self.size) or None
        ):
            self._own(store, cell)
        done: set[str] = set()
        for rank in range(self.size):  # all wait for all here
            known = broadcast_json(
                [self.failed, self.done] if rank == self.rank else None, rank, self.everyone
            )
            self.failed |= known[0]
            done.update(known[1])
        if teams:
            self._share(store, [(todo[i], ranks) for i, ranks in teams])
            dist.barrier(group=self.everyone)
            done.update(todo[i].key for i, _ in teams)
        store.trust(done)
        return done

    def _tell(
        self, label: str, count: int, queue: list[int], teams: list[tuple[int, range]]
    ) -> None:
        log.info(
            "%s: %d stages are missing, %d are taken in turn, teams %s",
            label,
            count,
            len(queue),
            teams,
        )
        busy = max(min(len(queue), self.size), sum(len(ranks) for _, ranks in teams))
        if self.main and count and busy < self.size and label != "eval":
            log.warning(
                "%s: %d of %d processes have nothing to do: %d stage%s missing, and no more "
                "than %d processes can "
                "share that (launch.num_processes=%d is enough for this part)",
                label,
                self.size - busy,
                self.size,
                count,
                " is" if count == 1 else "s are",
                busy,
                busy,
            )

    def _take(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """Cells that no other process has taken yet, one at a time."""
        while (i := self.counter.add(f"lab/{self.phase}", 1) - 1) < len(cells):
            yield cells[i]

    def _own(self, store: StageCache, cell: Cell) -> None:
        if self._lost(cell):
            return
        log.info("stage %s", cell.title)
        self.now = cell
        try:
            store.get(*cell.place, cell.compute, cell.parents)
        except Exception as error:
            if not is_recoverable(cell, error):
                raise
            log.info("%s failed, the others go on", cell.title, exc_info=True)
            self.failed[cell.key] = facts(error, self.rank) | {"cell": cell.key}
            self.counter.set(_mark(cell), "1")
        else:
            self.done.append(cell.key)
        self.now = None

    def _lost(self, cell: Cell) -> bool:
        """Whether a stage of the same attack, or of the same metric, failed in some process."""
        return cell.stage != "immunize" and bool(self.counter.check([_mark(cell)]))

    def _share(self, store: StageCache, shares: Sequence[tuple[Cell, range]]) -> None:
        """Each cell on its ranks. Every process makes every group, in this order."""
        mine: tuple[Cell, Team, Any] | None = None
        for cell, ranks in shares:
            members = tuple(ranks)
            group = dist.new_group(members, timeout=self.timeout)
            patient = dist.new_group(members, backend="gloo", timeout=_PATIENCE)
            if self.rank in members:
                mine = cell, Team(members, group, self.check_every), patient
        if mine is None:
            return
        cell, team, patient = mine
        leader = team.members[0]
        log.info("stage %s, with processes %s", cell.title, list(team.members))
        self.now = cell
        if self.rank == leader:
            self._lead(store, cell, team, patient)
        elif broadcast_json(None, leader, patient):
            with working(team):
                cell.compute(SharedCheckpoint(None, team))  # type: ignore[arg-type]
        self.now = None

    def _lead(self, store: StageCache, cell: Cell, team: Team, patient: Any) -> None:
        begun = False

        def compute(checkpoint: StageCheckpoint) -> Artifact:
            nonlocal begun
            begun = True
            broadcast_json(True, team.members[0], patient)
            with working(team):
                return cell.compute(SharedCheckpoint(checkpoint, team))  # type: ignore[arg-type]

        store.get(*cell.place, compute, cell.parents)
        if not begun:  # another run had it in the meantime
            broadcast_json(False, team.members[0], patient)

    # the end

    def report(self, failure: dict[str, Any]) -> int:
        """Tell all processes of a failure; returns its number, 1 for the first one."""
        order = int(self.counter.add("lab/failures", 1))
        self.counter.set(f"lab/failure/{order}", json.dumps(failure))
        return order

    def cause(self, error: BaseException) -> BaseException:
        """The user's wish to stop, else ``error``, or of an echo the failure that was reported
        first.

        When a process dies the others notice a closed connection, or are asked to end: an echo, not
        a cause. The request may come after the connection has closed: from here on it must not
        interrupt what tells of the end.
        """
        for number in (signal.SIGINT, *SIGNALS):
            signal.signal(number, signal.SIG_IGN)
        if not _echo(error):
            return error
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline:
            if self.stopped():
                return KeyboardInterrupt()
            first = self._first_failure()
            if first is not None:
                return RankFailed(**first)
            time.sleep(0.1)
        told = (
            "another process of the run ended without a word: killed from outside, for "
            "want of memory perhaps"
        )
        return RankFailed(rank=None, type="Killed", message=told)

    def _first_failure(self) -> dict[str, Any] | None:
        try:
            if self.counter.check(["lab/failure/1"]):
                return json.loads(self.counter.get("lab/failure/1"))
        except (
            RuntimeError
        ) as error:  # the place where failures are told went down with the other process
            log.info("%s", error)
        return None

    def facts(self) -> dict[str, Any]:
        return {
            "processes": self.size,
            "machines": self.size // int(os.environ.get("LOCAL_WORLD_SIZE", self.size)),
        }
