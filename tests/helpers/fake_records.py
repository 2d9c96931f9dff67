"""Records with realistic figures, made by hand, for tests of the report."""

import math
from typing import Any

from lab.core.record import SCHEMA_VERSION, content_hash, validate
from lab.core.types import Budget

Record = dict[str, Any]
STEPS = list(Budget(20, 5, 20).snapshots())


def metric(
    value: float | None, better: str = "higher", spread: float = 0.08, **kwargs: Any
) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value * (1 - spread), value * (1 + spread))
    base = {
        "value": value,
        "low": low,
        "high": high,
        "n": 3,
        "better": better,
        "interval": "across_seeds",
    }
    return base | {"note": None, "unit": "", "bound": None} | kwargs


def record(immunizer: str = "kappa", **kwargs: Any) -> Record:
    """A valid record; ``kwargs`` replace whole entries."""
    base: Record = {
        "schema": SCHEMA_VERSION,
        "name": f"house_price_table/{immunizer}",
        "status": "ok",
        "scenario": "house_price",
        "backbone": "linear",
        "immunizer": immunizer,
        "attacks": ["linear_probe", "linear_probe_adam"],
        "seeds": [0, 1, 2],
        "config": {
            "scenario": {"name": "house_price", "standardize": True},
            "immunize": {
                "_target_": "immunize.kappa.method.Kappa",
                "name": immunizer,
                "eta": 0.005,
                "lambda_p": 100,
            },
            "budget": {"horizon": 20, "multiple": 5, "points": 20},
            "paths": {"outputs": "outputs"},
            "eval": {"verdict": {"min_slowdown": 1.25, "max_benign_slowdown": 1.1}},
        },
        "metrics": {},
        "curves": {},
        "tables": {},
        "notes": [
            "Dropped 6 of 79 columns that are constant in one task (Utilities …); rank 61 of "
            "61 remains."
        ],
        "stages": [
            {
                "kind": "immunize",
                "model": immunizer,
                "case": "house",
                "seed": s,
                "attack": None,
                "task": None,
                "key": f"{s}" * 12,
                "status": "ok",
            }
            for s in range(3)
        ],
        "error": None,
        "skipped": {},
        "provenance": {
            "started": "2026-11-20T10:00:00+00:00",
            "wall_time_s": 21.4,
            "peak_memory_mb": 812.0,
            "host": "box",
            "device": "cpu × 2",
            "threads": 2,
            "python": "3.11.9",
            "versions": {"torch": "2.13.0", "numpy": "2.3.1"},
            "git_sha": "d370ca7d0c0ffee0d370ca7d0c0ffee0d370ca7d",
            "git_dirty": True,
            "data_hash": {"0": "ab" * 32, "1": "cd" * 32, "2": "ef" * 32},
            "weight_hash": {"0": "12" * 32},
            "cache_hits": 12,
            "cache_misses": 30,
        },
    }
    return sealed(base | kwargs)


def sealed(base: Record) -> Record:
    base["content_hash"] = content_hash(base)
    validate(base, "fake")
    return base


def attacked(
    immunizer: str, harmful: float, benign: float, rir: float, share: float | None = None
) -> Record:
    """A run whose harmful and benign slowdowns are given."""
    holds = harmful >= 1.25 and benign <= 1.1
    metrics = {
        "verdict": metric(
            float(holds),
            low=None,
            high=None,
            interval="point",
            note="passes. harmful task held back. benign task kept"
            if holds
            else f"fails. benign task damaged: steps to the baseline's norm ratio {benign:.3g} "
            "(required ≤ 1.1)",
        ),
        "verdict_share": metric(float(holds), spread=0.0),
        "slowdown_harmful_worst": metric(
            harmful, unit="×", note="strongest attack: linear_probe_adam"
        ),
        "slowdown_benign_worst": metric(benign, "lower", 0.02, unit="×"),
        "slowdown_relative_worst": metric(harmful / benign, unit="×"),
        "slowdown_loss_harmful_worst": metric(1 + (harmful - 1) / 3, unit="×"),
        "rir": metric(rir),
        "rir_bound": metric(5210.0, "neutral"),
        "rir_bound_ratio": metric(rir / 5210)
        if share is None
        else metric(None, note="infinite: K_P is singular"),
        "kappa_harmful_ratio": metric(rir * 0.05),
        "kappa_benign_ratio": metric(0.05, "lower"),
        "norm_ratio_harmful_linear_probe": metric(0.71),
    }
    curves: dict[str, Any] = {}
    for attack, pace in (("linear_probe", 0.05), ("linear_probe_adam", 0.09)):
        for role, slow in (("harmful", harmful), ("benign", benign)):
            for quantity, label, floor in (
                ("norm_ratio", "‖w − w*‖² ÷ ‖w₀ − w*‖²", 1e-4),
                ("test_loss", "test loss", 0.11),
            ):
                curves[f"{quantity}_{role}_{attack}"] = {
                    "step": STEPS,
                    "x": f"steps of {attack}",
                    "y": f"{label}, {role} task",
                    "log": "y",
                    "baseline": [floor + math.exp(-pace * s) for s in STEPS],
                    "immunized": [floor + math.exp(-pace * s / slow) for s in STEPS],
                }
    epochs = list(range(0, 101, 5))
    for name, label, start, last in (
        ("rir", "RIR", 1.0, rir),
        ("rir_bound_ratio", "RIR ÷ its bound", 1 / 5210, rir / 5210),
        ("kappa_harmful", "κ of the harmful Hessian", 9e4, 4e5),
        ("kappa_benign", "κ of the benign Hessian", 3e3, 90.0),
    ):
        curves[name] = {
            "step": epochs,
            "immunized": [start * (last / start) ** (1 - math.exp(-e / 25)) for e in epochs],
            "x": "immunization step",
            "y": label,
            "log": "y",
        }
    tables = {
        "spectrum": [
            {
                "model": model_name,
                "role": role,
                "task": role,
                "case": "house",
                "seed": 0,
                "index": i,
                "value": math.exp(-i * rate),
            }
            for model_name, rates in (("baseline", (0.09, 0.09)), ("immunized", (0.12, 0.02)))
            for role, rate in zip(("harmful", "benign"), rates, strict=True)
            for i in range(1, 62)
        ],
        "principal_angles": [
            {
                "model": model_name,
                "case": "house",
                "seed": 0,
                "task": "SalePrice",
                "index": i,
                "degrees": 4.0 * i * k,
            }
            for model_name, k in (("baseline", 1.0), ("immunized", 1.2))
            for i in range(1, 18)
        ],
        "pencil": [
            {
                "model": "baseline",
                "case": "house",
                "seed": 0,
                "task": "SalePrice",
                "index": i,
                "value": 40 * math.exp(-i / 8),
            }
            for i in range(1, 62)
        ],
        "verdict": [
            {
                "side": "harmful",
                "check": "steps to the baseline's norm ratio, immunized ÷ baseline",
                "value": harmful,
                "low": harmful * 0.92,
                "high": harmful * 1.08,
                "n": 3,
                "required": "≥ 1.25",
                "passed": harmful >= 1.25,
                "result": "passes" if harmful >= 1.25 else "fails",
                "significant": True,
                "note": "strongest attack: linear_probe_adam",
            },
            {
                "side": "benign",
                "check": "steps to the baseline's norm ratio, immunized ÷ baseline",
                "value": benign,
                "low": benign * 0.98,
                "high": benign * 1.02,
                "n": 3,
                "required": "≤ 1.1",
                "passed": benign <= 1.1,
                "result": "passes" if benign <= 1.1 else "fails",
                "significant": True,
                "note": "",
            },
        ],
        "pairs": [
            {"case": "house", "seed": s, "benign": "LotArea", "task": "SalePrice", "rir": rir}
            for s in range(3)
        ],
    }
    return record(immunizer, metrics=metrics, curves=curves, tables=tables)


def digits() -> Record:
    """90 ordered pairs of MNIST digits, one seed, no attack."""
    pairs = [
        {
            "case": f"{i}-{j}",
            "seed": 0,
            "benign": f"digit{i}",
            "task": f"digit{j}",
            "rir": math.exp(3.2 * math.sin(1.7 * i + 0.6 * j) + 1.9),
        }
        for i in range(10)
        for j in range(10)
        if i != j
    ]
    one = {"n": 1, "interval": "within_seed"}
    return record(
        "kappa",
        name="mnist_pairs/kappa",
        scenario="mnist_pairs",
        attacks=[],
        seeds=[0],
        metrics={
            "rir": metric(69.7, spread=0.2, **one),
            "rir_above_one": metric(0.78, spread=0.1, **one),
            "rir_bound_ratio": metric(
                None, n=1, interval="point", note="infinite: K_P has rank 441 of 560"
            ),
        },
        tables={"pairs": pairs},
        skipped={"verdict": "needs an attack, and attacks=none"},
    )


def failed(message: str = "immunize.lambda_p=-1: must be ≥ 0.") -> Record:
    error = {
        "type": "UserError",
        "message": message,
        "key": "immunize.lambda_p",
        "last_good_step": None,
    }
    stages = [
        {
            "kind": "immunize",
            "model": "kappa_imma",
            "case": "house",
            "seed": 1,
            "attack": None,
            "task": None,
            "key": "f" * 12,
            "status": "failed",
        }
    ]
    return record("kappa_imma", status="failed", error=error, stages=stages, notes=[])


def baseline() -> Record:
    return record(
        "none",
        metrics={
            "rir_bound": metric(5210.0, "neutral"),
            "kappa_benign_baseline": metric(3e3, "neutral"),
        },
    )


def sweep() -> list[Record]:
    """What a table of several immunizers looks like."""
    return [
        attacked("kappa", 3.4, 1.03, 356.0),
        attacked("kappa_ill_only", 4.9, 3.7, 1.24),
        attacked("kappa_closed_form", 4.1, 0.62, 5210.0),
        attacked("kappa_opt", 1.9, 1.01, 92.6),
        attacked("kappa_well_only", 1.1, 0.7, 61.0),
        failed(),
        baseline(),
        digits(),
    ]
