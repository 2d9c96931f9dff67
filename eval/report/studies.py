"""Which plots a report shows: curves, spectra, pairs of tasks, sweeps over options, transfer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from eval.report.leaderboard import columns
from eval.report.page import Block, collapsed
from eval.report.plots import Line, line_of, lines_plot, series_of
from eval.report.words import Record, capitalized, counted, figure, heading, settings, typed
from lab.core.record import is_immunized
from lab.core.slugs import slug
from lab.core.types import BASELINE, IMMUNIZED

# curves that are shown open: of text-to-image models and audits, else the first kind of probes'
_GENERATED = re.compile(r"asr|asr_benign|asr_by_trials|audit_.*")
_PROBES = ("norm_ratio_", "test_accuracy_", "test_loss_", "train_loss_")
_CONDITION = ("rir_bound_ratio", "rir", "kappa_harmful", "kappa_benign")
_OPEN = 6  # curves before the others are collapsed
_OPTION_METRICS, _SERIES = 4, 6  # of a sweep: plots, and lines in each
GAPS = (-1.0, 1.2)  # what is shown of relative gaps
_SPECTRA = (  # table, column, role, title
    ("spectrum", "value", "harmful", "Singular values of the features, harmful task"),
    ("spectrum", "value", "benign", "Singular values of the features, benign task"),
    ("principal_angles", "degrees", None, "Principal angles between both tasks"),
    ("pencil", "value", None, "Eigenvalues of the pencil (K harmful, K benign)"),
)

Rows = Sequence[tuple[str, Record]]  # records by their labels
Plot = dict[str, Any]  # {"title": str, "svg": Markup, "note": str}


def _model_lines(curves: Sequence[tuple[dict[str, Any], str]]) -> list[Line]:
    """Return the baseline once, the first immunized model highlighted, the others grey.

    Series that are no model (a concept, an attack) keep their own names and colours.

    Args:
        curves: with the label of their record.
    """
    lines: list[Line] = []
    for curve, label in curves:
        for series in series_of(curve):
            drawn = {line.index for line in lines}
            shown: tuple[str, int | None] = ("baseline", 0)
            if series not in (BASELINE, IMMUNIZED):
                shown = (series if len(curves) == 1 else f"{label}: {series}", 1 + len(lines))
            elif series == IMMUNIZED and 1 not in drawn:
                shown = (label, 1)
            elif series == IMMUNIZED:  # matplotlib's legends leave out what begins with _
                others = counted(len(curves) - 1, "other method")
                shown = (others if None not in drawn else "_", None)
            elif 0 in drawn:
                continue
            lines.append(line_of(curve, series, *shown))
    return lines


def _curves(chosen: Sequence[str], rows: Rows) -> list[Plot]:
    """Return plots of record curves by their names."""
    budget = rows[0][1]["config"].get("budget") or {}
    plots = []
    for name in chosen:
        curves = [(r["curves"][name], label) for label, r in rows if name in r["curves"]]
        options: dict[str, Any] = {}
        if "horizon" in budget and name != "asr_by_trials" and not _is_training(name):
            options["mark"] = (budget["horizon"], "1×")
        if name in ("rir", "rir_bound_ratio"):
            options["reference"] = 1.0
        if "sgr_" in name:  # beyond, the baseline shows next to nothing of the concept
            options |= {"reference": 0.0, "clip": GAPS}
        plots.append(_plot(capitalized(heading(name)), curves, **options))
    return [plot for plot in plots if plot["svg"]]


def _plot(title: str, curves: Sequence[tuple[dict[str, Any], str]], **options: Any) -> Plot:
    first = curves[0][0]
    y = re.sub(r", (harmful|benign) task$", "", str(first.get("y", "")))
    words = {"title": title, "x": str(first.get("x", "step")), "y": y, "log": first.get("log", "")}
    return {"title": title, "svg": lines_plot(_model_lines(curves), **words, **options)}


def _is_training(name: str) -> bool:
    return name in _CONDITION or name.startswith(("immunize_", "utility_"))


def curve_blocks(rows: Rows) -> list[Block]:
    """Return curves over attack steps, those that decide open; all others are collapsed."""
    every = list(dict.fromkeys(name for _, r in rows for name in r["curves"]))
    attack = [name for name in every if not _is_training(name)]
    kinds = [[n for n in attack if _GENERATED.fullmatch(n)]]
    kinds += [[n for n in attack if n.startswith(quantity)] for quantity in _PROBES]
    main = sorted(next(filter(None, kinds), []), key=lambda n: "_benign_" in n)[:_OPEN]
    shown = _curves(main, rows)
    more = _curves([n for n in attack if n not in main], rows)
    training = _curves([n for n in every if n not in attack], rows)
    blocks: list[Block] = [{"heading": "Attacks"}, {"plots": shown}] if shown else []
    blocks += collapsed(f"{len(more)} more curves of attacks", [{"plots": more}] if more else [])
    title = "Curves of the immunization"
    return blocks + collapsed(title, [{"plots": training}] if training else [])


# ---- spectra and pairs of tasks


def spectrum_blocks(rows: Rows) -> list[Block]:
    """Return singular values, principal angles and the pencil, before (baseline) and after, of the
    first case and seed, which is all that these tables hold.
    """
    plots = []
    for table, column, role, title in _SPECTRA:
        curves = []
        for label, record in rows:
            lines = [r for r in record["tables"].get(table, []) if role in (None, r.get("role"))]
            if lines:
                models = pd.DataFrame(lines).pivot_table(column, "index", "model")
                curve = {"step": models.index.tolist(), **models.to_dict("list"), "x": "index"}
                curves.append((curve | {"y": column, "log": "y" * (column == "value")}, label))
        plots += [_plot(f"{title}: first case and seed", curves)] if curves else []
    return collapsed("Spectra and angles", [{"plots": plots}] if plots else [])


def pair_blocks(rows: Rows) -> list[Block]:
    """Return mean RIR over seeds per (benign, harmful) pair, of at least three tasks each."""
    blocks: list[Block] = []
    for label, record in rows:
        frame = pd.DataFrame(record["tables"].get("pairs", []), columns=["benign", "task", "rir"])
        means = frame.dropna().pivot_table("rir", "benign", "task", "mean")
        if min(means.shape) < 3:
            continue
        logs = np.log10(means.where(means > 0))
        shades = (logs / np.nanmax(np.abs(logs))).fillna(0)
        head = [("benign ↓ harmful →", 0.0), *((str(task), 0.0) for task in means)]
        lines = [
            [(str(task), 0.0), *((figure(means.at[task, c]), shades.at[task, c]) for c in means)]
            for task in means.index
        ]
        values = means.stack()
        note = (
            f"{(values > 1).sum()} of {len(values)} pairs above 1; mean {figure(values.mean())}, "
            f"smallest {figure(values.min())}. Orange: above 1, the harmful task became worse "
            "conditioned; violet: below 1."
        )
        blocks += [{"heading": f"RIR of every pair of tasks: {label}"}, {"text": note}]
        blocks.append({"heat": [head, *lines], "label": f"RIR per pair: {label}"})
    return blocks


# ---- sweeps over options


def option_blocks(records: Sequence[Record]) -> list[Block]:
    """Return, per immunizer with at least three records that differ in one or two settings, a plot
    per metric.
    """
    blocks: list[Block] = []
    for name in dict.fromkeys(r["immunizer"] for r in records if is_immunized(r)):
        own = [r for r in records if r["immunizer"] == name and r["metrics"]]
        frame = _varied(own) if len(own) >= 3 else pd.DataFrame()
        if frame.shape[1] not in (1, 2) or frame.map(repr).duplicated().any():
            continue
        # x: a number before a name, the one with more values first
        x, *others = sorted(
            frame, key=lambda k: (not _is_numeric(frame[k]), -frame[k].map(repr).nunique())
        )
        series = frame[others[0]].map(typed) if others else pd.Series("", frame.index)
        shown = [n for n in columns(n for r in own for n in r["metrics"]) if n != "verdict"]
        shown = [n for n in shown if len({_score(r, n)["value"] for r in own} - {None}) > 1]
        plots = [_option_plot(n, own, frame[x], series) for n in shown[:_OPTION_METRICS]]
        if plots and series.nunique() <= _SERIES:
            keys = " and ".join(key.rpartition(".")[2] for key in (x, *others))
            blocks += [{"heading": f"{name} by {keys}"}, {"plots": plots}]
    return blocks


def _score(record: Record, metric: str) -> dict[str, Any]:
    return record["metrics"].get(metric, {"value": None, "low": None, "high": None})


def _varied(records: Sequence[Record]) -> pd.DataFrame:
    """Return the settings that differ, a row per record; of those that differ together (one sets
    the other) the first numeric one stands for all.
    """
    frame = pd.DataFrame([settings(r) for r in records], dtype=object)
    keys = [key for key in frame if not key.endswith("_target_")]
    codes = {key: tuple(pd.factorize(frame[key].map(repr))[0]) for key in keys}
    keys.sort(key=lambda key: not _is_numeric(frame[key]))
    chosen = {codes[key]: key for key in reversed(keys) if max(codes[key])}  # the first one stays
    return frame[[key for key in frame if key in chosen.values()]]


def _is_numeric(values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _option_plot(metric: str, records: Sequence[Record], x: Any, series: Any) -> Plot:
    ticks = [] if _is_numeric(x) else list(dict.fromkeys(x.map(typed)))
    places = x.map(typed).map(ticks.index) if ticks else x.astype(float)
    lines = []
    for index, value in enumerate(dict.fromkeys(series), start=1):
        order = places[series == value].sort_values()
        scores = [_score(records[i], metric) for i in order.index]
        parts = ([score[part] for score in scores] for part in ("value", "low", "high"))
        lines.append(Line(value, index, list(order), *parts))
    log = "x" * (not ticks and _is_wide(places)) + "y" * _is_wide(
        [v for line in lines for v in line.y]
    )
    name, title = x.name.rpartition(".")[2], capitalized(heading(metric))
    svg = lines_plot(lines, title=title, x=name, y="", log=log, ticks=ticks)
    missing = sum(_score(r, metric)["value"] is None for r in records)
    note = f"{missing} of {len(records)} runs have no value." if missing else ""
    return {"title": title, "svg": svg, "note": note}


def _is_wide(values: Any) -> bool:
    """Return whether values are positive and span a factor of 8, for a logarithmic axis."""
    known = [v for v in values if v is not None]
    return bool(known) and min(known) > 0 and max(known) >= 8 * min(known)


# ---- transfer


def transfer_blocks(rows: Rows) -> list[Block]:
    """Return whether RIR predicts the slowdown, per attack: rank correlations, and the cases behind
    them.
    """
    blocks: list[Block] = []
    for label, record in rows:
        results = list(record["tables"].get("transfer", []))
        results.sort(key=lambda r: 2 if r["rho_rir"] is None else -r["rho_rir"])
        if not results:
            continue
        attacks = [str(row["attack"]) for row in results]
        kappa = [_score(record, f"transfer_harmful_{slug(attack)}") for attack in attacks]
        places = range(len(results))
        rir = ([row[part] for row in results] for part in ("rho_rir", "low", "high"))
        own = ([score[part] for score in kappa] for part in ("value", "low", "high"))
        lines = [
            Line("RIR, harmful ÷ benign slowdown", 1, places, *rir),
            Line("κ, harmful slowdown", 2, [place + 0.15 for place in places], *own),
        ]
        median = Line("", 1, places, [row.get("median_relative_slowdown") for row in results])
        plots = [
            {"title": title}
            | {"svg": lines_plot(drawn, title=title, x="attack", y=y, reference=at, ticks=attacks)}
            for title, drawn, y, at in (
                ("Rank correlation with the slowdown", lines, "Spearman's ρ", 0.0),
                ("Median slowdown", [median], "harmful ÷ benign", 1.0),
            )
        ]
        blocks += [{"heading": f"Does RIR predict the slowdown? {label}"}, {"plots": plots}]
        cases = pd.DataFrame(record["tables"].get("transfer_cases", []))
        clouds = [
            _cloud(cases[cases["attack"] == row["attack"]], row) for row in results if len(cases)
        ]
        clouds = [plot for plot in clouds if plot["svg"]]
        blocks += collapsed("The cases behind it", [{"plots": clouds}] if clouds else [])
    return blocks


def _cloud(cases: pd.DataFrame, row: dict[str, Any]) -> Plot:
    """Return the cases of one attack: RIR against relative slowdown."""
    cases = cases[(cases["rir"] > 0) & (cases["relative_slowdown"] > 0)]
    lines = [
        Line(name, index, own["rir"].tolist(), own["relative_slowdown"].tolist())
        for index, (name, own) in enumerate(
            {
                "measured": cases[~cases["censored"]],
                "a lower limit": cases[cases["censored"]],
            }.items(),
            start=1,
        )
    ]
    title, note = str(row["attack"]), f"ρ {figure(row['rho_rir'])}, {len(cases)} cases."
    words: Any = {"title": title, "x": "RIR", "y": "harmful ÷ benign slowdown"}
    svg = lines_plot(lines, **words, log="xy", reference=1.0, is_scatter=True)
    return {"title": title, "svg": svg, "note": note}
