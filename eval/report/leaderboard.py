"""Several records side by side: grouped by what they must share, ordered, as text or CSV."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from typing import Any

import pandas as pd

from eval.report.outcomes import (
    ENDED_EARLY,
    MARKS,
    TONES,
    Outcome,
    count_checks,
    key_figures,
    limit_of,
    outcome,
    slowdown_of,
    value_of,
)
from eval.report.page import Block
from eval.report.paired import difference
from eval.report.plots import Method, forest
from eval.report.words import (
    UNMEASURED,
    Metric,
    Record,
    aligned,
    capitalized,
    certainty,
    counted,
    flatten,
    labels,
    markdown,
    measured,
    settings,
    short_names,
    support,
    typed,
)
from lab.core.record import is_immunized
from lab.core.slugs import slug
from lab.core.types import IMMUNIZED

# metrics of tables, in this order; the strongest attack first, the benign side after the harmful
COLUMNS = (
    "verdict",
    "slowdown_harmful_worst",
    "slowdown_benign_worst",
    "slowdown_relative_worst",
    "slowdown_loss_harmful_worst",
    "slowdown_loss_benign_worst",
    "sgrc_harmful_worst",
    "sgrc_benign_worst",
    "rir",
    "rir_bound_ratio",
    "rir_above_one",
    "kappa_harmful_ratio",
    "kappa_benign_ratio",
    "rir_ridge",
    "rir_release",
    "audit_steps_worst",
    "steps_to_relearn_usable_ratio_worst",
    "steps_to_relearn_usable_ratio",
    "asr_usable",
    "asr_usable_baseline",
    "steps_to_relearn_ratio_worst",
    "steps_to_relearn_ratio",
    "asr",
    "asr_baseline",
    "msgr_clip",
    "mrsgr_clip",
    "benign_steps_usable_ratio_worst",
    "benign_steps_ratio_worst",
    "benign_steps_ratio",
    "sgr_benign_clip",
    "utility_detection_drop",
    "utility_clip_drift",
    "asr_prompt_adherent",
    "steps_to_relearn_prompt_adherent_ratio",
)
# of other scorers and utilities too, but not of a longer horizon, one model or other prompts
_MORE = re.compile(r"(msgr|mrsgr|sgr_benign)_[a-z0-9_]+|utility_[a-z0-9_]+_drift")
_NOT_MORE = re.compile(r".*_(baseline|auc|legacy|\d+x)")
_THRESHOLD = re.compile(r"eval\.(concept_)?verdict\.(min|max)_")  # config keys
_ORDER = (  # of methods that pass or have no verdict
    "slowdown_harmful_worst",
    "sgrc_harmful_worst",
    "rir",
    "steps_to_relearn_usable_ratio_worst",
    "steps_to_relearn_ratio_worst",
    "msgr_clip",
)
_LEAST = (  # least-protected target
    "steps_to_relearn_usable_ratio_worst",
    "steps_to_relearn_ratio_worst",
    "slowdown_harmful_worst",
)
_HEAD = (
    "rank",
    "scenario",
    "backbone",
    "trial",
    "immunizer",
    "label",
    "status",
    "outcome",
    "seeds",
)
REFERENCE = "retrained"  # conf/immunize/retrained.yaml: the model that never saw the targets
CONTROLS = (  # they compete with no method
    REFERENCE,
    "other_seed",
    "weight_noise",
    "reparam",
    "kappa_supervised_only_deep",
)
_BASELINE: Metric = {"value": 1.0, "low": None, "high": None, "unit": "×"}
_PARTS = ("value", "low", "high", "n", "interval")


def columns(names: Iterable[str]) -> list[str]:
    """Return those metrics of ``names`` that a table shows, in its order."""
    known = set(names)
    more = {n for n in known - set(COLUMNS) if _MORE.fullmatch(n) and not _NOT_MORE.fullmatch(n)}
    more = {n for n in more if not any(n.startswith(f"{m}_") for m in known - {n})}
    return [c for c in COLUMNS if c in known] + sorted(more)


# ---- what records must share


Group = tuple[str, str, str]  # scenario, backbone, trial


def trial(record: Record) -> str:
    """Return attackers, budget, place of the data and cases in words."""
    parts = [", ".join(sorted(record["attacks"])) or "no attack", *_steps(record)]
    data = flatten(record["config"]).get("scenario.path")
    parts += [f"data: {data}"] if data else []
    cases = sorted({str(s["case"]) for s in record["stages"] if s["case"] is not None})
    if len(cases) > 4:
        digest = hashlib.sha256("\n".join(cases).encode()).hexdigest()[:6]
        parts.append(f"{len(cases)} cases {cases[0]} … {cases[-1]} ({digest})")
    elif cases:
        parts.append(f"cases {', '.join(cases)}")
    return " · ".join(parts)


def _steps(record: Record) -> list[str]:
    """Return ``2 of 20 steps``: where models are compared, and where attacks end."""
    budget = record["config"].get("budget")
    if not budget or not record["attacks"]:
        return []
    unit = budget.get("unit", "steps")
    return [f"{budget['horizon']} of {budget['horizon'] * budget['multiple']} {unit}"]


def name_attacks(names: Sequence[str]) -> str:
    """Return ``nine attacks``; one attack by its name."""
    return names[0] if len(names) == 1 else counted(len(names), "attack")


def terms(record: Record) -> dict[str, Any]:
    """Return the attackers and every option of them and of the budget that is set, but those that
    leave an attack as it is.
    """
    # a record without a unit is older than the option
    return {"attacks": sorted(record["attacks"]), "budget.unit": "steps"} | {
        key: value
        for key, value in settings(record).items()
        if value is not None
        and key.startswith(("attacks.", "budget."))
        and not key.endswith((".keep_weights", ".families", "._target_"))
    }


def other_settings(records: Sequence[Record]) -> list[str]:
    """Return for each record those of `terms` and of the thresholds of its verdict that most of the
    others do not share, as text.
    """
    rows = []
    for record in records:
        limits = (item for item in settings(record).items() if _THRESHOLD.match(item[0]))
        rows.append({key: typed(value) for key, value in (terms(record) | dict(limits)).items()})
    frame = pd.DataFrame(rows).fillna("null")
    common, names = frame.mode().iloc[0], short_names({*frame})
    return [
        ", ".join(f"{names[key]}={value}" for key, value in row.items() if value != common[key])
        for row in frame.to_dict("records")
    ]


def groups(records: Sequence[Record]) -> dict[Group, list[Record]]:
    """Return comparable records by their place: fewer attackers make a better worst case."""
    out: dict[Group, list[Record]] = {}
    for record in sorted(records, key=lambda r: not r["metrics"]):  # failed runs last
        place = (record["scenario"], record["backbone"], trial(record))
        out.setdefault(place, []).append(record)
    return out


def titles(places: dict[Group, list[Record]]) -> dict[Group, str]:
    """Return short titles, all different."""
    short = {
        place: ", ".join([name_attacks(record["attacks"]), *_steps(record)])
        for place, (record, *_) in places.items()
    }
    counts = Counter((*place[:2], words) for place, words in short.items())
    return {
        (scenario, backbone, whole): f"{scenario} on {backbone} · "
        + (words if counts[scenario, backbone, words] == 1 else whole)
        for (scenario, backbone, whole), words in short.items()
    }


# ---- rows


@dataclass
class Row:
    """A record in its group.

    Attributes:
        title, trial: of the group, short and whole.
        checks: how many checks of the verdict pass, and how many there are.
        rank: 1 is best; None: the baseline, and runs that failed.
    """

    record: Record
    label: str
    title: str
    trial: str
    outcome: Outcome
    checks: tuple[int, int]
    rank: int | None = None

    @property
    def is_ranked(self) -> bool:
        """Whether it competes; a failed run has figures of fewer attackers than asked for."""
        has_figures = self.record["metrics"] and self.record["status"] not in ENDED_EARLY
        return bool(is_immunized(self.record) and has_figures)

    def value(self, name: str) -> float | None:
        """Return the value of a metric; None where it was not measured."""
        return value_of(self.record["metrics"], name)


def leaderboard(records: Sequence[Record]) -> list[Row]:
    """Return rows ordered by scenario, backbone and trial, then best first; the baseline and failed
    runs come last, unranked.

    Order: complete runs before those that diverged in part; verdict; among those that pass (or have
    none) harmful slowdown and SGRC against the strongest attack, then RIR, or the steps to relearn
    the least-protected target, then MSGR; among the others the number of checks passed, then the
    slowdown of the least-protected target (of feature extractors the harmful slowdown).
    """
    rows: list[Row] = []
    places = groups(records)
    names = titles(places)
    for place, alike in places.items():
        group = [
            Row(record, label, names[place], place[2], outcome(record), count_checks(record))
            for record, label in zip(alike, labels(alike), strict=True)
        ]
        group.sort(key=_order)
        for rank, row in enumerate((row for row in group if row.is_ranked), start=1):
            row.rank = rank
        rows += group
    return rows


def _order(row: Row) -> tuple[float, ...]:
    passes, is_checked = row.value("verdict") == 1, row.checks[1] > 0
    names = _LEAST if is_checked and not passes else _ORDER
    values = [-math.inf if (value := row.value(name)) is None else value for name in names]
    if is_checked and not passes:
        values = [row.checks[0], max(values)]
    return (
        not row.is_ranked,
        row.record["status"] == "diverged",
        not is_checked,
        not passes,
        *(-value for value in values),
    )


def sections(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return rows by title."""
    return {title: list(group) for title, group in groupby(rows, lambda row: row.title)}


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the figures that count as text: rank, method, verdict, checks, attack success,
    slowdown, benign cost, share of the reference (`shares`), the strongest attack, seeds,
    `other_settings`. What nobody has is no column.
    """
    lines = []
    reference = next((r.record for r in rows if r.record["immunizer"] == REFERENCE), None)
    others = other_settings([row.record for row in rows])
    for row, other in zip(rows, others, strict=True):
        metrics, names = row.record["metrics"], key_figures(row.record)
        mark = MARKS[row.outcome.tone] if row.outcome.label in TONES else ""
        diverged = " (partly diverged)" if metrics and row.record["status"] == "diverged" else ""
        line = {
            **({"#": str(row.rank or "")} if len(rows) > 1 else {}),
            "method": row.label,
            "verdict": f"{mark} {row.outcome.label}{diverged}".strip(),
            "checks": "{} of {}".format(*row.checks) if row.checks[1] else UNMEASURED,
            **{column: measured(metrics.get(name), name) for column, name in names.items()},
        }
        if reference is not None and is_immunized(row.record):
            line["share of the reference"] = least_share(row.record, reference) or UNMEASURED
        line["strongest attack"] = strongest_attack(row.record)
        first = next((metrics[name] for name in names.values() if name in metrics), None)
        line["seeds"] = support(first) if first else UNMEASURED
        lines.append(line | {"other settings": other or UNMEASURED})
    frame = pd.DataFrame(lines).fillna(UNMEASURED)
    return frame.loc[:, (frame != UNMEASURED).any()]


def strongest_attack(record: Record) -> str:
    """Return which of several attacks is behind the success rate at 1×: the one that shows the
    target most often for most targets and seeds, and for how many: ``lora (5 of 12)``. Images of
    models that the attack has made unusable do not count.
    """
    frame = pd.DataFrame(record["tables"].get("attacks", []))
    horizon = (record["config"].get("budget") or {}).get("horizon")
    shares = next((key for key in frame if re.fullmatch(f"at_0*{horizon}", key)), None)
    if shares is None or frame["attack"].nunique() == 1:  # the title names a single one
        return UNMEASURED
    frame = frame[(frame["model"] == IMMUNIZED) & (frame["role"] == "harmful")].dropna(
        subset=shares
    )
    if "unusable_at" in frame:
        lost = frame["unusable_at"].map(lambda steps: str(horizon) in str(steps).split(", "))
        frame = frame.assign(**{shares: frame[shares].mask(lost, 0.0)})
    strongest = frame.loc[frame.groupby(["case", "concept", "seed"])[shares].idxmax()]
    counts = strongest.loc[strongest[shares] > 0, "attack"].value_counts()
    return next((f"{name} ({n} of {len(strongest)})" for name, n in counts.items()), UNMEASURED)


def _logs(record: Record) -> dict[str, float]:
    """Return target → logarithm of its slowdown, by usable attacks where they were measured."""
    rows, metrics = record["tables"].get("relearning", []), record["metrics"]
    logs = {}
    for target in sorted({row["concept"] for row in rows if row.get("role") == "harmful"}):
        names = (f"steps_to_relearn_{kind}_{slug(target)}" for kind in ("usable_ratio", "ratio"))
        values = [metrics[name]["value"] for name in names if name in metrics]
        if values and values[0]:
            logs[target] = math.log(values[0])
    return logs


def shares(record: Record, reference: Record) -> dict[str, float]:
    """Return target → log slowdown of ``record`` ÷ log slowdown of ``reference``.

    1 is as slow as a model that never saw the target; more is possible. Targets that the reference
    learns as fast as the baseline are left out.
    """
    own, theirs = _logs(record), _logs(reference)
    return {name: own[name] / log for name, log in theirs.items() if log > 0 and name in own}


def least_share(record: Record, reference: Record) -> str:
    """Return the least of `shares` with its target, as text; empty where there is none."""
    parts = shares(record, reference)
    name = min(parts, key=lambda key: parts[key], default="")
    return f"{parts[name]:.2f}".replace("-", "−") + f" ({name})" if parts else ""


def headline(group: Sequence[Row]) -> Outcome:
    """Return which method comes first, by which margin and whether that is significant; of one
    method its own outcome.
    """
    ranked = [row for row in group if row.rank is not None]
    ranked = [row for row in ranked if row.record["immunizer"] not in CONTROLS] or ranked
    first, *others = ranked or group
    if len(ranked) < 2:
        return first.outcome
    column, name = slowdown_of(first.record)
    metric, details = first.record["metrics"].get(name), first.outcome.details
    wins = False
    if first.value(name) is not None:
        details = [certainty(metric, 1.0)]
        if others[0].value(name) is not None:
            margin, wins = _margin(name, first, others[0])
            details.append(f"Margin over {others[0].label}: {margin}.")
    passing = sum(row.outcome.label == "passes" for row in ranked)
    text = f"No verdict: of {len(ranked)} methods {first.label} comes first"
    if passing:
        text = f"{first.label} {'wins' if wins else 'comes first'}: "
        text += f"{passing} of {len(ranked)} methods pass"
    elif first.checks[1]:
        text = f"No method passes: of {len(ranked)} methods the closest is {first.label}, "
        text += "{} of {} checks".format(*first.checks)
    if first.value(name) is not None:
        text += f"; {column} {measured(metric, name)}"
    return replace(first.outcome, headline=f"{text}.", details=details)


def _margin(name: str, first: Row, second: Row) -> tuple[str, bool]:
    """Return by how much the first method is ahead of the second, and whether it is significantly
    ahead.
    """
    better, worse = (row.record["metrics"].get(name) for row in (first, second))
    gap = difference(name, second.record, first.record)
    certain = "significant" if gap["significant"] else "not significant"
    limits = (worse.get("bound"), better.get("bound"))
    if any(limits) and not (limits == (None, "lower") and gap["difference"] > 0):
        certain = "undetermined, as a figure is a limit"
    text = measured({"value": gap["difference"], "unit": worse["unit"]} | gap)
    wins = certain == "significant" and gap["difference"] > 0
    return f"{text}, {certain} ({gap['how']})", wins


# ---- text and pages

LEGEND = (
    "Order: methods that pass, then by checks passed, then by the slowdown of the least-protected "
    "target. [low, high]: 95 % interval, Student's t below ten seeds, two-stage bootstrap from ten "
    "on; one or two seeds support no claim about others. ≥: the target was not reached, a lower "
    "limit; ≤: an upper limit. –: not measured. Share of the reference: log slowdown ÷ that of a "
    "model that never saw the target, for the target with the least. Strongest attack: for how "
    "many targets and seeds it is the one. Other settings: of attacks, budget or thresholds, which "
    "most rows do not share: such rows do not compare."
)


def to_text(rows: Sequence[Row]) -> str:
    """Return one aligned table per scenario, backbone and trial, for a terminal."""
    parts = []
    for title, group in sections(rows).items():
        lead = headline(group)
        parts.append(f"── {title}\n{MARKS[lead.tone]} {lead.headline}\n\n{aligned(table(group))}")
    return "\n\n".join([*parts, LEGEND])


def to_markdown(rows: Sequence[Row]) -> str:
    """Return one Markdown table per scenario, backbone and trial."""
    parts = [
        f"### {escape(title)}\n\n{escape(headline(group).headline)}\n\n{markdown(table(group))}"
        for title, group in sections(rows).items()
    ]
    return "\n\n".join([*parts, LEGEND]) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Return one line per row, full precision, with low, high, n and kind of interval."""
    names = columns(name for row in rows for name in row.record["metrics"])
    lines = []
    for row in rows:
        texts = {"rank": row.rank, "trial": row.trial, "label": row.label}
        texts |= {"outcome": row.outcome.label, "seeds": len(row.record["seeds"])}
        texts |= {key: row.record[key] for key in _HEAD if key not in texts}
        # text that a spreadsheet would take for a formula gets a leading quote
        line = {k: f"'{v}" if str(v).startswith(tuple("=+-@\t")) else v for k, v in texts.items()}
        for name in names:
            metric = row.record["metrics"].get(name, {})
            line |= {f"{name}_{part}".removesuffix("_value"): metric.get(part) for part in _PARTS}
        lines.append(line)
    frame = pd.DataFrame(lines, dtype=object)
    frame = frame[[*_HEAD, *(key for key in frame if key not in _HEAD)]]
    return str(frame.to_csv(index=False, lineterminator="\n"))


def leader_blocks(rows: Sequence[Row]) -> list[Block]:
    """Return headline, forest plot and table of one group."""
    records = [row.record for row in rows]
    blocks: list[Block] = [{"outcome": headline(rows)}]
    frame, keys = table(rows), key_figures(records[0])
    # all but attack success, or what stands for it
    limits = {c: limit_of(records, keys[c]) for c in [*keys][1:] if c in frame}
    methods: list[Method] = [("baseline", "neutral", dict.fromkeys(limits, _BASELINE))]
    for row in rows:
        names = key_figures(row.record)
        metrics = {c: row.record["metrics"].get(names.get(c, "")) for c in limits}
        if is_immunized(row.record) and any(metrics.values()):
            methods.append((row.label, row.outcome.tone, metrics))
    if len(methods) > 1:
        title = capitalized(" and ".join(limits))
        title += ", shaded where it passes" if any(limits.values()) else ""
        note = "95 % intervals; the unprotected baseline is 1. Dotted arrow: a limit."
        plots = {"wide": forest(methods, limits), "narrow": forest(methods, limits, True)}
        blocks.append({"forest": title, "note": note} | plots)
    if len(rows) > 1:
        frame["method"] = frame["#"].replace(r"(.+)", r"\1. ", regex=True) + frame["method"]
    shown = frame[frame.columns.intersection(["method", "verdict", *keys, "other settings"])]
    return [*blocks, {"table": shown, "label": f"Leaderboard {rows[0].title}"}]
