"""Two records against each other: which figures differ, and which settings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from eval.report.leaderboard import columns, name_attacks, terms, trial
from eval.report.page import Block, page
from eval.report.paired import common_seeds, difference, holm
from eval.report.words import (
    ARROWS,
    Record,
    aligned,
    bound,
    figure,
    heading,
    interval,
    labels,
    settings,
    shortened,
    typed,
)
from lab.core.errors import UserError

OTHER_TRIAL = (
    "Attackers, their options, budget, cases or data differ: "
    "figures over attackers (worst case, verdict) do not answer one question."
)

_OVER_ATTACKERS = re.compile(
    r".*_worst(_|$)|verdict|asr|steps_to_relearn|benign_steps|baseline_horizon|m?r?sgr_|clip_t_|similarity_|audit_"
)


def compare(a: Record, b: Record) -> dict[str, Any]:
    """Return the differences B − A of settings and metrics, JSON-able.

    Intervals of differences are those of `difference`. ``significant`` needs one across seeds that
    excludes zero and, for figures over attackers, the same attackers and budget.

    Raises:
        UserError: records of different schemas (their minor version does not matter) or scenarios,
            or without a common figure.
    """
    for key, values in {
        "schema": [record["schema"].partition(".")[0] for record in (a, b)],
        "scenario": [record["scenario"] for record in (a, b)],
    }.items():
        if values[0] != values[1]:
            fix = f"have different {key}s; compare two records of one {key}."
            raise UserError("records", f"{a[key]} and {b[key]}", fix)
    left, right = settings(a), settings(b)
    config = [
        {
            "key": key,
            "a": left.get(key),
            "b": right.get(key),
            "in_both": key in left and key in right,
        }
        for key in sorted(left | right)
    ]
    both = [name for name in a["metrics"] if name in b["metrics"]]
    if not both:
        fix = "have no figure in common; did one of the runs fail?"
        raise UserError("records", f"{a['name']} and {b['name']}", fix)
    same_terms = trial(a) == trial(b) and terms(a) == terms(b)
    same_trial = same_terms and "failed" not in (a["status"], b["status"])  # may lack an attack
    data = [record["provenance"].get("data_hash") for record in (a, b)]
    shown = ("name", "scenario", "backbone", "immunizer", "attacks", "status", "seeds")
    return {
        "a": {k: a[k] for k in (*shown, "content_hash")},
        "b": {k: b[k] for k in (*shown, "content_hash")},
        "same_content": a["content_hash"] == b["content_hash"],
        "same_data": data[0] == data[1],
        "same_trial": same_trial,
        "common_seeds": common_seeds(a, b),
        "metrics": [_row(n, a, b, same_trial) for n in dict.fromkeys([*columns(both), *both])],
        "only_a": [n for n in a["metrics"] if n not in b["metrics"]],
        "only_b": [n for n in b["metrics"] if n not in a["metrics"]],
        "config": [c for c in config if c["a"] != c["b"]],
    }


def _row(name: str, a: Record, b: Record, same_trial: bool) -> dict[str, Any]:
    left, right = a["metrics"][name], b["metrics"][name]
    row = {"name": name, "a": left["value"], "b": right["value"], "better": left["better"]}
    row |= {"unit": left["unit"], "bound_a": bound(left), "bound_b": bound(right), "winner": None}
    row |= difference(name, a, b)
    row["significant"] &= same_trial or not _OVER_ATTACKERS.match(name)
    if row["difference"] is None or left["better"] == "neutral":
        return row
    larger, smaller = ("b", "a") if row["difference"] > 0 else ("a", "b")
    if row[f"bound_{larger}"] == "≤" or row[f"bound_{smaller}"] == "≥":  # it may be the other one
        return row | {"winner": "undetermined", "significant": False}
    winner = larger if left["better"] == "higher" else smaller
    return row | {"winner": winner if row["difference"] else "tie"}


def compare_many(reference: Record, others: Sequence[Record]) -> pd.DataFrame:
    """Compare each of ``others`` with ``reference``, by the figures of the leaderboard that both
    have.

    Returns:
        a row per figure and record: ``a`` of the reference, ``b``, ``difference`` b − a with its
        95 % limits, ``p`` and ``p_holm``, which is corrected for the number of records;
        ``significant``: the latter is below 0.05.

    Raises:
        UserError: see `compare`.
    """
    rows, named = [], labels(others)
    results = [compare(reference, other) for other in others]
    for name in columns(reference["metrics"]):
        if name == "verdict" or name.endswith("_baseline"):
            continue
        metrics = [next((r for r in x["metrics"] if r["name"] == name), None) for x in results]
        tested = [row for row in metrics if row is not None and row["p"] is not None]
        for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row |= {"p_holm": p, "significant": row["significant"] and p < 0.05}
        for label, row in zip(named, metrics, strict=True):
            if row is not None:
                row["significant"] &= row["p"] is not None
                parts = ("a", "b", "difference", "low", "high", "p", "p_holm", "significant", "how")
                rows.append({"figure": name, "record": label} | {k: row.get(k) for k in parts})
    return pd.DataFrame(rows)


def compare_all(records: Sequence[Record]) -> pd.DataFrame:
    """Compare two records, or each of several with the first; see `lab.api.compare`.

    Raises:
        UserError: fewer than two records; see `compare`.
    """
    if len(records) < 2:
        fix = "compare needs two or more: records=[A.json,B.json]."
        raise UserError("records", f"{len(records)} records", fix)
    if len(records) > 2:
        return compare_many(records[0], records[1:])
    result = compare(*records)
    table = pd.DataFrame(result["metrics"]).set_index("name")
    table.attrs = result
    return table


# ---- text

_HOLM = (
    "p is corrected for the number of records (Holm); it is empty where no three seeds are paired."
)
SHOWN = 10  # figures, and settings, of a comparison on a terminal


def to_text(result: dict[str, Any]) -> str:
    """Return the comparison for a terminal: the ten figures that count most, then settings."""
    lines = _descriptions(result)
    if result["same_content"]:
        return "\n".join([*lines, "Both records have the same content: every figure is equal."])
    changed, config = _changed(result), _settings(result)
    equal = len(result["metrics"]) - len(changed)
    ways = Counter(row["how"] for row in changed if row["how"]).most_common()
    return "\n".join(
        [
            *lines,
            *_warnings(result),
            "",
            aligned(_figures(changed[:SHOWN])),
            f"{len(changed[SHOWN:])} more figures differ and {equal} are equal, see the page.",
            *(f"  intervals of {count}: {way}" for way, count in ways),
            f"\nSettings of both records that differ ({len(config)}):",
            *(f"  {key}: {a} → {b}" for key, a, b in config[:SHOWN]),
            *["  …"] * (len(config) > SHOWN),
        ]
    )


def many_to_text(table: pd.DataFrame, reference: Record) -> str:
    """Return `compare_many` for a terminal."""
    lines = [
        (
            heading(row["figure"]) if i == 0 else "",
            row["record"],
            figure(row["a"]),
            figure(row["b"]),
            f"{figure(row['difference'])} {interval(row)}".strip(),
            "" if pd.isna(row["p_holm"]) else f"{row['p_holm']:.3f}",
            "significant" if row["significant"] else "",
        )
        for _, group in table.groupby("figure", sort=False)
        for i, row in enumerate(group.replace({float("nan"): None}).to_dict("records"))
    ]
    names = ["figure", "B", "A", "B ", "B − A [95 %]", "p (Holm)", ""]
    text = aligned(pd.DataFrame(lines, columns=names))
    return f"A: {reference['name']} ({reference['immunizer']})\n\n{text}\n\n{_HOLM}"


def to_html(result: dict[str, Any]) -> str:
    """Return the comparison as a page."""
    changed = _changed(result)
    figures = _figures(changed).assign(interval=[row["how"] for row in changed])
    lines = [*_descriptions(result), *_warnings(result)]
    lines.append(f"{len(result['metrics']) - len(changed)} figures are equal.")
    lines += [
        f"Only in {side}: {', '.join(names)}."
        for side, names in (("A", result["only_a"]), ("B", result["only_b"]))
        if names
    ]
    blocks: list[Block] = [
        {"list": lines},
        {"table": figures.drop(columns=""), "label": "Figures"},
        {"heading": "Settings of both records that differ"},
        {"table": pd.DataFrame(_settings(result), columns=["key", "A", "B"]), "label": "Settings"},
    ]
    return page("Comparison", blocks)


def _settings(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return key and both values of the settings that differ, without those that only one of both
    has: they come with the choice of another method.
    """
    return [
        (change["key"], shortened(typed(change["a"]), 60), shortened(typed(change["b"]), 60))
        for change in result["config"]
        if change["in_both"] and not change["key"].endswith("_target_")
    ]


def _warnings(result: dict[str, Any]) -> list[str]:
    other_data = "The data differ: differences are not due to settings alone."
    return [*[other_data] * (not result["same_data"]), *[OTHER_TRIAL] * (not result["same_trial"])]


def _changed(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows that differ."""
    rows = result["metrics"]
    return [r for r in rows if r["difference"] != 0 and not (r["a"] is None and r["b"] is None)]


def _descriptions(result: dict[str, Any]) -> list[str]:
    return [
        "{}: {name} ({immunizer} against {}), {status}".format(
            side.upper(), name_attacks(result[side]["attacks"]), **result[side]
        )
        for side in "ab"
    ]


def _figures(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return the table of differences, as text."""
    lines = []
    for row in rows:
        a, b = (f"{row[f'bound_{side}']} {figure(row[side])}".strip() for side in "ab")
        change = f"{figure(row['difference'])} {interval(row)}".strip()
        if row["ratio"] is not None:
            change += f", ÷ {figure(row['ratio']['value'])} {interval(row['ratio'])}"
        winner = {"a": "A", "b": "B"}.get(row["winner"], row["winner"] or "")
        if winner in ("A", "B"):
            winner += ", significant" if row["significant"] else ", not significant"
        lines.append((ARROWS[row["better"]], heading(row["name"]), a, b, change, winner))
    return pd.DataFrame(lines, columns=["", "figure", "A", "B", "B − A [95 %]", "better"])
