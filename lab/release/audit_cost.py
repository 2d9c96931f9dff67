"""What an attack costs here and now: seconds per update, measured on the checkpoint itself.

Stages come from a cache that another machine may have filled, so times are never taken from there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from attacks.diffusion.attack import ConceptBase
from attacks.diffusion.options import TrainingOptions
from attacks.diffusion.trainer import ConceptLearner
from lab.core.data import Concept
from lab.core.progress import progress
from lab.core.types import Budget
from lab.models.diffusion import DiffusionModel
from lab.runner.pipeline import Pipeline

UPDATES = 3  # timed, after one that warms up
Row = dict[str, Any]


def seconds_per_update(
    pipeline: Pipeline, rows: list[Row]
) -> dict[tuple[str, str, str, int], float]:
    """(attack, concept, case, seed) → seconds of one update with the options that the search chose.

    Only the row of each attack that counts for the page is timed: attacks differ, concepts do not.
    Other rows of the same attack get the same figure. An attacker of another class than the bench's
    has none.
    """
    by_attack: dict[str, float] = {}
    own = {
        name
        for name, part in pipeline.parts.attacks.items()
        if not isinstance(part.obj, ConceptBase)
    }
    rows = [
        row for row in rows if row["attack"] not in own
    ]  # whose updates cannot be timed one by one
    for row in progress(rows, "measure cost"):
        if row["attack"] not in by_attack:
            by_attack[row["attack"]] = _measure(pipeline, row)
    return {(r["attack"], r["concept"], r["case"], r["seed"]): by_attack[r["attack"]] for r in rows}


def _measure(pipeline: Pipeline, row: Row) -> float:
    case = next(c for c in pipeline.cases(row["seed"]) if c.name == row["case"])
    task, model = case.task(row["concept"]), pipeline.model(row["model"], case, row["seed"])
    attack = pipeline.parts.attacks[row["attack"]].obj
    return timed(attack.varied(row["best"]), model, task, pipeline.budget, row["seed"])


def timed(
    attack: ConceptBase,
    model: DiffusionModel,
    task: Concept,
    budget: Budget,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one update, the median over `UPDATES`; of a curriculum the mean over its stages by
    their steps.
    """
    total, start = 0.0, 0
    for who, what, stop in attack.plan(task, budget):
        total += (stop - start) * _stage(who, model, what, budget.steps, seed, clock)
        start = stop
    return total / max(start, 1)


def _stage(
    who: TrainingOptions,
    model: DiffusionModel,
    what: Concept,
    steps: int,
    seed: int,
    clock: Callable[[], float],
) -> float:
    learner = ConceptLearner(_silent(who), model.copy(), what, steps, seed)
    learner.advance(0)
    return statistics.median(_durations(learner, model.device, clock))


def _silent(who: TrainingOptions) -> TrainingOptions:
    return replace(who, families=(), keep_weights=False)


def _durations(
    learner: ConceptLearner, device: torch.device, clock: Callable[[], float]
) -> Iterator[float]:
    for step in range(1, UPDATES + 1):
        begin = clock()
        learner.advance(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield clock() - begin
