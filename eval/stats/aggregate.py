"""Walk over the seeds and cases of a run; collect samples and mean curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from eval.stats.intervals import Better, Floats
from lab.core.data import Case, Role, Task
from lab.core.training import progress
from lab.core.types import BASELINE, AnyCase, RunView, Trajectory

ROLES: tuple[Role, ...] = ("harmful", "benign")
PROTECTED: dict[Role, Better] = {"harmful": "higher", "benign": "lower"}  # slow, far, deviating
T = TypeVar("T")
Curve = tuple[Sequence[float], Sequence[float]]  # steps, values


class _PartOfRun:
    """Part of a run as a `RunView`: what is not among ``parts`` is that of the whole run."""

    def __init__(self, run: RunView, **parts: Any) -> None:
        self._run = run
        self.__dict__.update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def one_case(run: RunView, seed: int, case: AnyCase) -> RunView:
    """Return the part of one seed and case."""
    return cast(RunView, _PartOfRun(run, seeds=(seed,), diverged={}, cases=lambda seed: (case,)))


def read_once(run: RunView) -> RunView:
    """Return the run with every trajectory read once, without the attackers' weights."""
    known: dict[tuple[str, str, str, str, int], Trajectory] = {}

    def trajectory(model: str, attack: str, case: Case, task: Task, seed: int) -> Trajectory:
        key = (model, attack, case.name, task.name, seed)
        if key not in known:
            full = run.trajectory(model, attack, case, task, seed)
            known[key] = replace(full, weights={}, samples={})
        return known[key]

    return cast(RunView, _PartOfRun(run, trajectory=trajectory))


def walk(run: RunView, label: str = "") -> Iterator[tuple[int, Any]]:
    """Yield (seed, case) over everything in the run; with a ``label`` under a progress bar."""
    for seed in run.seeds:
        cases = run.cases(seed)
        for case in progress(cases, f"{label}, seed {seed}") if label else cases:
            yield seed, case


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
    run: RunView, value: Callable[[int, Any], T | None], *, diverged: T | None = None
) -> list[list[T]]:
    """Return ``value(seed, case)`` as ``samples[seed][case]``, seeds ascending; None is left out,
    and a seed with nothing left too.

    ``diverged``: what a case counts whose immunization diverged, a failure (0) where successes are
    counted.
    """
    figures = [(seed, value(seed, case)) for seed, case in walk(run)]
    figures += [(seed, diverged) for _, seed in run.diverged]
    seeds = sorted({seed for seed, _ in figures})
    groups = [[v for seed, v in figures if seed == s and v is not None] for s in seeds]
    return [group for group in groups if group]


def grouped(
    run: RunView, values: Mapping[tuple[int, str], T | None], *, diverged: T | None = None
) -> list[list[T]]:
    """Return `samples` of ``values``: (seed, name of a case) → value."""
    return samples(run, lambda seed, case: values[seed, case.name], diverged=diverged)


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


def mean_over_steps(values: Floats, steps: Sequence[int]) -> Floats:
    """Return the mean over the steps of values [..., points], linear between them."""
    return np.asarray(trapezoid(values, steps, axis=-1) / (steps[-1] - steps[0]))


def model_curve(lines: dict[str, list[Curve]], x: str, y: str, log: str = "") -> dict[str, Any]:
    """Return a record curve: for every model the mean of its (steps, values) lines, on the steps of
    its first line.

    Values between the steps of a line are interpolated linearly. A line that stopped early
    (divergence) cuts the mean there, so that no mean over survivors is shown. A step where any line
    is not finite, and one beyond the end of a model, gives None.
    """
    means = {}
    for model, own in lines.items():
        end = min(steps[-1] for steps, _ in own)
        grid = [s for s in own[0][0] if s <= end] or [own[0][0][0]]
        stack = [np.interp(grid, steps, np.asarray(v, dtype=float)) for steps, v in own]
        with np.errstate(invalid="ignore"):
            means[model] = pd.Series(np.mean(stack, axis=0), np.asarray(grid, dtype=float))
    table = pd.DataFrame(means, index=max(means.values(), key=len).index)
    known = table.astype(object).where(np.isfinite(table), None)
    return {"step": table.index.tolist(), "x": x, "y": y, "log": log, **known.to_dict("list")}


def thin(values: Sequence[float], points: int = 60) -> list[tuple[int, float]]:
    """Return at most ``points`` (index, value) pairs, evenly spread, first and last included."""
    chosen = np.linspace(0, len(values) - 1, min(points, len(values))).round().astype(int)
    return [(int(i), values[i]) for i in chosen]
