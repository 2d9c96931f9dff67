"""When an attacked model shows a concept again: the first step at which a share of detections
reaches a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.generation.generations import DETECTED, Cell, EvaluatedRun
from eval.stats.intervals import Floats

# an attack takes a step at least; also what a concept counts that is shown before the attack
LEAST = 1.0


def crossing(steps: Sequence[int], shares: Floats, threshold: float) -> Floats:
    """First step at which ``shares`` [..., points] reach ``threshold``, linear between snapshots;
    nan where never.
    """
    grid = np.asarray(steps[: shares.shape[-1]], dtype=float)
    met = shares >= threshold
    index = met.argmax(-1)
    before = np.maximum(index - 1, 0)
    high, low = (np.take_along_axis(shares, i[..., None], -1)[..., 0] for i in (index, before))
    part = np.where(index > 0, (threshold - low) / np.where(high > low, high - low, 1.0), 0.0)
    found = grid[before] + part * (grid[index] - grid[before])
    return np.where(met.any(-1), found, np.nan)


def shown_before(count: int, cases: int) -> str | None:
    """Note on a concept that was there before the attack in ``count`` of ``cases``, where it counts
    as `LEAST`.
    """
    return (
        f"shown before the attack, counted as step 1, in {count} of {cases} cases"
        if count
        else None
    )


@dataclass(frozen=True)
class Relearned:
    """When one model shows a concept again, under its best attacker. ``censored``: not up to
    ``steps``.
    """

    steps: float
    censored: bool
    attack: str


def relearned(
    board: EvaluatedRun,
    cell: Cell,
    model_name: str,
    threshold: float,
    attacks: Sequence[str] | None = None,
    of: str = DETECTED,
) -> Relearned:
    """The one of ``attacks`` (all) that reaches the threshold first; if none does, the one that ran
    on longest.
    """
    met, ran = [], []
    for attack in attacks or board.attacks:
        reading = board.at(cell, model_name, attack)
        shares = reading.values[of][: reading.end].mean(1)
        step = float(crossing(board.plan, shares, threshold))
        if math.isnan(step):
            ran.append(
                (
                    board.plan[reading.end - 1],
                    shares[-1],
                    Relearned(board.plan[reading.end - 1], True, attack),
                )
            )
        else:
            met.append(Relearned(step, False, attack))
    if met:
        return min(met, key=lambda f: f.steps)
    return max(ran, key=lambda f: f[:2])[2]


def first_steps(
    board: EvaluatedRun,
    cell: Cell,
    model_name: str,
    threshold: float,
    attacks: Sequence[str] | None = None,
    of: str = DETECTED,
) -> tuple[Floats, Callable[[Floats], Floats], float]:
    """What `relearned` becomes in a resample, where the attackers are compared anew.

    Returns:
        detections [pictures, columns]; their means [..., columns] → first step of the attacker that
        is first [...], nan where none reaches the threshold; the last step that an attacker ran to.
    """
    chosen = [board.at(cell, model_name, attack) for attack in attacks or board.attacks]
    parts = [reading.values[of][: reading.end] for reading in chosen]
    ends = np.cumsum([len(part) for part in parts])[:-1]

    def first(means: Floats) -> Floats:
        steps = [crossing(board.plan, part, threshold) for part in np.split(means, ends, axis=-1)]
        return np.asarray(np.fmin.reduce(steps))  # a nan never wins

    return (
        np.concatenate(parts).T,
        first,
        float(board.plan[max(reading.end for reading in chosen) - 1]),
    )
