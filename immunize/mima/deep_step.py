"""Options of ``mima_deep`` and what one of its upper steps finds (`immunize.mima.deep`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from immunize.mima.attackers import Attack, Snapshot
from immunize.mima.losses import Params

EVALUATIONS = ("merged", "own")
BENIGN = ("regret", "loss")


@dataclass(frozen=True)
class DeepOptions:
    """See `immunize.mima.method.MimaDeep`."""

    steps: int
    batch_size: int
    inner_batch_size: int
    prior_batch_size: int
    at: tuple[float, ...]
    evaluate: tuple[str, ...]
    cap: float | None
    w_prior: float
    prior_at: str
    prior_ramp: float
    w_distill: float
    w_benign: float
    benign: str = "regret"
    w_decoy: float = 0.0
    online: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Level:
    """One concept's lower level, finished: its marks, of which every list has equally many."""

    attack: Attack
    found: list[Snapshot]


def reached(level: Level) -> dict[str, float]:
    """Steps of the attack so far and, where it is over, by which share it lowered its first batch's
    loss.
    """
    last = level.found[-1]
    drop = {} if math.isnan(last.now) else {"lower_drop": 1 - last.now / last.first}
    return {"lower_steps": float(last.step)} | drop


@dataclass
class StepResult:
    """What one upper step finds: attacks and figures by the concept's number, the preservation
    terms' gradient.
    """

    levels: dict[int, Level] = field(default_factory=dict)
    facts: dict[int, dict[str, float]] = field(default_factory=dict)
    kept: Params = field(default_factory=dict)

    def values(self, targets: int) -> dict[str, float]:
        """For the log: means over targets and places, then what the benign and the preservation
        terms have found.
        """
        listed: dict[str, list[float]] = {}
        for n in range(targets):
            for key, value in self.facts[n].items():
                listed.setdefault(key.rpartition("/")[2], []).append(value)
        values = {key: sum(found) / len(found) for key, found in listed.items()}
        for n in sorted(self.facts):
            values |= self.facts[n] if n >= targets else {}
        return values
