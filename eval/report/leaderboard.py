"""Several records side by side: grouped by what they must share, ordered, as text or CSV."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import pandas as pd

from eval.report.outcomes import (
    ENDED_EARLY,
    MARKS,
    TONES,
    Outcome,
    key_figures,
    outcome,
    slowdown_name,
)
from eval.report.page import Block, page
from eval.report.paired import difference
from eval.report.plots import forest, limit_of, methods_of
from eval.report.words import (
    UNMEASURED,
    Record,
    aligned,
    capitalized,
    certainty,
    counted,
    figure,
    flatten,
    interval,
    labels,
    markdown,
    measured,
    settings,
    support,
)
from lab.core.record import is_immunized

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
    "steps_to_relearn_ratio_worst",
    "steps_to_relearn_ratio",
    "asr",
    "asr_baseline",
    "msgr_clip",
    "mrsgr_clip",
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
_ORDER = (  # of methods that pass or have no verdict
    "slowdown_harmful_worst",
    "sgrc_harmful_worst",
    "rir",
    "steps_to_relearn_ratio_worst",
    "msgr_clip",
)
_LEAST = ("steps_to_relearn_ratio_worst", "slowdown_harmful_worst")  # least-protected target
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
_PARTS = ("value", "low", "high", "n", "interval")

Row = dict[str, Any]


def columns(names: Iterable[str]) -> list[str]:
    """Return those metrics of ``names`` that a table shows, in its order."""
    known = set(names)
    more = {n for n in known - set(COLUMNS) if _MORE.fullmatch(n) and not _NOT_MORE.fullmatch(n)}
    more = {n for n in more if not any(n.startswith(f"{m}_") for m in known - {n})}
    return [c for c in COLUMNS if c in known] + sorted(more)


# ---- what records must share


Place = tuple[str, str, str]  # scenario, backbone, trial


def trial(record: Record) -> str:
    """Return attackers, budget, place of the data and cases in words."""
    cells = record.get("cells", [])
    cases = sorted({str(cell["case"]) for cell in cells if cell["case"] is not None})
    listed = f"cases {', '.join(cases)}"
    if len(cases) > 4:
        digest = hashlib.sha256("\n".join(cases).encode()).hexdigest()[:6]
        listed = f"{len(cases)} cases {cases[0]} … {cases[-1]} ({digest})"
    return " · ".join([_request(record), *[listed] * bool(cases)])


def _request(record: Record) -> str:
    """Return the part of `trial` that a run which ended early has, too."""
    names = ", ".join(sorted(record["attacks"])) or "no attack"
    data = flatten(record["config"]).get("scenario.path")
    return " · ".join([names, *_steps(record), *([f"data: {data}"] if data else [])])


def _steps(record: Record) -> list[str]:
    """Return ``2 of 20 steps``: the step at which models are compared, and the last one."""
    budget: dict[str, Any] = record["config"].get("budget") or {}
    horizon, multiple = budget.get("horizon"), budget.get("multiple")
    if horizon is None or multiple is None or not record["attacks"]:
        return []
    return [f"{horizon} of {horizon * multiple} steps"]


def short_trial(record: Record) -> str:
    """Return ``Nine attacks, 2 of 20 steps``; one attack by its name."""
    names = record["attacks"]
    attacks = names[0] if len(names) == 1 else capitalized(counted(len(names), "attack"))
    return ", ".join([attacks, *_steps(record)])


def terms(record: Record) -> dict[str, Any]:
    """Return every option of attackers and budget, but those that leave an attack as it is."""
    silent = ("keep_weights", "families", "_target_")
    options = {k: v for k, v in settings(record).items() if k.startswith(("attacks.", "budget."))}
    return {k: v for k, v in options.items() if k.rpartition(".")[2] not in silent}


def groups(records: Sequence[Record]) -> dict[Place, list[Record]]:
    """Return comparable records by their place, in order of appearance: fewer attackers make a
    better worst case.

    A run that has no figures may not have come to its cases: it stands with the first others that
    were asked for the same, else with the first ones of its scenario and backbone.
    """
    out: dict[Place, list[Record]] = {}
    for record in sorted(records, key=lambda r: not r["metrics"]):
        place = (record["scenario"], record["backbone"], trial(record))
        if not record["metrics"]:
            known = [p for p in out if p[:2] == place[:2]]
            alike = [p for p in known if _request(out[p][0]) == _request(record)]
            place = next(iter([*alike, *known]), place)
        out.setdefault(place, []).append(record)
    return out


def titles(places: dict[Place, list[Record]]) -> dict[Place, str]:
    """Return short titles, all different."""
    short = {p: f"{p[0]} on {p[1]} · {short_trial(r[0])}" for p, r in places.items()}
    every = list(short.values())
    whole = {p: f"{p[0]} on {p[1]} · {p[2]}" for p in places}
    return {p: title if every.count(title) == 1 else whole[p] for p, title in short.items()}


# ---- rows


def leaderboard(records: Sequence[Record]) -> list[Row]:
    """Return rows ordered by scenario, backbone and trial, then best first; the baseline and failed
    runs come last, unranked.

    Order: complete runs before those that diverged in part; verdict; among those that pass (or have
    none) harmful slowdown and SGRC against the strongest attack, then RIR, or the steps to relearn
    the least-protected target, then MSGR; among those that fail the number of checks passed, then
    the slowdown of the least-protected target (of feature extractors the harmful slowdown).
    """
    rows: list[Row] = []
    places = groups(records)
    names = titles(places)
    for place, alike in places.items():
        group = []
        for record, label in zip(alike, labels(alike), strict=True):
            passed = [bool(check["passed"]) for check in record["tables"].get("verdict", [])]
            row = {key: record[key] for key in ("scenario", "backbone", "immunizer", "status")}
            row |= {"title": names[place], "trial": place[2], "label": label, "rank": None}
            row |= {"outcome": outcome(record).label, "seeds": len(record["seeds"])}
            row |= {"checks": (sum(passed), len(passed)), "attacks": list(record["attacks"])}
            row |= {"metrics": {k: record["metrics"][k] for k in columns(record["metrics"])}}
            group.append(row | {"record": record})
        group.sort(key=_key)
        for rank, row in enumerate((r for r in group if _is_ranked(r)), start=1):
            row["rank"] = rank
        rows += group
    return rows


def _is_ranked(row: Row) -> bool:
    """Return whether a row competes; a failed run has figures of fewer attackers than asked for."""
    return bool(is_immunized(row) and row["metrics"] and row["status"] not in ENDED_EARLY)


def _key(row: Row) -> tuple[float, ...]:
    verdict = _value(row, "verdict")
    names = _LEAST if verdict == 0 else _ORDER
    values = [-math.inf if (v := _value(row, name)) is None else v for name in names]
    failing = [row["checks"][0], max(values)]
    first = (not _is_ranked(row), row["status"] == "diverged", 1.0 if verdict is None else -verdict)
    return (*first, *(-v for v in (failing if verdict == 0 else values)))


def _value(row: Row, name: str) -> float | None:
    return (row["metrics"].get(name) or {}).get("value")


def sections(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return rows by title."""
    return {
        t: [r for r in rows if r["title"] == t] for t in dict.fromkeys(r["title"] for r in rows)
    }


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return head and rows of the figures that count, all as text: rank, method, verdict, checks,
    attack success, slowdown, benign cost, seeds. A figure that nobody measured has no column.
    """
    names = [key_figures(row["record"]) for row in rows]
    metrics = [row["record"]["metrics"] for row in rows]
    cells = {
        column: [
            measured(m.get(n.get(column)), n.get(column, ""))
            for m, n in zip(metrics, names, strict=True)
        ]
        for column in names[0]
    }
    cells = {column: texts for column, texts in cells.items() if set(texts) != {UNMEASURED}}
    out = [["#", "method", "verdict", "checks", *cells, "seeds"]]
    for i, row in enumerate(rows):
        passed, total = row["checks"]
        first = next((metrics[i][n] for n in names[i].values() if n in metrics[i]), None)
        mark = MARKS.get(TONES.get(row["outcome"], ""), "")
        diverged = " (partly diverged)" if row["status"] == "diverged" and metrics[i] else ""
        verdict = f"{mark} {row['outcome']}{diverged}".strip()
        count = f"{passed} of {total}" if total else UNMEASURED
        shown = [texts[i] for texts in cells.values()]
        seeds = support(first) if first else UNMEASURED
        out.append([str(row["rank"] or ""), row["label"], verdict, count, *shown, seeds])
    return out


def headline(group: Sequence[Row]) -> Outcome:
    """Return who wins a group, by which margin and how surely; of one method its own outcome."""
    ranked = [row for row in group if row["rank"] is not None]
    own = outcome((ranked or list(group))[0]["record"])
    if len(ranked) < 2:
        return own
    first, (passed, total) = ranked[0], ranked[0]["checks"]
    words = [row["outcome"] for row in ranked]
    text = f"No verdict: of {len(ranked)} methods {first['label']} comes first"
    if "passes" in words:
        text = f"{first['label']} wins: {words.count('passes')} of {len(ranked)} methods pass"
    elif total:
        text = f"No method passes: of {len(ranked)} methods the closest is {first['label']}, "
        text += f"{passed} of {total} checks"
    name = slowdown_name(first["record"])
    metric = first["record"]["metrics"].get(name)
    if metric is None or metric["value"] is None:
        return Outcome(own.tone, own.label, f"{text}.", own.details)
    column = [*key_figures(first["record"])][:2][-1]
    details = [certainty(metric, 1.0), *_margin(name, first, ranked[1])]
    return Outcome(own.tone, own.label, f"{text}; {column} {measured(metric, name)}.", details)


def _margin(name: str, first: Row, second: Row) -> list[str]:
    """Return by how much the first method is ahead of the second, and how surely."""
    metrics = [row["record"]["metrics"].get(name) for row in (second, first)]
    gap = difference(name, second["record"], first["record"]) if all(metrics) else None
    if gap is None:
        return []
    limits = [metric.get("bound") for metric in metrics]
    sure = "significant" if gap.significant else "not significant"
    if any(limits) and not (limits == [None, "lower"] and gap.value > 0):
        sure = "undetermined, as a figure is a limit"
    unit = str((metrics[0] or {}).get("unit", ""))
    text = f"{figure(gap.value)}{unit} {interval(vars(gap))}".strip()
    return [f"Margin over {second['label']}: {text}, {sure} ({gap.how})."]


# ---- text and pages

LEGEND = (
    "Order: methods that pass, then by checks passed, then by the slowdown of the least-protected "
    "target. [low, high]: 95 % interval, Student's t below ten seeds, two-stage bootstrap from ten "
    "on; one or two seeds support no claim about others. ≥: the target was not reached, a lower "
    "limit; ≤: an upper limit. –: not measured."
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
    lines = []
    for row in rows:
        line = {key: row[key] for key in _HEAD}
        # text that a spreadsheet would take for a formula gets a leading quote
        line |= {k: f"'{v}" for k, v in line.items() if str(v).startswith(tuple("=+-@\t"))}
        for name, metric in row["metrics"].items():
            line |= {f"{name}{f'_{part}' * (part != 'value')}": metric[part] for part in _PARTS}
        lines.append(line)
    names = columns(name for row in rows for name in row["metrics"])
    cells = [f"{name}{f'_{part}' * (part != 'value')}" for name in names for part in _PARTS]
    frame = pd.DataFrame(lines, columns=[*_HEAD, *cells], dtype=object)
    return str(frame.to_csv(index=False, lineterminator="\n"))


def leader_blocks(rows: Sequence[Row]) -> list[Block]:
    """Return headline, picture and table of one group."""
    records, names = [row["record"] for row in rows], [row["label"] for row in rows]
    blocks: list[Block] = [{"outcome": headline(rows)}]
    lines, keys = table(rows), key_figures(records[0])
    # all but attack success, or what stands for it
    panels = {c: limit_of(records, keys[c]) for c in lines[0] if c in [*keys][1:]}
    methods = methods_of(records, names, list(panels))
    if len(methods) > 1 and panels:
        picture = {"wide": forest(methods, panels), "narrow": forest(methods, panels, True)}
        note = "95 % intervals; the unprotected baseline is 1. Dotted arrow: a limit."
        title = capitalized(" and ".join(panels)) + ", shaded where it passes" * any(
            panels.values()
        )
        blocks.append({"picture": title, "note": note} | picture)
    for row, line in zip(rows, lines[1:], strict=True):
        line[1] = f"{row['rank']}. {line[1]}" if row["rank"] and len(rows) > 1 else line[1]
    shown = [[*line[1:3], *line[4:-1]] for line in lines]
    return [*blocks, {"table": shown, "label": f"Leaderboard {rows[0]['title']}"}]


def to_html(rows: Sequence[Row]) -> str:
    """Return a page with the leaderboards alone."""
    blocks: list[Block] = []
    for title, group in sections(rows).items():
        heading_block = {"heading": title, "tooltip": group[0]["trial"], "level": 2}
        blocks += [heading_block, *leader_blocks(group)]
    return page("Leaderboard", [*blocks, {"text": LEGEND}])
