"""Walk over the seeds and cases of a run; collect samples and mean curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from eval.stats.intervals import Better, Floats
from lab.core.data import Case, Role, Split, Task
from lab.core.training import progress
from lab.core.types import BASELINE, AnyCase, RunView, Trajectory

ROLES: tuple[Role, ...] = ("harmful", "benign")
PROTECTED: dict[Role, Better] = {"harmful": "higher", "benign": "lower"}  # slow, far, deviating
Line = tuple[Sequence[float], Sequence[float]]  # steps, values


class _PartOfRun:
    """Part of a run as a `RunView`: what is not given here is that of the whole run."""

    def __init__(self, run: RunView, **parts: Any) -> None:
        self._run = run
        self.__dict__.update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def one_case(run: RunView, seed: int, case: AnyCase) -> RunView:
    """Return the part of one seed and case."""
    part = _PartOfRun(run, seeds=(seed,), diverged={}, cases=lambda seed: (case,))
    return cast(RunView, part)


def load_run(
    run: RunView,
    visit: Callable[[int, Case], None] | None = None,
    *,
    trajectories: bool = False,
    label: str = "read trajectories",
) -> RunView:
    """Read a run in one pass, seed by seed: the data of all seeds may not fit in memory.

    The result gives cases without rows, and trajectories without the attackers' weights.

    Args:
        visit: called once with every (seed, case), rows included, for what has to be measured on
            them.
        trajectories: read every attack.
        label: of the progress bar.
    """
    loaded: dict[int, tuple[Case, ...]] = {}
    attacks: dict[tuple[str, str, str, str, int], Trajectory] = {}

    def trajectory(model: str, attack: str, case: Case, task: Task, seed: int) -> Trajectory:
        return attacks[model, attack, case.name, task.name, seed]

    for seed in run.seeds:
        cases = run.cases(seed)
        loaded[seed] = tuple(_without_rows(case) for case in cases)
        for case in progress(cases, f"{label}, seed {seed}", total=len(cases)):
            if visit is not None:
                visit(seed, case)
            for model, attack, task in (
                (m, a, t)
                for m in (run.model_names if trajectories else ())
                for a in run.attacks
                for t in case.tasks
            ):
                full = run.trajectory(model, attack, case, task, seed)
                attacks[model, attack, case.name, task.name, seed] = replace(
                    full, weights={}, samples={}
                )
    return cast(RunView, _PartOfRun(run, cases=loaded.__getitem__, trajectory=trajectory))


def _without_rows(case: Case) -> Case:
    def empty(task: Task) -> Task:
        train, test = (Split(s.x[:0].clone(), s.y[:0].clone()) for s in (task.train, task.test))
        return replace(task, train=train, test=test)

    return Case(case.name, empty(case.benign), tuple(empty(t) for t in case.harmful))


def each_case(run: RunView, label: str) -> Iterator[tuple[int, Any]]:
    """Yield (seed, case) with a progress bar."""
    for seed in run.seeds:
        cases = run.cases(seed)
        for case in progress(cases, f"{label}, seed {seed}", total=len(cases)):
            yield seed, case


def walk(run: RunView) -> Iterator[tuple[int, Any]]:
    """Yield (seed, case) over everything in the run."""
    return ((seed, case) for seed in run.seeds for case in run.cases(seed))


def left_out(run: RunView) -> str | None:
    """Return a note on the cases whose immunization diverged, counted over seeds, if any did."""
    lost = len(run.diverged)
    total = lost + sum(1 for _ in walk(run))
    return f"{lost} of {total} cases diverged and are left out" if lost else None


def tasks_of(case: Case, role: Role) -> tuple[Task, ...]:
    return (case.benign,) if role == "benign" else case.harmful


def baseline_suffix(model: str) -> str:
    """Return the end of the names of the baseline's metrics."""
    return "_baseline" if model == BASELINE else ""


def better_of(model: str, better: Better) -> Better:
    """Return ``better``; figures of the baseline are neutral."""
    return "neutral" if model == BASELINE else better


def samples(
    run: RunView, value: Callable[[int, Any], float | None], *, diverged: float | None = None
) -> list[list[float]]:
    """Return ``value(seed, case)`` as ``samples[seed][case]``; None is left out, and a seed with
    nothing left too.

    ``diverged``: what a case counts whose immunization diverged, a failure (0) where successes are
    counted.
    """
    lost = [] if diverged is None else [seed for _, seed in run.diverged]
    seeds = run.seeds if diverged is None else sorted({*run.seeds, *lost})
    groups: dict[int, list[float]] = {seed: [] for seed in seeds}
    for seed, case in walk(run):
        figure = value(seed, case)
        if figure is not None:
            groups[seed].append(figure)
    for seed in lost:
        groups[seed].append(cast(float, diverged))
    return [group for group in groups.values() if group]


def worst(role: Role, values: Sequence[float]) -> float:
    """Return the value that counts: what protects least on harmful tasks, what costs most on
    benign ones.
    """
    return min(values) if role == "harmful" else max(values)


def first_crossing(steps: Sequence[int], values: Floats, threshold: float) -> Floats:
    """Return the first step at which ``values`` [..., points] reach ``threshold``, linear between
    snapshots; nan where never.
    """
    grid = np.asarray(steps[: values.shape[-1]], dtype=float)
    met = (values >= threshold) & np.isfinite(values)
    index = met.argmax(-1)
    before = np.maximum(index - 1, 0)
    high, low = (np.take_along_axis(values, i[..., None], -1)[..., 0] for i in (index, before))
    with np.errstate(invalid="ignore"):
        part = (threshold - low) / np.where(high > low, high - low, 1.0)
    part = np.where((index > 0) & np.isfinite(low), part, (index > 0).astype(float))
    return np.where(met.any(-1), grid[before] + part * (grid[index] - grid[before]), np.nan)


def mean_curve(lines: Sequence[Line]) -> tuple[list[float], list[float | None]]:
    """Return the mean of several (steps, values) lines, on the steps of the first, ending where the
    shortest ends.

    Values between the steps of a line are interpolated linearly. A line that stopped early
    (divergence) cuts the mean there, so that no mean over survivors is shown. A step where any line
    is not finite gives None.
    """
    if not lines:
        raise ValueError("a curve over an empty set")
    end = min(steps[-1] for steps, _ in lines)
    grid = [s for s in lines[0][0] if s <= end] or [lines[0][0][0]]
    stack = np.stack([np.interp(grid, steps, np.asarray(v, dtype=float)) for steps, v in lines])
    with np.errstate(invalid="ignore"):
        means = stack.mean(axis=0)
    return [float(s) for s in grid], [float(v) if math.isfinite(v) else None for v in means]


def model_curve(lines: dict[str, list[Line]], x: str, y: str, log: str = "") -> dict[str, Any]:
    """Return a record curve from lines per model; models that end early are filled with None up to
    the common steps.
    """
    means = {model: mean_curve(model_lines) for model, model_lines in lines.items()}
    steps = max((grid for grid, _ in means.values()), key=len)
    out: dict[str, Any] = {"step": steps, "x": x, "y": y, "log": log}
    for model, (grid, values) in means.items():
        lookup = dict(zip(grid, values, strict=True))
        out[model] = [lookup.get(step) for step in steps]
    return out


def thin(values: Sequence[float], points: int = 60) -> list[tuple[int, float]]:
    """Return at most ``points`` (index, value) pairs, evenly spread, first and last included."""
    if len(values) <= points:
        return list(enumerate(values))
    chosen = sorted({round(i * (len(values) - 1) / (points - 1)) for i in range(points)})
    return [(i, values[i]) for i in chosen]
