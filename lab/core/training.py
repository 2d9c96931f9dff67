"""The resumable training loop that immunizers, attackers and MiniSD share."""

from __future__ import annotations

import math
import time
from collections.abc import Container, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from lab.core.progress import progress
from lab.core.types import Checkpoint, Log

Row = Mapping[str, float]
Schedule = Literal["constant", "cosine", "linear"]


def schedule_factor(schedule: Schedule, step: int, total: int) -> float:
    """Return the factor on the learning rate at update ``step`` (0 … ``total`` - 1), at first 1."""
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
            _log(log, earlier)
    last_save = time.monotonic()
    numbers = range(start, steps)
    for step in numbers if label is None else progress(numbers, label, steps - start):
        row = trainee.step(step)
        if row is not None:
            rows.append({"step": step, **{k: float(v) for k, v in row.items()}})
            _log(log, rows[-1])
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


def _log(log: Log | None, row: Row) -> None:
    if log is not None:
        log(int(row["step"]), **{k: v for k, v in row.items() if k != "step"})
