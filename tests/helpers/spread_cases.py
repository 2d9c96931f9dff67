"""Stages that the processes of a run spread among themselves; importable by name, see
`ranks_together`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from ranks_together import Found

from lab.core.cache import Artifact, StageCache
from lab.core.distributed import team
from lab.core.errors import Diverged, RankFailed
from lab.core.hashing import stage_key
from lab.runner.pipeline import Cell
from lab.runner.spread import DistributedExecutor

PARTS = {"light": 0, "one": 1, "two": 2, "three": 3}


def _note(folder: Path, name: str) -> None:
    (folder / f"{name}.{os.environ['RANK']}").touch()


def cells(folder: Path, names: list[str]) -> list[Cell]:
    """A stage per name; its kind is the part before the dash. Each notes which processes computed
    it.
    """

    def make(name: str) -> Cell:
        def compute(checkpoint: Any) -> Artifact:
            _note(folder, name)
            if name.startswith(("bad", "lost")):
                raise ValueError("a defect")
            if name.startswith("metric"):  # would gather over all processes, which are elsewhere
                from torchmetrics import (
                    MeanMetric,
                )  # here: in a process that has not imported it yet

                metric = MeanMetric()
                metric.update(float(name[-1]))
                return Artifact({"mean": float(metric.compute())})
            return _sum(checkpoint, diverges=name.startswith("diverges"))

        stage = (
            "immunize" if name.startswith(("bad", "diverges")) else "attack"
        )  # without which no run goes on
        return Cell(stage, stage_key(name=name), {"attack": name}, compute)

    return [make(name) for name in names]


def _sum(checkpoint: Any, diverges: bool) -> Artifact:
    """Σ n over 6 terms in two halves, with a checkpoint between them."""
    total, begun = torch.zeros(1), 0
    saved = checkpoint.load()
    if saved is not None:
        total, begun = saved[0]["total"], saved[1]["begun"]

    def compute(n: int) -> dict[str, torch.Tensor]:
        if diverges and n == 2:
            raise Diverged("no number", 1)
        return {"x": torch.full((1,), float(n))}

    for half in range(begun, 2):
        team().ordered(
            3, lambda n, half=half: compute(n + 3 * half), lambda _, term: total.add_(term["x"])
        )
        checkpoint.save({"total": total.clone()}, {"begun": half + 1})
    team().agree(lambda: {"total": total}, "at the end")
    return Artifact({"resumed_at": begun, "size": team().size}, {"total": total})


def spread(root: str, names: list[str]) -> Found:
    """Compute the stages; what this process then reads."""
    folder = Path(root)
    ranks = DistributedExecutor(60.0, 2)
    store = StageCache(folder / "cache")
    mine = cells(folder, names)

    def parts(cell: Cell) -> int:
        return PARTS.get(cell.label["attack"].partition("-")[0], 1)

    try:
        computed = ranks.compute(store, mine, parts, "test")
    except Exception as error:
        failure = {
            "rank": ranks.rank,
            "type": type(error).__name__,
            "message": str(error),
            "told": None,
        }
        cause = ranks.cause(error)
        if not isinstance(cause, RankFailed):
            ranks.report(failure)
        return {}, {
            "cause": str(cause),
            "echo": isinstance(cause, RankFailed),
            "now": ranks.now and ranks.now.title,
        }
    found = [store.read(cell.stage, cell.key) for cell in mine]
    values = [
        None if a is None else a.values | {k: float(t) for k, t in a.tensors.items()} for a in found
    ]
    return {}, {
        "computed": len(computed),
        "values": values,
        "failed": ranks.failed,
        "facts": ranks.facts(),
    }
