"""One condition of a verdict, on feature extractors and on text-to-image models alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from eval.stats.aggregate import lower_limit
from lab.core.data import Role
from lab.core.types import Score

Rule = Literal["≥", "≤", "<", "low >"]


@dataclass(frozen=True)
class Check:
    """How one condition came out.

    Args:
        side: whose condition it is. what: in words, what the figure is.
        rule: of the figure against ``threshold``; ``low >`` asks that the whole interval lies above
            it.
        missing: cells (seed × case) in which the figure was not measured.
    """

    side: Role
    what: str
    figure: Score
    rule: Rule
    threshold: float
    missing: int = 0

    def _holds(self, value: float) -> bool:
        if self.rule in ("≥", "low >"):
            return value > self.threshold if self.rule == "low >" else value >= self.threshold
        return value < self.threshold if self.rule == "<" else value <= self.threshold

    @property
    def limit(self) -> bool:
        """Whether the figure is a lower limit."""
        return lower_limit(self.figure)

    @property
    def passed(self) -> bool:
        """What was not measured everywhere does not pass; a lower limit ("at least") can pass a ≥,
        never a ≤.
        """
        value = self.figure.low if self.rule == "low >" else self.figure.value
        if value is None or self.missing:
            return False
        return self._holds(value) and not (self.limit and self.rule in ("≤", "<"))

    @property
    def sure(self) -> bool:
        """The whole interval across seeds lies on the side where the value is."""
        f = self.figure
        if f.interval != "across_seeds" or f.low is None or f.high is None:
            return False
        if self.limit:  # the figure itself may lie anywhere above
            return self._holds(f.low) == (self.rule not in ("≤", "<"))
        return self._holds(f.low) == self._holds(f.high)

    @property
    def required(self) -> str:
        return (
            f"interval above {self.threshold:g}"
            if self.rule == "low >"
            else f"{self.rule} {self.threshold:g}"
        )

    def row(self) -> dict[str, Any]:
        f = self.figure
        return {
            "side": self.side,
            "check": self.what,
            "value": f.value,
            "low": f.low,
            "high": f.high,
            "n": f.n,
            "required": self.required,
            "passed": self.passed,
            "sure": self.sure,
            "note": f.note or "",
        }
