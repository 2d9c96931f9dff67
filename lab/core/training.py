"""The resumable training loop of immunizers, attackers and MiniSD, its progress bar, and optimizer
state as named tensors.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from lab.core.types import Checkpoint, Log

_log = logging.getLogger(__name__)
T = TypeVar("T")
Row = Mapping[str, float]
Schedule = Literal["constant", "cosine", "linear"]
EVERY = 60.0  # seconds between two lines of the log: a batch job is looked at now and then


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar on stderr once the work outlasts two seconds; without a terminal, write
    lines to the log (`run.log`).
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        yield from tqdm(items, label, total, delay=2.0, leave=False, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= EVERY:
            last = now
            line = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left"
            _log.info(tqdm.format_meter(done, total, now - start, prefix=label, bar_format=line))
        yield item


def schedule_factor(schedule: Schedule, step: int, total: int, warmup: int = 0) -> float:
    """Return the factor on the learning rate at update ``step`` (0 … ``total`` - 1).

    It rises linearly to 1 over ``warmup`` steps; ``schedule`` is how it falls in the others.
    """
    if step < warmup:
        return (step + 1) / warmup
    step, total = step - warmup, max(total - warmup, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / total))
    return 1 - step / total if schedule == "linear" else 1.0


class Trainee(Protocol):
    """What is trained: one update at a time, its whole state as tensors and JSON-able values.

    Everything that an update reads lies in the state or follows from the step number, so that a
    resumed training repeats an unbroken one bit for bit.
    """

    def step(self, step: int) -> Row | None:
        """Do update number ``step`` (from 0); return what to log of it, if anything.

        Raises:
            FloatingPointError, Diverged: the numbers left the finite range.
        """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state after the last update."""

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from what `state` returned."""


def train(
    trainee: Trainee,
    steps: int,
    *,
    label: str | None,
    checkpoint: Checkpoint | None = None,
    log: Log | None = None,
    save_every: int | None = None,
    save_after: Container[int] = (),
    save_seconds: float | None = None,
) -> list[dict[str, float]]:
    """Run updates 0 … ``steps`` - 1 from the last checkpoint on, and return the logged rows.

    Rows of an earlier process are logged again first. An exception of the trainee ends the loop;
    the trainee decides what the weights are then.

    Args:
        label: of the progress bar; None shows none.
        save_every: updates between two checkpoints.
        save_after: numbers of updates after which a checkpoint is due as well.
        save_seconds: least time between two checkpoints. What is saved never changes the result.
    """
    rows: list[dict[str, float]] = []
    start = 0
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None:
        tensors, values = saved
        start, rows = int(values["step"]), [dict(row) for row in values["rows"]]
        trainee.restore(tensors, values["state"])
        for earlier in rows:
            _report(log, earlier)
    last_save = time.monotonic()
    numbers = range(start, steps)
    for step in numbers if label is None else progress(numbers, label, steps - start):
        row = trainee.step(step)
        if row is not None:
            rows.append({"step": step, **{k: float(v) for k, v in row.items()}})
            _report(log, rows[-1])
        due = save_every is not None and (step + 1) % save_every == 0
        due |= step + 1 in save_after
        due |= save_seconds is not None and time.monotonic() - last_save >= save_seconds
        if checkpoint is not None and due:
            tensors, values = trainee.state()
            # in main memory: a checkpoint must not double what the accelerator holds
            fixed = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
            checkpoint.save(fixed, {"step": step + 1, "rows": rows, "state": values})
            last_save = time.monotonic()
    return rows


def _report(log: Log | None, row: Row) -> None:
    if log is not None:
        log(int(row["step"]), **{k: v for k, v in row.items() if k != "step"})


_NUMBERS = "numbers"  # of `slots`: JSON bytes


def slots(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors, by number of the parameter and name.

    A list with one tensor per axis (SOAP) becomes one entry per axis, and what is no tensor goes to
    one entry together. There are none for a parameter that was never updated.
    """
    tensors: dict[str, Tensor] = {}
    saved = optimizer.state_dict()
    numbers: dict[str, Any] = {
        f"group.{i}": g["step"] for i, g in enumerate(saved["param_groups"]) if "step" in g
    }
    for i, state in saved["state"].items():
        for name, value in state.items():
            key = f"{i}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            elif isinstance(value, list):
                tensors |= {f"{key}.{j}": v for j, v in enumerate(value) if isinstance(v, Tensor)}
                numbers[key] = [[]] * len(value)
            else:
                numbers[key] = value
    if numbers:
        tensors[_NUMBERS] = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)
    return tensors


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, named without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def restore_slots(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `slots`, for an optimizer of the same parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = defaultdict(dict)
    numbers = {}
    if _NUMBERS in tensors:
        numbers = json.loads(bytes(tensors[_NUMBERS].tolist()))
    for key, number in numbers.items():
        index, name = key.split(".", 1)
        if index == "group":
            groups[int(name)]["step"] = number
        else:
            state[int(index)][name] = number
    for key, value in tensors.items():
        if key == _NUMBERS:
            continue
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        # fused kernels walk memory: channels last, as parameters
        has_layout = value.shape == like.shape
        copy = torch.empty_like(like, dtype=value.dtype) if has_layout else value.clone()
        copy.copy_(value)
        name, _, axis = name.partition(".")
        if axis:
            state[int(index)][name][int(axis)] = copy
        else:
            state[int(index)][name] = copy
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def state_tensors(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return ``parameters``, which are the optimizer's, and its `slots`."""
    state = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
    return state | {f"optimizer.{key}": value for key, value in slots(optimizer).items()}


@torch.no_grad()
def restore_state(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Undo `state_tensors`, in place."""
    for i, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"parameter.{i}"])
    restore_slots(optimizer, part_of(tensors, "optimizer."))
