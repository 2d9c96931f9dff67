"""What all run metrics share: walking over seeds and cases, averaging curves, choosing the
worst.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lab.core.data import Case, Role, Split, Task
from lab.core.progress import progress
from lab.core.statistics import score
from lab.core.types import BASELINE, RunView, Score, Trajectory

Better = Literal["higher", "lower", "neutral"]
Samples = list[list[float]]
Line = tuple[Sequence[float], Sequence[float]]  # steps, values


class Cached:
    """A `RunView` read in one pass, seed by seed: data of one seed at a time, since those of all
    may not fit in memory.

    ``cases`` gives cases without rows; trajectories come without the attackers' weights.

    Args:
        visit: called once with every (seed, case), rows included, for what has to be measured on
            them.
        trajectories: read every attack.
        label: of the progress bar.
    """

    def __init__(
        self,
        run: RunView,
        visit: Callable[[int, Case], None] | None = None,
        *,
        trajectories: bool = False,
        label: str = "read trajectories",
    ) -> None:
        self.scenario, self.immunizer, self.model_names = (
            run.scenario,
            run.immunizer,
            run.model_names,
        )
        self.attacks, self.seeds, self.budget = run.attacks, run.seeds, run.budget
        self._run, self.model, self.history = run, run.model, run.history
        self.diverged = dict(diverged_of(run))
        self._cases: dict[int, tuple[Case, ...]] = {}
        self._trajectories: dict[tuple[str, str, str, str, int], Trajectory] = {}
        for seed in self.seeds:
            cases = run.cases(seed)
            self._cases[seed] = tuple(_without_rows(case) for case in cases)
            for case in progress(cases, f"{label}, seed {seed}", total=len(cases)):
                if visit is not None:
                    visit(seed, case)
                if trajectories:
                    self._read(run, case, seed)

    def _read(self, run: RunView, case: Case, seed: int) -> None:
        for model_name in self.model_names:
            for attack in self.attacks:
                for task in case.tasks:
                    full = run.trajectory(model_name, attack, case, task, seed)
                    key = (model_name, attack, case.name, task.name, seed)
                    self._trajectories[key] = Trajectory(
                        full.steps, full.values, full.status, full.info
                    )

    def cases(self, seed: int) -> tuple[Case, ...]:
        return self._cases[seed]

    def trajectory(
        self, model_name: str, attack: str, case: Case, task: Task, seed: int
    ) -> Trajectory:
        return self._trajectories[model_name, attack, case.name, task.name, seed]

    def kept(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return self._run.kept(key, compute)


def diverged_of(run: RunView) -> dict[tuple[str, int], Any]:
    """(case, seed) → error of every immunization that diverged; ``run.cases`` leaves these out."""
    found: dict[tuple[str, int], Any] = getattr(run, "diverged", {})
    return found


def left_out(run: RunView) -> str | None:
    """A note on the cases whose immunization diverged, counted over seeds; None when there are
    none.
    """
    lost = len(diverged_of(run))
    return (
        f"{lost} of {lost + sum(1 for _ in walk(run))} cases diverged and are left out"
        if lost
        else None
    )


def _without_rows(case: Case) -> Case:
    def empty(task: Task) -> Task:
        train, test = (Split(s.x[:0].clone(), s.y[:0].clone()) for s in (task.train, task.test))
        return replace(task, train=train, test=test)

    return Case(case.name, empty(case.benign), tuple(empty(t) for t in case.harmful))


def model_name_names(run: RunView) -> tuple[str, ...]:
    """(baseline,) or (baseline, immunizer); the baseline always comes first."""
    return (BASELINE, *(a for a in run.model_names if a != BASELINE))


def both_model_names(run: RunView) -> bool:
    return len(model_name_names(run)) == 2


def tasks_of(case: Case, role: Role) -> tuple[Task, ...]:
    return (case.benign,) if role == "benign" else case.harmful


def walk(run: RunView) -> Iterator[tuple[int, int, Case]]:
    """(position of the seed, seed, case) over everything in the run."""
    for position, seed in enumerate(run.seeds):
        for case in run.cases(seed):
            yield position, seed, case


def samples(run: RunView, value: Callable[[int, Case], float | None]) -> Samples:
    """``value(seed, case)`` as ``samples[seed][case]``; None is left out, and a seed with nothing
    left too.
    """
    groups: Samples = [[] for _ in run.seeds]
    for position, seed, case in walk(run):
        v = value(seed, case)
        if v is not None:
            groups[position].append(v)
    return [g for g in groups if g]


def shares(run: RunView, value: Callable[[int, Case], float | None]) -> Samples:
    """As `samples`, for values that count successes: a case whose immunization diverged is a
    failure (0).
    """
    lost = [seed for _, seed in diverged_of(run)]
    groups: dict[int, list[float]] = {seed: [] for seed in sorted({*run.seeds, *lost})}
    for _, seed, case in walk(run):
        v = value(seed, case)
        if v is not None:
            groups[seed].append(v)
    for seed in lost:
        groups[seed].append(0.0)
    return [g for g in groups.values() if g]


def lower_limit(figure: Score) -> bool:
    """Whether the figure may be any higher one; its note says so."""
    return (figure.note or "").startswith("at least")


def joined(*notes: str | None) -> str | None:
    """Notes in one line; None when there is nothing to say."""
    return "; ".join(n for n in notes if n) or None


def score_or_reason(
    groups: Samples,
    better: Better,
    reason: str,
    *,
    aggregate: Literal["mean", "geomean"] = "mean",
    **kwargs: Any,
) -> Score:
    """`lab.core.statistics.score`, or a score without value and with ``reason`` when nothing could
    be measured.
    """
    if not groups:
        return Score(None, better=better, note=reason, unit=kwargs.get("unit", ""))
    return score(groups, better, aggregate=aggregate, **kwargs)


def worst(role: Role, values: Sequence[float]) -> float:
    """The value that counts: what protects least on harmful tasks, what costs most on benign
    ones.
    """
    return min(values) if role == "harmful" else max(values)


def mean_curve(lines: Sequence[Line]) -> tuple[list[float], list[float | None]]:
    """Mean of several (steps, values) lines, on the steps of the first, ending where the shortest
    ends.

    Values between the steps of a line are interpolated linearly. A line that stopped early
    (divergence) cuts the mean there, so that no mean over survivors is shown. A step where any line
    is not finite gives None.
    """
    if not lines:
        raise ValueError("a curve over an empty set")
    end = min(steps[-1] for steps, _ in lines)
    grid = [s for s in lines[0][0] if s <= end] or [lines[0][0][0]]
    stack = np.stack(
        [np.interp(grid, steps, np.asarray(values, dtype=float)) for steps, values in lines]
    )
    with np.errstate(invalid="ignore"):
        means = stack.mean(axis=0)
    return [float(s) for s in grid], [float(v) if math.isfinite(v) else None for v in means]


def model_name_curve(lines: dict[str, list[Line]], x: str, y: str, log: str = "") -> dict[str, Any]:
    """A record curve from lines per model; models that end early are filled with None up to the
    common steps.
    """
    means = {
        model_name: mean_curve(model_name_lines) for model_name, model_name_lines in lines.items()
    }
    steps = max((m[0] for m in means.values()), key=len)
    out: dict[str, Any] = {"step": steps, "x": x, "y": y, "log": log}
    for model_name, (grid, values) in means.items():
        lookup = dict(zip(grid, values, strict=True))
        out[model_name] = [lookup.get(s) for s in steps]
    return out


def thin(values: Sequence[float], points: int = 60) -> list[tuple[int, float]]:
    """At most ``points`` (index, value) pairs, evenly spread, first and last included."""
    if len(values) <= points:
        return list(enumerate(values))
    chosen = sorted({round(i * (len(values) - 1) / (points - 1)) for i in range(points)})
    return [(i, values[i]) for i in chosen]
