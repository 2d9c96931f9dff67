"""Processes that compute a sum together: each computes some terms, all add them in one order.

DistributedDataParallel has no second derivatives (pytorch #63929), so nothing is wrapped. Every
process holds all parameters and computes the terms of its own concepts. A term travels to the
others by broadcast and is added everywhere in the order of the concepts, so that the sum has the
same bits for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lab.core.errors import Diverged
from lab.core.hashing import digest
from lab.core.types import Checkpoint

Params = dict[str, Tensor]


class OutOfStep(Exception):
    """Processes that should hold the same parameters do not."""


class PeerLost(Exception):
    """Another process of the run ended while this one waited for it."""


def _wait_for(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a collective; raises `PeerLost` where the connection to another process ends."""
    try:
        collective(*args, **kwargs)
    except RuntimeError as error:  # gloo and nccl raise nothing more precise
        raise PeerLost(str(error)) from error


class Team:
    """``size`` processes that work on one thing, of which this one has number ``rank``.

    Args:
        group: their process group, for tensors on the CPU and on the device of each; None: all
            processes of the run.
    """

    def __init__(self, size: int = 1, rank: int = 0, group: Any = None) -> None:
        self.size, self.rank, self.group = size, rank, group

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Return on every member what member ``source`` gives; other members' values are unread."""
        values = [value]
        if self.size > 1:
            _wait_for(dist.broadcast_object_list, values, source, group=self.group)
        return values[0]

    def broadcast(self, tensors: Params, source: int = 0) -> Params:
        """Return the tensors of member ``source`` on every member.

        Where each computed them, the last bits may differ between members.
        """
        if self.size == 1:
            return tensors
        layout = [(name, x.shape, x.dtype, x.device.type) for name, x in tensors.items()]
        received: Params = {}
        for name, shape, dtype, device in self.broadcast_object(layout, source):
            if self.rank == source:
                received[name] = tensors[name].detach().contiguous()
            else:
                received[name] = torch.empty(shape, dtype=dtype, device=device)
            _wait_for(dist.broadcast, received[name], source, group=self.group)
        return received

    def gather(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """Return the union of all members' ``values``."""
        parts: list[Any] = [dict(values)] * self.size
        if self.size > 1:
            _wait_for(dist.all_gather_object, parts, dict(values), group=self.group)
        return {n: value for part in parts for n, value in part.items()}

    def reduce_in_order(
        self, count: int, compute: Callable[[int], Params], add: Callable[[int, Params], None]
    ) -> None:
        """Call ``add(n, compute(n))`` for n < ``count`` in this order on every member.

        Each ``compute`` runs on one member. As many terms as there are members are computed at a
        time, then shared one by one: no member holds more than its own term and the one being
        added.

        Raises:
            Diverged, FloatingPointError: from ``compute``, on every member.
        """
        for start in range(0, count, self.size):
            term: Params = {}
            error: Exception | None = None
            if start + self.rank < count:
                try:
                    term = compute(start + self.rank)
                except (Diverged, FloatingPointError) as caught:
                    error = caught
            for n in range(start, min(start + self.size, count)):
                failure = self.broadcast_object(error, n - start)
                if failure is not None:
                    raise failure
                add(n, self.broadcast(term, n - start))

    def assert_equal(self, tensors: Params) -> None:
        """Compare a hash of ``tensors`` across the members.

        Raises:
            OutOfStep: the hashes differ.
        """
        if self.size == 1:
            return
        hashes = self.gather({self.rank: digest(*(tensors[name] for name in sorted(tensors)))})
        if len(set(hashes.values())) > 1:
            listed = ", ".join(f"process {n}: {h[:12]}" for n, h in sorted(hashes.items()))
            raise OutOfStep(f"the processes' parameters differ at the end ({listed})")


class SharedCheckpoint:
    """A checkpoint for a whole team: the first member reads and writes it, all get its content."""

    def __init__(self, own: Checkpoint | None, team: Team) -> None:
        self.own, self.team = own, team

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        saved = self.own.load() if self.own is not None else None
        tensors, values = saved if saved is not None else ({}, None)
        values = self.team.broadcast_object(values)
        tensors = self.team.broadcast(tensors)
        return None if values is None else (tensors, values)

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        if self.own is not None:
            self.own.save(tensors, values)


ALONE = Team()
_team: ContextVar[Team] = ContextVar("team", default=ALONE)


def team() -> Team:
    """Return the processes that work on what this one computes now; `ALONE` by default."""
    return _team.get()


@contextmanager
def working(together: Team) -> Iterator[None]:
    """Make `team` return ``together`` inside."""
    token = _team.set(together)
    try:
        yield
    finally:
        _team.reset(token)
