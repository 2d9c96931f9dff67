"""Attacks and metrics that failed while the rest of their run went on."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from torch.distributed import DistError

from lab.errors import RankFailed, UserError
from lab.failures import explain
from lab.pipeline import Cell

log = logging.getLogger(__name__)
VERDICTS = ("verdict", "verdict_share")


def bearable(cell: Cell, error: Exception) -> bool:
    """Whether a run goes on without this stage.

    Not without an immunization, nor after what a user mends first (a wrong option) or what befalls every stage (the
    disk, the connection to another process).
    """
    return cell.stage != "immunize" and not isinstance(error, UserError | OSError | DistError)


def facts(error: Exception, rank: int | None = None) -> dict[str, Any]:
    """Arguments of `RankFailed`: what one process tells the others of ``error``."""
    told = "".join(traceback.format_exception(error))
    return {
        "rank": rank, "type": type(error).__name__, "message": str(error), "told": explain(error), "traceback": told
    }  # fmt: skip


class Losses:
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
        name = cell.label["attack"]
        kind = error.type if isinstance(error, RankFailed) else type(error).__name__
        (self.attacks if cell.stage == "attack" else self.metrics)[name] = f"{kind}: {error}"
        log.warning("%s failed, the others go on: %s: %s", cell.title, kind, error)
        log.info("traceback of %s", cell.title, exc_info=error)
        self.first = self.first or error

    def has(self, cell: Cell) -> bool:
        """Whether nothing is left to do for ``cell``, since another stage of the same attack failed."""
        return cell.stage == "attack" and cell.label["attack"] in self.attacks

    def blank(self, metrics: dict[str, dict[str, Any]]) -> None:
        """No verdict without an attack that was asked for: it may be the one that breaks the model."""
        if self.attacks:
            told = f"{', '.join(self.attacks)} failed: a verdict needs every attack that was asked for"
            for name in VERDICTS:
                if name in metrics:
                    metrics[name] |= {"value": None, "low": None, "high": None, "note": told}
