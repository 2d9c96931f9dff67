"""Figures, intervals and names of metrics as words."""

from __future__ import annotations

import math
from typing import Any

Record = dict[str, Any]
Metric = dict[str, Any]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
ARROWS = {"higher": "↑", "lower": "↓", "neutral": "·"}
UNMEASURED = "–"
ENDED_EARLY = ("failed", "preempted")  # states of records that may lack hashes, attacks or figures
# heading of a table's column or of a curve; the diffusion metrics by family below
NAMES = {
    "verdict": "verdict",
    "slowdown_harmful_worst": "harmful slowdown, worst attacker",
    "slowdown_benign_worst": "benign slowdown, worst attacker",
    "slowdown_relative_worst": "harmful ÷ benign slowdown",
    "slowdown_loss_harmful_worst": "harmful slowdown by loss",
    "slowdown_loss_benign_worst": "benign slowdown by loss",
    "sgrc_harmful_worst": "harmful accuracy lost (SGRC)",
    "sgrc_benign_worst": "benign accuracy lost (SGRC)",
    "rir": "RIR",
    "rir_bound_ratio": "RIR ÷ bound",
    "rir_above_one": "share of cases with RIR > 1",
    "kappa_harmful_ratio": "κ harmful, after ÷ before",
    "kappa_benign_ratio": "κ benign, after ÷ before",
    "rir_ridge": "RIR (ridge κ)",
    "rir_release": "RIR (released κ)",
    "asr": "attack success",
    "asr_baseline": "attack success on the baseline",
    "asr_benign": "benign concepts learnt",
    "steps_to_relearn_ratio": "steps to relearn ÷ baseline",
    "steps_to_relearn_ratio_worst": "steps to relearn ÷ baseline, worst target",
    "asr_prompt_adherent": "attack success, prompt-adherent pictures",
    "steps_to_relearn_prompt_adherent_ratio": "steps to relearn prompt-adherent pictures "
    "÷ baseline",
    "benign_steps_prompt_adherent_ratio": "steps on benign concepts, prompt-adherent pictures "
    "÷ baseline",
    "benign_steps_ratio": "steps on benign concepts ÷ baseline",
    "benign_steps_ratio_worst": "steps on benign concepts ÷ baseline, worst",
    "utility_clip_drift": "drift of unrelated prompts (CLIP)",
    "utility_detection_drop": "unrelated detection lost",
}
_FAMILIES = {
    "msgr_": "MSGR",
    "mrsgr_": "MRSGR",
    "sgr_benign_": "SGR of benign concepts",
    "sgr_": "SGR",
    "rsgr_": "RSGR",
    "similarity_": "similarity",
    "utility_": "utility",
    "immunize_": "immunization",
}
_SCORERS = {
    "clip": "CLIP",
    "dino": "DINO",
    "lpips": "LPIPS",
    "features": "features",
    "feature_lpips": "feature LPIPS",
}


def heading(name: str) -> str:
    """A metric's or curve's name as words: ``msgr_clip`` → MSGR (CLIP), ``asr_lora`` → attack
    success, lora.
    """
    if name in NAMES:
        return NAMES[name]
    known = max((n for n in (*NAMES, "") if n and name.startswith(f"{n}_")), key=len, default=None)
    if known is not None:
        return f"{NAMES[known]}, {name[len(known) + 1 :].replace('_', ' ')}"
    family = next((f for f in _FAMILIES if name.startswith(f)), None)
    if family is None:
        return name
    rest = name[len(family) :]
    scorer = max(
        (j for j in _SCORERS if rest == j or rest.startswith(f"{j}_")), key=len, default=None
    )
    if scorer is None:
        return f"{_FAMILIES[family]} ({rest.replace('_', ' ')})"
    more = rest[len(scorer) + 1 :].replace("_", " ")
    return f"{_FAMILIES[family]} ({_SCORERS[scorer]}){', ' + more if more else ''}"


def figure(value: float | None) -> str:
    """Three significant digits: 0.0123, 4.56, 789, 12,300, 1.2·10⁹."""
    if value is None or not math.isfinite(value):
        return UNMEASURED
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        exponent = math.floor(math.log10(size))
        mantissa = round(value / 10**exponent, 2)
        if abs(mantissa) >= 10:
            mantissa, exponent = mantissa / 10, exponent + 1
        power = f"10{str(exponent).translate(_SUPERSCRIPT)}"
        return power if mantissa == 1 else f"{mantissa:g}·{power}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def interval(metric: Metric) -> str:
    """``[low, high]``, or an empty string for a point."""
    if metric["low"] is None or metric["high"] is None:
        return ""
    return f"[{figure(metric['low'])}, {figure(metric['high'])}]"


def bound(metric: Metric) -> str:
    """``≥`` before a lower limit (it may be any higher figure), ``≤`` before an upper one, else
    nothing.
    """
    return {"lower": "≥", "upper": "≤"}.get(metric.get("bound") or "", "")


def measured(metric: Metric | None) -> str:
    """Value with unit and interval."""
    if metric is None or metric["value"] is None:
        return UNMEASURED
    lead = f"{bound(metric)} ".lstrip()
    unit = metric["unit"] if metric["unit"] in ("", "×", "°") else f" {metric['unit']}"
    return f"{lead}{figure(metric['value'])}{unit} {interval(metric)}".strip()


def support(metric: Metric) -> str:
    """What the interval stands on, short."""
    n = metric["n"]
    seeds = f"{n} seed{'s' if n != 1 else ''}"
    return {
        "across_seeds": seeds,
        "within_seed": f"{seeds}, within seed",
        "point": f"{seeds}, no interval",
    }[metric["interval"]]


def certainty(metric: Metric, reference: float) -> tuple[bool, str]:
    """Whether the interval clears ``reference``, and the sentence that says so."""
    if metric["interval"] == "across_seeds" and metric["low"] is not None:
        low, high, n = metric["low"], metric["high"], metric["n"]
        if low > reference or high < reference:
            side = "above" if low > reference else "below"
            return True, f"The 95 % interval over {n} seeds lies {side} {figure(reference)}."
        return (
            False,
            f"The 95 % interval over {n} seeds includes {figure(reference)}: the difference "
            "may be chance.",
        )
    n = metric["n"]
    if metric["interval"] == "across_seeds":
        return (
            False,
            f"No interval could be given over {n} seeds, so how sure this is cannot be said.",
        )
    seeds = f"{n} seed{'s' if n != 1 else ''}"
    return (
        False,
        f"Measured on {seeds}: this supports no claim about other seeds (three are the least).",
    )


def percent(metric: Metric) -> str:
    """A share as per cent, in words: ``35 %``."""
    return f"{figure(metric['value'] * (1 if metric['unit'] == '%' else 100))} %"


def sentence(text: str | None) -> str:
    """``text`` with a full stop."""
    text = (text or "").strip()
    return text if not text or text.endswith(".") else text + "."
