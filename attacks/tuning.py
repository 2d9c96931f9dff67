"""Learning rates: tuned by a search with the same number of trials in every model, and their
schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lab.core.errors import UserError
from lab.core.options import choice, count, number, unread

SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class Rate:
    """How an attacker chooses its learning rate.

    Attributes:
        lr: a fixed rate, or None for the search.
        trials: runs that the search may spend; equal in every model.
        schedule: factor on the rate over the whole trajectory.
    """

    lr: float | None
    trials: int
    schedule: str

    @classmethod
    def parse(cls, name: str, lr: object, trials: object, schedule: object, usual: int) -> Rate:
        """From the options of attack ``name``, whose ``trials`` are the ``usual`` ones where nobody
        says otherwise.

        Raises:
            UserError: ``lr`` neither ``auto`` nor a number > 0, fewer than one trial, trials of no
                search, or an unknown schedule.
        """
        key = f"attacks.{name}"
        fixed: float | None = None
        if lr != "auto":
            if isinstance(lr, str):
                raise UserError(f"{key}.lr", lr, "must be auto or a number > 0.")
            fixed = number(f"{key}.lr", lr, above=0)
        trials = count(f"{key}.lr_trials", trials)
        unread(f"{key}.lr_trials", trials, usual, fixed is None, f"{key}.lr=auto")
        return cls(fixed, trials, choice(f"{key}.schedule", schedule, SCHEDULES))

    def factor(self, step: int, total: int) -> float:
        """What multiplies the rate at update ``step`` (0 … ``total`` - 1): 1 at the first, towards
        0 at the end.
        """
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / total))
        return 1 - step / total if self.schedule == "linear" else 1.0


def search(
    trial: Callable[[float], float],
    centre: float,
    trials: int,
    table: dict[float, float],
    after: Callable[[], None] = lambda: None,
) -> float:
    """Best learning rate after exactly ``trials`` evaluations of ``trial`` on a geometric grid.

    Pattern search on the decimal exponent: a decade up and down from ``centre``, one neighbour
    further while the best one lies at the edge, then half as wide a step around the best one. A
    fixed grid of as many points would depend on the scale of the features, which an immunizer is
    free to change.

    Args:
        trial: loss that a run at a rate is scored by; inf where it diverged.
        centre: rate at exponent 0.
        trials: evaluations, those already in ``table`` included.
        table: exponent → loss; filled here (a resumed attack passes what it had).
        after: called after each evaluation.

    Returns:
        the rate with the lowest loss, the smaller one of equals.
    """
    width = 1.0
    while True:
        best = min(table, key=lambda e: (table[e], e), default=0.0)
        if len(table) >= trials:
            return centre * 10**best
        candidate = next((e for e in (best, best + width, best - width) if e not in table), None)
        if candidate is None:
            width /= 2
            continue
        loss = trial(centre * 10**candidate)
        table[candidate] = loss if math.isfinite(loss) else math.inf
        after()
