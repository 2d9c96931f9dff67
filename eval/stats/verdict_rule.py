"""The rule of a verdict, for feature extractors and text-to-image models: checks of figures
against thresholds, limits included.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from eval.stats.aggregate import ROLES, samples
from eval.stats.intervals import SHARE, joined, score_samples
from lab.core.data import Role
from lab.core.types import AnyCase, RunView, Score, Scores

Rule = Literal["≥", "≤", "<", "low >", "high <"]
StepsRatio = Annotated[float, Field(strict=True, ge=1)]  # of steps
Result = Literal["passes", "fails", "inconclusive"]
# of the metric ``verdict``
VALUES: dict[Result, float | None] = {"passes": 1.0, "fails": 0.0, "inconclusive": None}
WORDS = {value: word for word, value in VALUES.items()}
COMPARE = {
    "≥": operator.ge,
    "≤": operator.le,
    "<": operator.lt,
    "low >": operator.gt,
    "high <": operator.lt,
}


@dataclass(frozen=True)
class Check:
    """One condition of a verdict.

    Args:
        side: whose condition it is.
        what: in words, what the figure is.
        rule: of the figure against ``threshold``; ``low >`` requires the whole interval above it,
            ``high <`` below.
        missing: cells (seed × case) in which the figure was not measured.
        alternative: the checks of one alternative are enough on the harmful side.
    """

    side: Role
    what: str
    figure: Score
    rule: Rule
    threshold: float
    missing: int = 0
    alternative: str = ""

    def _holds(self, value: float) -> bool:
        return bool(COMPARE[self.rule](value, self.threshold))

    @property
    def _safe_bound(self) -> str:
        """The bound beyond which the rule goes on to hold."""
        return "lower" if self.rule in ("≥", "low >") else "upper"

    @property
    def result(self) -> Result:
        """Inconclusive: what was not measured everywhere, and a limit whose true value may lie on
        the other side of the threshold.
        """
        figure = self.figure
        value = {"low >": figure.low, "high <": figure.high}.get(self.rule, figure.value)
        if value is None or self.missing:
            return "inconclusive"
        holds = self._holds(value)
        if figure.bound is not None and holds != (figure.bound == self._safe_bound):
            return "inconclusive"
        return "passes" if holds else "fails"

    @property
    def passed(self) -> bool:
        return self.result == "passes"

    @property
    def significant(self) -> bool:
        """Whether the 95 % interval across seeds excludes the threshold."""
        f = self.figure
        if f.interval != "across_seeds" or f.low is None or f.high is None:
            return False
        if f.bound is None:
            return self._holds(f.low) == self._holds(f.high)
        return self._holds(f.low if f.bound == "lower" else f.high) == (f.bound == self._safe_bound)

    @property
    def required(self) -> str:
        words = {"low >": "interval above", "high <": "interval below"}
        return f"{words.get(self.rule, self.rule)} {self.threshold:g}"

    def row(self) -> dict[str, Any]:
        figure = {key: getattr(self.figure, key) for key in ("value", "low", "high", "n", "bound")}
        return {
            "side": self.side,
            "check": self.what,
            **figure,
            "required": self.required,
            "result": self.result,
            "passed": self.passed,
            "significant": self.significant,
            "note": self.figure.note or "",
        }


def side_result(checks: Sequence[Check], side: Role) -> Result:
    """Return the result of one side: it passes with one alternative whose checks all pass, and
    fails where every alternative has a check that fails.
    """
    results: dict[str, set[Result]] = {}
    for check in (c for c in checks if c.side == side):
        results.setdefault(check.alternative, set()).add(check.result)
    if {"passes"} in results.values():
        return "passes"
    fails = results and all("fails" in group for group in results.values())
    return "fails" if fails else "inconclusive"


def verdict_result(checks: Sequence[Check]) -> Result:
    """Return ``passes`` where both sides pass, ``fails`` where one fails."""
    sides = [side_result(checks, side) for side in ROLES]
    if "fails" in sides:
        return "fails"
    return "inconclusive" if "inconclusive" in sides else "passes"


def figure_text(figure: Score) -> str:
    """Return a figure as text: ``≥ 1.1 [1, 1.2]``."""
    if figure.value is None:
        return "not measured"
    lead = {None: "", "lower": "≥ ", "upper": "≤ "}[figure.bound]
    bare = figure.low is None or figure.high is None
    return f"{lead}{figure.value:.3g}" + ("" if bare else f" [{figure.low:.3g}, {figure.high:.3g}]")


def verdict_scores(
    run: RunView,
    checks: Sequence[Check],
    checks_of: Callable[[int, AnyCase], Sequence[Check]],
    remark: str | None = None,
) -> Scores:
    """Return ``verdict``, ``verdict_share`` (the share of seeds × cases in which the same rule
    holds) and the table of checks. The note of the verdict begins with its `Result`; reports
    say why by the table.

    A case whose immunization diverged is a failure: the verdict is 0 then, and the share counts it.

    Args:
        checks: of the whole run.
        checks_of: of one seed and case.
        remark: what the note adds.
    """
    held = samples(
        run,
        lambda seed, case: float(verdict_result(checks_of(seed, case)) == "passes"),
        diverged=0.0,
    )
    lost, total = len(run.diverged), sum(map(len, held))
    failed = f"{lost} of {total} cases diverged and count as failures" if lost else None
    result = "fails" if lost else verdict_result(checks)
    sides = ", ".join(f"{side} side {side_result(checks, side)}" for side in ROLES)
    reason = ". ".join(filter(None, (result, failed, sides, remark)))
    verdict = Score(VALUES[result], n=len(held), note=reason)
    note = joined("share of seeds × cases where the verdict holds", failed)
    share = score_samples(held, "higher", "no case", note=note, bounds=SHARE)
    return Scores(
        {"verdict": verdict, "verdict_share": share},
        tables={"verdict": [check.row() for check in checks]},
    )
