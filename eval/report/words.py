"""Names, numbers, intervals and labels as text, for reports, model cards and trackers."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from html import escape
from typing import Any

import pandas as pd

from lab.core.record import VOLATILE_CONFIG, Record, is_immunized

Metric = dict[str, Any]

ARROWS = {"higher": "↑", "lower": "↓", "neutral": "·"}
UNMEASURED = "–"
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# ---- names of metrics and curves

NAMES = {
    "verdict": "verdict",
    "slowdown_harmful_worst": "harmful slowdown, strongest attack",
    "slowdown_benign_worst": "benign slowdown, strongest attack",
    "slowdown_relative_worst": "harmful ÷ benign slowdown",
    "slowdown_loss_harmful_worst": "harmful slowdown by loss",
    "slowdown_loss_benign_worst": "benign slowdown by loss",
    "sgrc_harmful_worst": "harmful accuracy lost (SGRC)",
    "sgrc_benign_worst": "benign accuracy lost (SGRC)",
    "rir": "RIR",
    "rir_bound_ratio": "RIR ÷ its upper bound",
    "rir_above_one": "share of cases with RIR > 1",
    "kappa_harmful_ratio": "κ harmful, after ÷ before",
    "kappa_benign_ratio": "κ benign, after ÷ before",
    "kappa_harmful": "κ of the harmful Hessian",
    "kappa_benign": "κ of the benign Hessian",
    "rir_ridge": "RIR (ridge κ)",
    "rir_release": "RIR (released κ)",
    "asr": "attack success rate",
    "asr_baseline": "attack success rate, baseline",
    "asr_by_trials": "attack success rate by number of settings",
    "asr_benign": "benign concepts learned",
    "asr_prompt_adherent": "attack success rate, prompt-adherent images",
    "asr_usable": "attack success rate, usable attacks",
    "asr_usable_baseline": "attack success rate, usable attacks, baseline",
    "steps_to_relearn_usable_ratio": "relearning slowdown, usable attacks, mean over targets",
    "steps_to_relearn_usable_ratio_worst": (
        "relearning slowdown, usable attacks, least-protected target"
    ),
    "benign_steps_usable_ratio_worst": "benign slowdown, usable attacks, slowest concept",
    "steps_to_relearn_ratio": "relearning slowdown, mean over targets",
    "steps_to_relearn_ratio_worst": "relearning slowdown, least-protected target",
    "steps_to_relearn_prompt_adherent_ratio": "relearning slowdown, prompt-adherent images",
    "benign_steps_ratio": "benign slowdown, mean over concepts",
    "benign_steps_ratio_worst": "benign slowdown, slowest concept",
    "benign_steps_prompt_adherent_ratio": "benign slowdown, prompt-adherent images",
    "relearning_time_ratio": "relearning slowdown, restricted mean",
    "relearning_time_ratio_worst": "relearning slowdown, restricted mean, least-protected target",
    "benign_time_ratio": "benign slowdown, restricted mean",
    "benign_time_ratio_worst": "benign slowdown, restricted mean, slowest concept",
    "audit_steps_worst": "steps until the first target is shown",
    "utility_clip_drift": "drift of unrelated prompts (CLIP)",
    "utility_detection_drop": "detections lost on unrelated prompts",
    "norm_ratio_harmful": "distance to the optimum, harmful task",
    "norm_ratio_benign": "distance to the optimum, benign task",
    "test_accuracy_harmful": "test accuracy, harmful task",
    "test_accuracy_benign": "test accuracy, benign task",
    "test_loss_harmful": "test loss, harmful task",
    "test_loss_benign": "test loss, benign task",
    "train_loss_harmful": "training loss, harmful task",
    "train_loss_benign": "training loss, benign task",
    "msgr": "MSGR",
    "mrsgr": "MRSGR",
    "sgr_benign": "SGR of benign concepts",
    "sgr": "SGR",
    "rsgr": "RSGR",
    "similarity": "similarity",
    "utility": "utility",
    "immunize": "immunization",
    "audit": "images that show",
}
_SCORERS = {"clip": "CLIP", "dino": "DINO", "lpips": "LPIPS"}
_SHARES = re.compile(r"(asr|utility_(detection|object|style)|verdict_share|rir_above_one)(_.*)?")


def heading(name: str) -> str:
    """Return a metric's or curve's name as words: ``msgr_clip`` → MSGR (CLIP)."""
    known = (n for n in NAMES if name == n or name.startswith(f"{n}_"))
    stem = max(known, key=len, default=name)
    rest = " ".join(_SCORERS.get(word, word) for word in name[len(stem) + 1 :].split("_"))
    return NAMES.get(stem, name) + (f" ({rest})" if rest else "")


def sentence(text: str | None) -> str:
    """Return ``text`` with a full stop."""
    text = (text or "").strip()
    return text if not text or text.endswith(".") else text + "."


def shortened(text: str, length: int) -> str:
    """Return ``text`` cut to ``length`` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def counted(count: int, noun: str) -> str:
    """Return ``nine attacks`` or ``12 attacks``."""
    number = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    return f"{number} {noun}{'' if count == 1 else 's'}"


def capitalized(text: str) -> str:
    """Return ``text`` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


# ---- numbers


def figure(value: float | None) -> str:
    """Return two significant digits, whole numbers from 100 on: 0.012, 4.6, 12,345, 1.2·10⁹."""
    if value is None or not math.isfinite(value):
        return UNMEASURED
    size = abs(value)
    if size and (size < 1e-4 or size >= 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        power = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
        text = power if mantissa == "1.0" else f"{float(mantissa):g}·{power}"
    elif size >= 10 or value == round(value):
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.2g}".removesuffix(".")
    return text.replace("-", "−")


def percent(value: float) -> str:
    """Return a share as whole per cent, one digit below 1 %: ``35 %``."""
    size = abs(100 * value)
    return f"{100 * value:{'.1g' if 0 < size < 0.95 else '.0f'}} %".replace("-", "−")


def bound(metric: Metric) -> str:
    """Return ``≥`` for a lower limit (the true figure may be higher), ``≤`` for an upper one."""
    return {"lower": "≥", "upper": "≤"}.get(metric.get("bound") or "", "")


def _number(value: float, name: str) -> str:
    return percent(value) if _SHARES.fullmatch(name) else figure(value)


def interval(metric: Metric, name: str = "") -> str:
    """Return ``[low, high]``, or an empty string for a point."""
    if metric["low"] is None or metric["high"] is None:
        return ""
    low, high = (_number(metric[end], name).removesuffix(" %") for end in ("low", "high"))
    return f"[{low}, {high}]"


def measured(metric: Metric | None, name: str = "") -> str:
    """Return limit, value, unit and interval; per cent where ``name`` is that of a share."""
    if metric is None or metric["value"] is None:
        return UNMEASURED
    unit = "" if _SHARES.fullmatch(name) else metric.get("unit") or ""
    unit = unit if unit in ("", "×", "°") else f" {unit}"
    return (
        f"{bound(metric)} {_number(metric['value'], name)}{unit} {interval(metric, name)}".strip()
    )


def support(metric: Metric) -> str:
    """Return what the interval stands on, short."""
    n = metric["n"]
    seeds = f"{n} seed{'s' if n != 1 else ''}"
    more = {"within_seed": ", within seed", "point": ", no interval"}
    return seeds + more.get(metric["interval"], "")


def certainty(metric: Metric, reference: float) -> str:
    """Return a sentence on whether the interval over seeds excludes ``reference``."""
    n, low, high = metric["n"], metric["low"], metric["high"]
    if metric["interval"] != "across_seeds":
        return f"Measured on {counted(n, 'seed')}: no claim about other seeds."
    if low is None or high is None:
        return f"No interval could be given over {counted(n, 'seed')}."
    word, verb = "Not significant", "includes"
    if low > reference or high < reference:
        word, verb = "Significant", "excludes"
    return f"{word}: the 95 % interval over {counted(n, 'seed')} {verb} {figure(reference)}."


def aligned(table: pd.DataFrame) -> str:
    """Return a table of texts for a terminal."""
    widths = [max([len(head), *map(len, table[head])]) for head in table]
    lines = [
        "  ".join(map(str.ljust, row, widths)).rstrip()
        for row in [table.columns, ["─" * width for width in widths], *table.to_numpy()]
    ]
    return "\n".join(lines)


def markdown(table: pd.DataFrame) -> str:
    """Return a table of texts as Markdown."""
    rows = [
        [" ".join(escape(cell, quote=False).split()).replace("|", "\\|") or " " for cell in row]
        for row in [table.columns, *table.to_numpy()]
    ]
    rows.insert(1, ["---"] * len(table.columns))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---- labels of records

_SILENT = {*VOLATILE_CONFIG, "experiment_name"}  # top-level keys that set no record apart
_SHOWN = 5  # settings in a label


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys; lists stay values."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def settings(record: Record) -> dict[str, Any]:
    """Return the config, flat, without what cannot change a result."""
    return {k: v for k, v in flatten(record["config"]).items() if k.split(".")[0] not in _SILENT}


def labels(records: Sequence[Record]) -> list[str]:
    """Return one label per record, all different: the immunizer and the settings that differ.

    Records of one immunizer in one study form a group. A setting that most of them share is the
    study's common one and is named only where a record deviates from it, so that an ablation which
    changes one thing at a time is labelled by that thing; a setting without a majority (a grid) is
    named everywhere. An option that the version of one of them did not have yet is ignored.
    """
    studies = [str(r["name"]).rpartition("/")[0] or str(r["name"]) for r in records]
    immunizers = [
        r["immunizer"]
        if is_immunized(r)
        else ("checkpoint" if "audit_verdict" in r["tables"] else "baseline")
        for r in records
    ]
    texts = [
        {k: typed(v) for k, v in settings(r).items() if not k.endswith("_target_")} for r in records
    ]
    frame, out = pd.DataFrame(texts, dtype=object).fillna(""), pd.Series(immunizers)
    for _, group in frame.groupby([studies, immunizers], sort=False):
        known = [texts[i].keys() for i in group.index]
        varied = group.loc[:, group.nunique() > 1]
        varied = varied[[key for key in varied if all(_has_option(keys, key) for keys in known)]]
        varied = varied[[key for key in varied if not _follows_scenario(varied, key)]]
        if len(varied.columns) > 1:  # tables say how many seeds there are
            varied = varied.drop(columns="seeds", errors="ignore")
        names = short_names(set(varied))
        common = {}
        for key, values in varied.items():
            counts = values.value_counts()
            common[key] = counts.index[0] if 2 * counts.iloc[0] > len(group) else None
        for i, row in varied.iterrows():
            parts = [f"{names[k]}={v}" for k, v in row.items() if v not in ("", common[k])]
            more = [f"{len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
            out[i] = " · ".join([immunizers[i], *parts[:_SHOWN], *more])
        plain = [i for i in group.index if out[i] == immunizers[i]]
        if len(group) > 2 and len(plain) == 1:  # the one that deviates in nothing
            out[plain[0]] += " · common settings"
    out = out.where(~out.duplicated(keep=False), out + [f" ({study})" for study in studies])
    hashes = [f" · {r['content_hash'][:7]}" for r in records]  # for the same settings twice
    return list(out.where(~out.duplicated(keep=False), out + hashes))


def _follows_scenario(varied: pd.DataFrame, key: str) -> bool:
    """Return True for an attack's option of sampling that is the scenario's in every record."""
    scenario = f"scenario.sampling.{key.partition('.sampling.')[2]}"
    return (
        key.startswith("attacks.") and scenario in varied and varied[key].equals(varied[scenario])
    )


def _has_option(keys: Collection[str], key: str) -> bool:
    """Return True if a flat config has the option ``key``, or one that it is a part of (null)."""
    parts = key.split(".")
    whole = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return not whole.isdisjoint(keys) or any(k.startswith(f"{key}.") for k in keys)


def typed(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(typed, value))}]" if isinstance(value, list) else str(value)


def short_names(keys: set[str]) -> dict[str, str]:
    """Return every dotted key by its shortest ending that no other key has."""
    out = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        counts = {e: sum(f".{k}".endswith(f".{e}") for k in keys) for e in endings}
        out[key] = next((e for e in endings if counts[e] == 1), key)
    return out
