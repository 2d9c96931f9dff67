"""Figures of a sweep over options: what a metric does when one or two settings of the same
immunizer change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.charts import Dots, against_option, forest, scatter, swatch
from eval.report.labels import settings
from eval.report.leaderboard import columns
from eval.report.words import Record, figure, heading
from lab.core.record import is_immunized
from lab.core.slugs import slug

_METRICS = 4  # per sweep
_SERIES = 7  # colours there are, the baseline's left out
_REFERENCE = {
    "rir": 1.0,
    "rir_bound_ratio": 1.0,
    "msgr_clip": 0.0,
    "mrsgr_clip": 0.0,
    "sgr_benign_clip": 0.0,
}


@dataclass
class _Option:
    """A setting that differs between records: its key and, per record, its value."""

    key: str
    values: list[Any]

    @property
    def name(self) -> str:
        return self.key.rsplit(".", 1)[-1]

    @property
    def distinct(self) -> list[Any]:
        seen: dict[str, Any] = {}
        for value in self.values:
            seen.setdefault(repr(value), value)
        return sorted(seen.values()) if self.numeric else list(seen.values())

    @property
    def numeric(self) -> bool:
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)


def by_option(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Per immunizer with at least three records that differ in one or two settings: a figure per
    metric.

    Returns: ``title``, ``note``, ``legend`` [(swatch, text)], ``plots`` as `eval.report.figures`
        makes them.
    """
    out = []
    for name in dict.fromkeys(r["immunizer"] for r in records if is_immunized(r)):
        mine = [
            r
            for r in records
            if r["immunizer"] == name and r["metrics"] and r["status"] != "failed"
        ]
        options = _options(mine) if len(mine) >= 3 else []
        if len(options) not in (1, 2):
            continue
        x, series = _axes(options)
        cells = [
            (repr(a), repr(b))
            for a, b in zip(x.values, series.values if series else x.values, strict=True)
        ]
        if len(set(cells)) < len(cells) or (series and len(series.distinct) > _SERIES):
            # two records of the same settings (other seeds, other code), or more lines than colours
            continue
        shown = [_figure(metric, mine, x, series, name) for metric in _shown(mine)]
        if not any(plot["svg"] for plot in shown):
            continue
        legend = (
            [(swatch(i), f"{series.name} {_text(v)}") for i, v in enumerate(series.distinct, 1)]
            if series
            else []
        )
        title = f"{name} by {' and '.join(o.name for o in (x, *([series] if series else ())))}"
        out.append(
            {
                "title": title,
                "legend": legend,
                "plots": [p for p in shown if p["svg"]],
                "note": f"{len(mine)} runs.",
            }
        )
    return out


def _options(records: Sequence[Record]) -> list[_Option]:
    """Settings that differ; of those that differ together (one sets the other) the first numeric
    one stands for all.
    """
    flat = [settings(r) for r in records]
    keys = list(dict.fromkeys(k for f in flat for k in f))
    found: dict[tuple[int, ...], _Option] = {}
    for key in keys:
        option = _Option(key, [f.get(key) for f in flat])
        distinct = [repr(v) for v in option.distinct]
        if len(distinct) < 2 or key.endswith("_target_"):
            continue
        first = {value: i for i, value in reversed(list(enumerate(repr(v) for v in option.values)))}
        pattern = tuple(first[repr(v)] for v in option.values)
        if pattern not in found or (option.numeric and not found[pattern].numeric):
            found[pattern] = option
    return list(found.values())


def _axes(options: list[_Option]) -> tuple[_Option, _Option | None]:
    """x: a number before a name, the one with more values first; the other option tells the series
    apart.
    """
    x, *rest = sorted(options, key=lambda o: (not o.numeric, -len(o.distinct)))
    return x, rest[0] if rest else None


def _shown(records: Sequence[Record]) -> list[str]:
    """Metrics worth a figure: those of the leaderboard that differ between runs, in its order."""
    names = [n for n in columns(n for r in records for n in r["metrics"]) if n != "verdict"]
    return [n for n in names if len({_value(r, n) for r in records} - {None}) > 1][:_METRICS]


def _value(record: Record, metric: str) -> float | None:
    return (record["metrics"].get(metric) or {}).get("value")


def _figure(
    metric: str, records: Sequence[Record], x: _Option, series: _Option | None, name: str
) -> dict[str, Any]:
    ticks = [] if x.numeric else [_text(v) for v in x.distinct]
    places = {repr(v): v if x.numeric else i for i, v in enumerate(x.distinct)}
    lines = []
    for number, value in enumerate(series.distinct if series else [None], start=1):
        chosen = [
            (
                places[repr(a)],
                record["metrics"].get(metric) or {"value": None, "low": None, "high": None},
            )
            for a, b, record in zip(
                x.values, series.values if series else x.values, records, strict=True
            )
            if series is None or repr(b) == repr(value)
        ]
        chosen.sort(key=lambda pair: pair[0])
        parts = [[m[k] for _, m in chosen] for k in ("value", "low", "high")]
        lines.append(Dots(_text(value), number, [p for p, _ in chosen], *parts))
    title = heading(metric)
    svg = against_option(
        lines, ticks, title=f"{name}: {title}", x=x.name, y=title, reference=_REFERENCE.get(metric)
    )
    missing = sum(_value(r, metric) is None for r in records)
    note = f"{missing} of {len(records)} runs have no value." if missing else ""
    return {"title": title, "svg": svg, "note": note}


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, int | float):
        return figure(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def transfer(records: Sequence[Record], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Whether RIR predicts the slow-down, per attacker: rank correlations, and the cases behind
    them where recorded.
    """
    out = []
    for record, label in zip(records, labels, strict=True):
        rows = record["tables"].get("transfer", [])
        if not rows:
            continue
        rows = sorted(
            rows, key=lambda r: -2.0 if r.get("rho_rir") is None else r["rho_rir"], reverse=True
        )
        nothing: list[float | None] = [None] * len(rows)
        places = list(range(len(rows)))
        by_rir = [[r.get(k) for r in rows] for k in ("rho_rir", "low", "high")]
        harmful = Dots("κ", 2, places, [r.get("rho_kappa") for r in rows], nothing, nothing)
        if (intervals := _harmful_intervals(record, rows)) is not None:
            harmful.low, harmful.high = intervals
        series = [Dots("RIR", 1, places, *by_rir), harmful]
        title = f"Rank correlation with the slow-down: {label}"
        svg = forest(
            [str(r["attack"]) for r in rows],
            series,
            title=title,
            x="Spearman's ρ over pairs of tasks",
        )
        silent = [str(r["attack"]) for r in rows if r.get("rho_rir") is None]
        note = (
            f"No correlation for {', '.join(silent)}: every case gives the same value."
            if silent
            else ""
        )
        legend = [
            (swatch(1), "RIR against the slow-down on the harmful ÷ on the benign task"),
            (
                swatch(2),
                "κ of the harmful task, after ÷ before, against the harmful slow-down alone",
            ),
        ]
        plots = [{"title": title, "svg": svg, "note": note}]
        felt = [r.get("median_relative_slowdown") for r in rows]
        if any(v is not None for v in felt):
            svg = forest(
                [str(r["attack"]) for r in rows],
                [Dots("median", 1, places, felt, nothing, nothing)],
                title=f"Median slow-down: {label}",
                x="median harmful ÷ benign slow-down",
                reference=1.0,
            )
            about = "Above 1 the harmful task is slowed more than the benign one."
            plots.append({"title": f"Median slow-down: {label}", "svg": svg, "note": about})
        out.append(
            {"title": title, "legend": legend, "plots": plots, "clouds": _clouds(record, rows)}
        )
    return out


def _harmful_intervals(
    record: Record, rows: Sequence[dict[str, Any]]
) -> tuple[list[Any], list[Any]] | None:
    """Intervals of ρ for κ: the table has them for RIR only, the metrics for both."""
    prefix = "transfer_harmful_"
    found = [record["metrics"].get(prefix + slug(str(r["attack"]))) for r in rows]
    if not any(found):
        return None
    return [m and m["low"] for m in found], [m and m["high"] for m in found]


def _clouds(record: Record, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per attacker the cases: RIR against relative slow-down (table ``transfer_cases``)."""
    out = []
    for row in rows:
        cases = [
            c
            for c in record["tables"].get("transfer_cases", [])
            if c.get("attack") == row["attack"]
        ]
        cases = [
            c for c in cases if (c.get("rir") or 0) > 0 and (c.get("relative_slowdown") or 0) > 0
        ]
        if len(cases) < 3:
            continue
        svg = scatter(
            [c["rir"] for c in cases],
            [c["relative_slowdown"] for c in cases],
            [bool(c.get("censored")) for c in cases],
            title=f"{row['attack']}: relative slow-down against RIR",
            xlabel="RIR",
            ylabel="harmful ÷ benign slow-down",
        )
        rho = (
            f"ρ {figure(row.get('rho_rir'))}"
            if row.get("rho_rir") is not None
            else "no rank correlation"
        )
        out.append({"title": str(row["attack"]), "svg": svg, "note": f"{rho}, {len(cases)} cases."})
    return out
