"""The verdict on a record in words: passes, fails or inconclusive, by how much, and whether that
is significant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from eval.report.words import (
    Metric,
    Record,
    capitalized,
    certainty,
    flatten,
    heading,
    measured,
    percent,
    sentence,
)
from eval.stats.verdict_rule import WORDS
from lab.core.record import is_immunized

Tone = Literal["good", "bad", "undecided", "neutral", "error"]
TONES: dict[str, Tone] = {"passes": "good", "fails": "bad", "inconclusive": "undecided"}
MARKS = {"good": "✓", "bad": "✗", "undecided": "?", "neutral": "·", "error": "!"}
ENDED_EARLY = ("failed", "preempted")  # states of records that may lack hashes, attacks or figures
# kind of run by a metric that it has → the figures that count: column → metrics, of which the first
# with a value is shown. The second column is the slowdown that orders methods.
KEY_FIGURES: dict[str, dict[str, tuple[str, ...]]] = {
    "audit_steps_worst": {"steps until a target is shown": ("audit_steps_worst",)},
    "slowdown_harmful_worst": {
        "RIR": ("rir",),
        "harmful slowdown": ("slowdown_harmful_worst",),
        "benign cost": ("slowdown_benign_worst",),
    },
    "rir": {
        "cases with RIR > 1": ("rir_above_one",),
        "RIR": ("rir",),
        "κ benign, after ÷ before": ("kappa_benign_ratio",),
    },
    "": {
        "attack success": ("asr_usable", "asr"),
        "relearning slowdown": (
            "steps_to_relearn_usable_ratio_worst",
            "steps_to_relearn_ratio_worst",
            "steps_to_relearn_ratio",
        ),
        "benign cost": (
            "benign_steps_usable_ratio_worst",
            "benign_steps_ratio_worst",
            "benign_steps_ratio",
        ),
    },
}
_PROTECTED = ("eval.concept_verdict.min_worst_steps_ratio", "≥")
_COST = ("eval.concept_verdict.max_benign_steps_ratio", "≤")
# metric → (config key of what the verdict requires, rule)
LIMITS = {
    "slowdown_harmful_worst": ("eval.verdict.min_slowdown", "≥"),
    "slowdown_benign_worst": ("eval.verdict.max_benign_slowdown", "≤"),
    "steps_to_relearn_usable_ratio_worst": _PROTECTED,
    "steps_to_relearn_ratio_worst": _PROTECTED,
    "benign_steps_usable_ratio_worst": _COST,
    "benign_steps_ratio_worst": _COST,
}
# immunizer with a paper's settings → (scenario, RIR that the paper reports, where)
PUBLISHED = {
    "kappa_paper_house_price": ("house_price", 356.20, "arXiv 2505.23760 §5.1"),
    "kappa_paper_mnist": ("mnist_pairs", 70.04, "arXiv 2505.23760 §5.1, mean of 90 pairs"),
}


def value_of(metrics: dict[str, Metric], name: str) -> float | None:
    """Return the value of a metric; None where it was not measured."""
    return (metrics.get(name) or {}).get("value")


def key_figures(record: Record) -> dict[str, str]:
    """Return column → metric of the figures that count for the kind of run."""
    metrics = record["metrics"]
    kind = next(kind for kind in KEY_FIGURES if kind in metrics or not kind)
    return {
        column: next((name for name in names if value_of(metrics, name) is not None), names[0])
        for column, names in KEY_FIGURES[kind].items()
    }


def slowdown_of(record: Record) -> tuple[str, str]:
    """Return column and metric by which methods are compared; 1 is the baseline."""
    return [*key_figures(record).items()][:2][-1]


def count_checks(record: Record) -> tuple[int, int]:
    """Return how many checks of the verdict pass, and how many there are."""
    passed = [bool(check["passed"]) for check in record["tables"].get("verdict", [])]
    return sum(passed), len(passed)


def limit_of(records: Sequence[Record], name: str) -> tuple[str, float] | None:
    """Return (rule, value) that the verdict requires of a metric."""
    key, rule = LIMITS.get(name, ("", ""))
    values = [flatten(record["config"]).get(key) for record in records]
    return next(((rule, value) for value in values if value is not None), None)


def verdict_word(record: Record) -> str:
    """Return passes, fails or inconclusive for an immunized record with figures."""
    return WORDS[value_of(record["metrics"], "verdict")]


def _is_attack_too_weak(metrics: dict[str, Metric]) -> bool:
    """Return whether the attack works on neither model: 0 % at 1×, and never relearned; by usable
    attacks where these were measured.
    """
    usable = "" if value_of(metrics, "asr_usable") is None else "_usable"
    names = (f"asr{usable}", f"asr{usable}_baseline", f"steps_to_relearn{usable}_ratio")
    return [value_of(metrics, name) for name in names] == [0, 0, None]


@dataclass
class Outcome:
    """The verdict on one record.

    Attributes:
        label: passes, fails, inconclusive, baseline, or how a run without figures ended.
        headline: one sentence with the figures that count.
        details: why, whether it is significant, and what contradicts it.
    """

    tone: Tone
    label: str
    headline: str
    details: list[str] = field(default_factory=list)


def outcome(record: Record) -> Outcome:
    """Return the verdict on one record in words."""
    metrics, name, error = record["metrics"], record["immunizer"], record["error"]
    if record["status"] in ENDED_EARLY or (error and not metrics):
        label = str(record["status"]).replace("preempted", "interrupted")
        error = error or {"type": label, "message": "no message was recorded"}
        lost = [sentence(n) for n in record["notes"] if "failed and is left out" in n]
        headline = f"{name} {label}: {error['type']}: {error['message']}"
        return Outcome("error", label, headline, lost + _published(record))
    if "audit_verdict" in record["tables"]:
        word, note = verdict_word(record), metrics["verdict"]["note"]
        limits = [row["limit"] for row in record["tables"]["audit_limits"]]
        headline = f"Checkpoint {record['config']['backbone'].get('path')}: {note}"
        return Outcome(TONES[word], word, headline, limits)
    if not is_immunized(record):
        headline = "Baseline only: nothing was immunized, so there is nothing to compare."
        return Outcome("neutral", "baseline", headline, _rir_bound(metrics, "rir_bound"))
    word = verdict_word(record)
    verb = "is inconclusive" if word == "inconclusive" else word
    figures = ", ".join(f"{column} {text}" for column, text in key_texts(record).items())
    slowdown = metrics.get(slowdown_of(record)[1])
    details = [record["config"]["remark"]] if record["config"].get("remark") else []
    if slowdown and slowdown["value"] is not None:
        details.append(certainty(slowdown, 1.0))
    details += _reasons(record) + _disagreeing(metrics) + _rir_bound(metrics, "rir_bound_ratio")
    headline = f"{name} {verb}{': ' if figures else ''}{figures}."
    return Outcome(TONES[word], word, headline, details + _published(record))


def key_texts(record: Record) -> dict[str, str]:
    """Return column → text of the figures that count and were measured: ``3 % (baseline 88 %)``."""
    metrics, texts = record["metrics"], {}
    for column, name in key_figures(record).items():
        metric, baseline = metrics.get(name), metrics.get(f"{name}_baseline")
        if metric is None or metric["value"] is None:
            continue
        texts[column] = measured(metric, name)
        if baseline is not None and baseline["value"] is not None:
            shares = percent(metric["value"]), percent(baseline["value"])
            texts[column] = "{} (baseline {})".format(*shares)
    return texts


def _reasons(record: Record) -> list[str]:
    """Return why the verdict is as it is."""
    rows, verdict, out = record["tables"].get("verdict", []), record["metrics"].get("verdict"), []
    if record["status"] == "diverged":
        message = (record["error"] or {}).get("message") or "no message was recorded"
        out.append(f"Immunization diverged on part of the run: {sentence(message)}")
    if verdict is None:
        why = "no metric gave a verdict" if record["attacks"] else "no attack was run"
        return [*out, f"Inconclusive, as {why}."]
    if _is_attack_too_weak(record["metrics"]):
        out.append("The attack is too weak: it does not bring the targets back in the baseline.")
    if rows:
        out.append("Passes {} of {} checks.".format(*count_checks(record)))
    for check in (check for check in rows if not check["passed"]):
        figure = f"{measured(check)} (required {check['required']})"
        figure = figure if check["value"] is not None else check["note"] or "not measured"
        out.append(sentence(f"{capitalized(check['result'])}: {check['check']}: {figure}"))
    return out or [sentence(verdict["note"])]


def _disagreeing(metrics: dict[str, Metric]) -> list[str]:
    """Return scorers that see the attacked images closer to the target than the baseline's."""
    names = [n for n in metrics if re.fullmatch(r"msgr_(feature_)?[a-z]+", n)]
    against = [n for n in names if (metrics[n]["high"] or 0) < 0]
    return [f"A scorer disagrees: {heading(n)} {measured(metrics[n])}." for n in against]


def _rir_bound(metrics: dict[str, Metric], name: str) -> list[str]:
    """Return how far a linear immunizer could get at all."""
    limit = metrics.get(name)
    if limit is None:
        return []
    if limit["value"] is None:
        return [f"RIR has no upper bound here: {sentence(limit['note'])}"]
    if name == "rir_bound":
        return [f"No linear immunizer can reach an RIR above {measured(limit)} on these tasks."]
    return [f"RIR is {percent(limit['value'])} of its upper bound for linear immunizers."]


def _published(record: Record) -> list[str]:
    """Return what a paper reports for these settings, and why they differ."""
    scenario, value, source = PUBLISHED.get(record["immunizer"], ("", 0.0, ""))
    if record["scenario"] != scenario:
        return []
    rir = measured(record["metrics"].get("rir"))
    ends = {
        "ok": f"this run measured {rir}.",
        "diverged": "this run's plain steps diverge, since η·λ_P is far beyond the stable step for "
        "H = XᵀX on these data. The paper does not say how H was scaled; presets without `paper` "
        "in their name divide it by its largest eigenvalue.",
    }
    end = ends.get(record["status"], "this run did not measure it.")
    return [f"With these settings the paper reports RIR {value:g} ({source}); {end}"]
