"""Attacks and metrics that failed while the rest of their run went on."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from torch.distributed import DistError

from lab.core.errors import RankFailed, UserError, config_key_of, explain
from lab.runner.pipeline import Cell

log = logging.getLogger(__name__)
VERDICTS = ("verdict", "verdict_share")


def is_recoverable(cell: Cell, error: Exception) -> bool:
    """Whether a run goes on without this stage.

    Not without an immunization, nor after what a user mends first (a wrong option) or what befalls
    every stage (the disk, the connection to another process, a device whose state is lost; that its
    memory ran out is no such thing).
    """
    return cell.stage != "immunize" and not (
        isinstance(error, UserError) or affects_all_stages(error)
    )


def affects_all_stages(error: BaseException) -> bool:
    """Whether the next stage would meet the same; no part is to blame then."""
    return isinstance(error, OSError | DistError) or "CUDA error" in str(error)


def facts(error: Exception, rank: int | None = None) -> dict[str, Any]:
    """Arguments of `RankFailed`: what one process tells the others of ``error``, which may be what
    another told it.
    """
    if isinstance(error, RankFailed):
        return {
            name: getattr(error, name)
            for name in ("rank", "type", "message", "told", "key", "cell", "traceback")
        }
    return own_facts(error, rank)


def own_facts(error: BaseException, rank: int | None) -> dict[str, Any]:
    """The same of an exception as this process met it."""
    told = "".join(traceback.format_exception(error))
    return {
        "rank": rank,
        "type": type(error).__name__,
        "message": str(error),
        "told": explain(error),
        "traceback": told,
        "key": error.key if isinstance(error, UserError) else config_key_of(error),
    }


def _forget(error: BaseException | None) -> None:
    """The frames of a traceback hold the models and gradients of what failed, and the run needs
    their memory.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class FailedStages:
    """What a run lost so far.

    Attributes:
        first: the error that the run ends with, once everything else is done.
        attacks, metrics: names and why.
    """

    def __init__(self) -> None:
        self.first: Exception | None = None
        self.attacks: dict[str, str] = {}
        self.metrics: dict[str, str] = {}

    def add(self, cell: Cell, error: Exception) -> None:
        known = facts(error)
        why = f"{known['type']}: {known['message']}"
        (self.attacks if cell.stage == "attack" else self.metrics)[cell.label["attack"]] = why
        log.warning("%s failed, the others go on: %s", cell.title, why)
        log.info("%s", known["traceback"])
        _forget(error)
        self.first = self.first or error

    def has(self, cell: Cell) -> bool:
        """Whether nothing is left to do for ``cell``, since another stage of the same attack
        failed.
        """
        return cell.stage == "attack" and cell.label["attack"] in self.attacks

    def blank(self, found: dict[str, Any]) -> None:
        """No verdict without an attack that was asked for: it may be the one that breaks the model.

        Args:
            found: ``metrics``, ``curves`` and ``tables`` of a record.
        """
        if not self.attacks:
            return
        told = f"{', '.join(self.attacks)} failed: a verdict needs every attack that was asked for"
        for name in VERDICTS:
            if name in found["metrics"]:
                found["metrics"][name] |= {"value": None, "low": None, "high": None, "note": told}
        tables = found["tables"]
        tables.pop("verdict", None)
        if "seed_values" in tables:
            tables["seed_values"] = [
                row for row in tables["seed_values"] if row["metric"] not in VERDICTS
            ]
