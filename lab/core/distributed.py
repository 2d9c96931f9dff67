"""Processes that compute one thing together: concepts are spread over them, results are reduced by
hand.

DistributedDataParallel has no second derivatives (pytorch #63929), so nothing is wrapped. Every
rank holds all parameters and computes the terms of its own concepts; a term travels to the others
by broadcast and is added on every rank in the order of the concepts, so that the sum has the same
bits for any number of ranks. Headers are JSON, tensors travel as they are: nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lab.core.cache import StageCheckpoint
from lab.core.errors import Diverged
from lab.core.hashing import digest

Params = dict[str, Tensor]
_PASSED_ON = {
    "Diverged": Diverged,
    "FloatingPointError": FloatingPointError,
}  # part of a normal run: all ranks raise


class OutOfStep(Exception):
    """Ranks that should hold the same parameters do not."""


def broadcast_json(value: Any, source: int, group: Any) -> Any:
    """``value`` of rank ``source``, counted in the whole run, on every rank of ``group``; nan and
    inf allowed.
    """
    here = dist.get_rank() == source
    data = (
        torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        if here
        else torch.empty(0)
    )
    size = torch.tensor([data.numel()])
    dist.broadcast(size, source, group=group)
    if not here:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    return value if here else json.loads(data.numpy().tobytes())


class Team:
    """``size`` ranks that work on one thing, and which one this process is; alone by default.

    Args:
        members: their numbers in the whole run; empty for a process alone.
        group: their process group, for tensors on the CPU and on this rank's device.
        check_every: steps between two comparisons of the parameters' hashes.
    """

    def __init__(
        self, members: tuple[int, ...] = (), group: Any = None, check_every: int = 10
    ) -> None:
        self.members, self.group, self.check_every = members, group, check_every
        self.size = max(len(members), 1)
        self.rank = members.index(dist.get_rank()) if members else 0

    # ── one value from one rank

    def share(self, tensors: Params, source: int = 0, values: Any = None) -> tuple[Params, Any]:
        """What the ``source``-th member gives, on all; ``values`` are JSON-able. Others' arguments
        are unread.
        """
        if self.size == 1:
            return tensors, values
        sender = self.members[source]
        header = None
        if self.rank == source:
            tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
            shapes = [
                [k, list(x.shape), str(x.dtype).removeprefix("torch."), x.device.type]
                for k, x in tensors.items()
            ]
            header = {"tensors": shapes, "values": values}
        header = broadcast_json(header, sender, self.group)
        found: Params = {}
        for name, shape, dtype, device in header["tensors"]:
            if self.rank == source:
                found[name] = tensors[name]
            else:
                found[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            dist.broadcast(found[name], sender, group=self.group)
        return found, header["values"]

    def same(self, tensors: Params) -> Params:
        """The first member's ``tensors`` on all: where each computed them, the last bits may
        differ.
        """
        return self.share(tensors)[0]

    def gather(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """The union of all members' JSON-able ``values``."""
        if self.size == 1:
            return dict(values)
        found: dict[int, Any] = {}
        for member in self.members:
            found |= {
                int(n): value
                for n, value in broadcast_json(list(values.items()), member, self.group)
            }
        return found

    # ── a sum over concepts

    def ordered(
        self, count: int, compute: Callable[[int], Params], add: Callable[[int, Params], None]
    ) -> None:
        """``add(n, compute(n))`` for n < ``count`` in this order on every rank; each ``compute``
        runs on one only.

        As many concepts as there are ranks are computed at a time, then shared one by one: no rank
        holds more than its own term and the one that is being added.

        Raises:
            Diverged, FloatingPointError: from ``compute``, on every rank.
        """
        for start in range(0, count, self.size):
            own, found, failed = start + self.rank, {}, None
            if own < count:
                try:
                    found = compute(own)
                except (Diverged, FloatingPointError) as error:
                    failed = error
            for n in range(start, min(start + self.size, count)):
                add(n, self._term(n - start, found, failed))

    def _term(
        self, source: int, found: Params, failed: Diverged | FloatingPointError | None
    ) -> Params:
        told = None
        if failed is not None:
            told = [
                type(failed).__name__,
                str(failed),
                *([failed.step] if isinstance(failed, Diverged) else []),
            ]
        tensors, told = self.share({} if told else found, source, told)
        if told:
            if failed is not None and self.rank == source:
                raise failed
            raise _PASSED_ON[told[0]](*told[1:])
        return tensors

    # ── the proof that all is well

    def agree(self, tensors: Callable[[], Params], when: str) -> None:
        """Compare a hash of ``tensors()`` across the ranks.

        Raises:
            OutOfStep: they differ.
        """
        if self.size == 1:
            return
        known = tensors()
        found = self.gather({self.rank: digest(*(known[name] for name in sorted(known)))})
        if len(set(found.values())) > 1:
            told = ", ".join(
                f"process {self.members[rank]}: {value[:12]}"
                for rank, value in sorted(found.items())
            )
            raise OutOfStep(f"the processes' parameters differ {when} ({told})")


class SharedCheckpoint:
    """The leader's checkpoint for a whole team: read on one, known to all, written by one."""

    def __init__(self, own: StageCheckpoint | None, team: Team) -> None:
        self.own, self.team = own, team

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        tensors, values = (self.own.load() if self.own else None) or ({}, None)
        tensors, values = self.team.share(tensors, 0, values)
        return None if values is None else (tensors, values)

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        if self.own is not None:
            self.own.save(tensors, values)


ALONE = Team()
_current = ALONE


def team() -> Team:
    """The processes that work on what this one computes now; `ALONE` unless the run says
    otherwise.
    """
    return _current


@contextmanager
def working(together: Team) -> Iterator[None]:
    """Inside, `team` is ``together``."""
    global _current
    before, _current = _current, together
    try:
        yield
    finally:
        _current = before
