"""Curves over immunization steps, from what an immunizer logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from eval.features.pairs import Pair
from eval.stats.aggregate import Line, mean_curve, model_name_curve, thin, walk
from lab.core.types import BASELINE, RunView

LABELS = {
    "kappa_benign": "κ of the benign Hessian",
    "kappa_harmful": "κ of the harmful Hessian",
    "rir": "RIR",
    "rir_bound_ratio": "RIR ÷ its bound",
}

TRAINING = {  # of concept immunizers, in the order of the report
    "outer_loss": "loss after the attack, to be raised",
    "inner_loop_drop": "share of the loss removed in the inner loop",
    "cosine": "cosine to the first-order gradient",
    "prior_loss": "loss on unrelated pictures",
    "benign_loss": "loss on benign concepts, attacked",
    "constraint_residual": "relative residual of the merge",
    "mask_density": "share of mask entries that are not 0",
    "implicit_residual": "relative residual of the solve",
    "implicit_stationarity": "inner gradient, end ÷ start",
    "gradient_norm": "norm of the outer gradient",
}


def training_curves(run: RunView) -> dict[str, dict[str, Any]]:
    """``immunize_NAME``: what a concept immunizer logged, at most 60 steps of it, mean over cases
    and seeds.
    """
    lines: dict[str, list[Line]] = {}
    for _, seed, case in walk(run):
        history = run.history(case, seed)
        for name in TRAINING:
            pairs = zip(history.get("step", []), history.get(name, []), strict=False)
            found = [(step, value) for step, value in pairs if math.isfinite(value)]
            if len(found) > 1:
                kept = [found[i] for i, _ in thin([step for step, _ in found])]
                lines.setdefault(f"immunize_{name}", []).append(
                    ([s for s, _ in kept], [v for _, v in kept])
                )
    return {
        name: model_name_curve(
            {run.immunizer: runs}, "immunization step", TRAINING[name.removeprefix("immunize_")]
        )
        for name, runs in lines.items()
    }


def _logged_rir(series: dict[str, list[float]], pair: Pair, has_start: bool) -> list[float]:
    harmful, benign = series["kappa_harmful"], series["kappa_benign"]
    base_h = harmful[0] if has_start else pair.kappa_harmful[BASELINE].value
    base_b = benign[0] if has_start else pair.kappa_benign[BASELINE].value
    return [(h / base_h) / (b / base_b) for h, b in zip(harmful, benign, strict=True)]


def history_curves(
    run: RunView,
    histories: dict[tuple[int, str], dict[str, list[float]]],
    worst: Callable[[int, str], Pair],
) -> dict[str, dict[str, Any]]:
    """κ of both Hessians, RIR and its share of the bound against immunization steps, as the
    immunizer logged them.

    ``rir`` and ``rir_bound_ratio`` are taken as logged; without them RIR is computed relative to
    the log's own entry at step 0, or to the baseline's κ where there is none. A pair without RIR,
    as its rank moved, has no RIR curve either.
    """
    lines: dict[str, list[Line]] = {}
    for _, seed, case in walk(run):
        history, pair = histories[seed, case.name], worst(seed, case.name)
        steps = history.get("step", [])
        series = {k: history[k] for k in LABELS if k in history and len(history[k]) == len(steps)}
        if not steps or not {"kappa_benign", "kappa_harmful"} <= series.keys():
            continue
        if "rir" not in series:
            series["rir"] = _logged_rir(series, pair, has_start=steps[0] == 0)
        if (
            "rir_bound_ratio" not in series
            and pair.bound is not None
            and pair.bound.value is not None
        ):
            series["rir_bound_ratio"] = [r / pair.bound.value for r in series["rir"]]
        if (
            pair.reason is not None
        ):  # the rank moved: κ at the end and at the start are over different directions
            series = {k: v for k, v in series.items() if not k.startswith("rir")}
        for name, values in series.items():
            lines.setdefault(name, []).append((steps, values))
    curves = {}
    for name, runs in lines.items():
        grid, means = mean_curve(runs)
        curves[name] = {
            "step": grid,
            run.immunizer: means,
            "x": "immunization step",
            "y": LABELS[name],
            "log": "y",
        }
    return curves
