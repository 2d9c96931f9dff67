"""Stages that failed while the rest of their run went on."""

from __future__ import annotations

import traceback
from typing import Any

from torch.distributed import DistError

from lab.core.distributed import PeerLost
from lab.core.errors import Diverged, RunFailed, UserError, explain
from lab.runner.pipeline import Cell

VERDICTS = ("verdict", "verdict_share")


def is_recoverable(cell: Cell, error: Exception) -> bool:
    """Return True if the run can continue without this stage."""
    if cell.stage == "immunize":
        return False  # every later stage needs it
    if isinstance(error, UserError):
        return False  # the user must fix it first
    return not affects_all_stages(error)


def affects_all_stages(error: BaseException) -> bool:
    """Return True if the next stage would fail in the same way: a full disk, a lost device."""
    return isinstance(error, OSError | DistError | PeerLost) or "CUDA error" in str(error)


def describe(
    error: BaseException,
    key: str | None = None,
    rank: int | None = None,
    stage: str | None = None,
) -> RunFailed:
    """Return ``error`` as plain values; a `RunFailed` is returned as it is.

    Args:
        key: config key of the part that ran.
        rank: of this process, in a run of several.
        stage: key of the stage that ran.
    """
    if isinstance(error, RunFailed):
        return error
    if affects_all_stages(error):
        key = None  # no part is to blame
    return RunFailed(
        type=type(error).__name__,
        message=str(error),
        user_message=explain(error),
        key=error.key if isinstance(error, UserError) else key,
        step=error.step if isinstance(error, Diverged) else None,
        stage=stage,
        rank=rank,
        traceback="".join(traceback.format_exception(error)),
    )


class FailedStages:
    """What a run lost so far.

    Attributes:
        first: the failure that the run ends with, once everything else is done.
        attacks, metrics: name → reason.
    """

    def __init__(self) -> None:
        self.first: RunFailed | None = None
        self.attacks: dict[str, str] = {}
        self.metrics: dict[str, str] = {}

    def add(self, cell: Cell, failure: RunFailed) -> None:
        """Note that ``cell`` failed; of an attack or a metric the first failure counts."""
        names = self.metrics if cell.attack is None else self.attacks
        names.setdefault(str(cell.metric or cell.attack), f"{failure.type}: {failure.message}")
        self.first = self.first or failure

    def clear_verdicts(self, results: dict[str, Any]) -> None:
        """Remove the verdicts if an attack failed: it may be the one that breaks the model.

        Args:
            results: ``metrics``, ``curves`` and ``tables`` of a record.
        """
        if not self.attacks:
            return
        note = f"{', '.join(self.attacks)} failed: a verdict needs every attack that was asked for"
        for name in VERDICTS:
            if name in results["metrics"]:
                results["metrics"][name] |= {"value": None, "low": None, "high": None, "note": note}
        tables = results["tables"]
        tables.pop("verdict", None)
        if "seed_values" in tables:
            tables["seed_values"] = [
                row for row in tables["seed_values"] if row["metric"] not in VERDICTS
            ]
