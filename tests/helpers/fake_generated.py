"""Records of text-to-image runs, of sweeps over options and of the transfer table, made by hand."""

import math

import torch
from fake_records import metric, record, sealed

from lab.core.record import write_images
from lab.core.types import ImageGrid

STEPS = [0, 40, 80, 120, 200]


def curve(model_names, band, y, log=""):
    out = {"step": STEPS, "x": "attack step", "y": y, "log": log}
    for model_name, values in model_names.items():
        out |= {
            model_name: values,
            f"{model_name}:low": [v - band for v in values],
            f"{model_name}:high": [v + band for v in values],
        }
    return out


def image_grid(shift=0.0):
    """Three rows of smooth colours."""
    noise = torch.rand(3 * 5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    big = (
        torch.nn.functional.interpolate(noise, 64, mode="bilinear")
        .add(shift)
        .clamp(0, 1)
        .mul(255)
        .byte()
    )
    rows = ("reference", "baseline", "immunized")
    return ImageGrid(
        big.view(3, 5, 3, 64, 64),
        rows,
        tuple(f"step {s}" if s else "before" for s in STEPS),
        "Style mosaic, attacked by LoRA; equal latents per column.",
    )


def generated(immunizer="mima_deep", holds=True, folder=None, **kwargs):
    """A re-learning run of two targets on the miniature model; with images where ``folder`` is
    given.
    """
    within = {"interval": "across_seeds", "n": 3}
    asr = 0.35 if holds else 0.86
    checks = [
        {
            "side": "harmful",
            "check": "MSGR (CLIP)",
            "value": 0.21 if holds else 0.01,
            "low": 0.1,
            "high": 0.3,
            "n": 3,
            "required": "> 0",
            "passed": holds,
            "result": "passes" if holds else "fails",
            "significant": True,
            "note": "",
        },
        {
            "side": "benign",
            "check": "SGR of benign concepts (CLIP)",
            "value": 0.01,
            "low": -0.01,
            "high": 0.03,
            "n": 3,
            "required": "≤ 0.05",
            "passed": True,
            "result": "passes",
            "significant": True,
            "note": "",
        },
    ]
    note = (
        "passes. targets held back. benign concepts kept"
        if holds
        else "fails. targets not held back: MSGR 0.01 (required > 0)"
    )
    metrics = {
        "verdict": metric(float(holds), low=None, high=None, interval="point", note=note),
        "msgr_clip": metric(0.21, spread=0.4, **within)
        if holds
        else metric(0.01, spread=3.0, **within),
        "msgr_dino": metric(0.18 if holds else 0.02, spread=0.4, **within),
        "msgr_clip_5x": metric(0.05, spread=0.4, **within),
        "mrsgr_clip": metric(0.17 if holds else -0.03, spread=0.4, **within),
        "asr": metric(asr, "lower", 0.2, note="at step 40", **within),
        "asr_baseline": metric(0.9, "neutral", 0.05, **within),
        "sgr_benign_clip": metric(0.01, "lower", 2.0, **within),
        "steps_to_relearn_ratio": metric(2.6 if holds else 1.05, unit="×", **within),
        "steps_to_relearn_ratio_worst": metric(1.7 if holds else 0.9, unit="×", **within),
        "benign_steps_ratio": metric(1.08, "lower", unit="×", **within),
        "benign_steps_ratio_worst": metric(1.12, "lower", unit="×", **within),
        "utility_clip_drift": metric(0.012, "lower", **within),
        "utility_detection_drop": metric(0.015, "lower", **within),
    }
    top = 0.55 if holds else 0.9
    baseline = [0.04, 0.62, 0.85, 0.9, 0.93]
    learnt = [0.03] + [top * (1 - math.exp(-s / 70)) for s in STEPS[1:]]
    lost = [0.0, 0.26, 0.21, 0.14, 0.08] if holds else [0.0, 0.02, 0.01, 0.0, -0.01]
    base = {
        "name": f"relearn/{immunizer}",
        "scenario": "relearn",
        "backbone": "minisd",
        "attacks": ["lora"],
        "metrics": metrics,
        "curves": {
            "utility_clip_drift": curve(
                {"immunized": [0.011, 0.012, 0.012, 0.012, 0.013]}, 0.002, "CLIP drift"
            ),
            "train_loss": {
                "step": STEPS,
                "baseline": [0.2, 0.1, 0.08, 0.07, 0.06],
                "immunized": [0.3, 0.2, 0.15, 0.13, 0.12],
                "x": "attack step",
                "y": "loss",
                "log": "y",
            },
            "asr": curve(
                {"baseline": baseline, "immunized": learnt}, 0.05, "share of generations", "x"
            ),
            "msgr_clip": curve({"immunized": lost}, 0.05, "MSGR (CLIP)", "x"),
            "sgr_benign_clip": curve({"immunized": [0.0, 0.01, 0.012, 0.008, 0.005]}, 0.02, "SGR"),
            "asr_by_concept": {
                "step": STEPS,
                "mosaic": learnt,
                "neon": baseline,
                "x": "attack step",
                "y": "share",
                "log": "",
            },
        },
        "tables": {"verdict": checks},
        "notes": [],
        "config": {
            "scenario": {"name": "relearn", "targets": ["mosaic", "neon"]},
            "budget": {"horizon": 40, "multiple": 5},
            "immunize": {"name": immunizer},
            "eval": {
                "concept_verdict": {"min_worst_steps_ratio": 1.25, "max_benign_steps_ratio": 1.25}
            },
        },
    }
    if folder is not None:
        base["images"] = write_images(
            folder, {"generations_neon": image_grid(), "comparison_neon": image_grid(0.2)}
        )
    return sealed(record(immunizer, **(base | kwargs)))


def batch_sizes():
    """What ``sweeps=rir_batch_size`` writes: batch size × the rows behind each estimate."""
    out = []
    for size in (16, 64, 128, 256):
        for spectrum, gain in (("batch", 1.0), ("running", 1.3), ("full", 0.8)):
            config = {"immunize": {"name": "kappa", "batch_size": size, "spectrum": spectrum}}
            value = 12 * gain * (1 + math.exp(-((math.log(size / 64)) ** 2)))
            metrics = {
                "rir": metric(value, spread=0.15),
                "rir_bound_ratio": metric(value / 335, spread=0.15),
            }
            out.append(
                record(
                    "kappa", name="rir_batch_size/kappa", attacks=[], config=config, metrics=metrics
                )
            )
    return out


def transferred(cases=True):
    """What ``sweeps=optimizer_transfer`` writes: one row per attacker."""
    attacks = {
        "linear_probe": 0.12,
        "probe_sgd": 0.41,
        "probe_adam": -0.3,
        "probe_lbfgs": 0.56,
        "probe_newton": None,
    }
    rows, points, metrics = [], [], {}
    for attack, rho in attacks.items():
        low, high = (None, None) if rho is None else (rho - 0.3, rho + 0.3)
        rows.append(
            {
                "attack": attack,
                "rho_rir": rho,
                "low": low,
                "high": high,
                "rho_kappa": None if rho is None else rho + 0.2,
                "rho_angle": 0.1,
                "rho_angle_change": 0.0,
                "cases": 30,
                "censored": 2,
                "median_relative_slowdown": 1.4,
            }
        )
        if rho is not None:
            metrics[f"transfer_{attack}"] = metric(rho, low=low, high=high)
            metrics[f"transfer_harmful_{attack}"] = metric(rho + 0.2, low=rho, high=rho + 0.4)
            points += [
                {
                    "attack": attack,
                    "case": str(i),
                    "seed": 0,
                    "rir": math.exp(3 * math.sin(i)),
                    "relative_slowdown": math.exp(rho * 3 * math.sin(i) + math.cos(7 * i)),
                    "censored": i % 9 == 0,
                }
                for i in range(30)
            ]
    return record(
        "kappa_mnist",
        name="optimizer_transfer/kappa_mnist",
        scenario="mnist_one_vs_rest",
        seeds=[0],
        attacks=list(attacks),
        metrics=metrics,
        tables={"transfer": rows} | ({"transfer_cases": points} if cases else {}),
    )
