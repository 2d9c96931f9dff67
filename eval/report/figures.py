"""Which plots a report shows: chosen and named here, drawn by `eval.report.plots`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from eval.report.charts import heat_map
from eval.report.plots import Line, is_drawable, line_of, lines_plot, series_of
from eval.report.words import Record, figure, heading
from lab.core.slugs import slug
from lab.core.types import BASELINE, IMMUNIZED

# curves of text-to-image runs: those that decide, in this order
_GENERATED = ("asr", "asr_benign", "msgr_", "mrsgr_", "sgr_benign_")
_CONDITION = {
    "rir_bound_ratio": "RIR as a share of its bound",
    "rir": "Relative immunization ratio (RIR)",
    "kappa_harmful": "κ of the harmful Hessian",
    "kappa_benign": "κ of the benign Hessian",
}
_QUANTITIES = {
    "norm_ratio": "distance to the optimum",
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
    "train_loss": "training loss",
}

GAPS = (-1.0, 1.2)  # between twice the baseline's similarity and none at all, with some room
CUT = (
    "Cut off where the baseline shows next to nothing of the concept: the ratio to "
    "it says nothing there."
)

Shown = dict[str, Any]  # {"title": str, "svg": Markup, "note": str}


def _lines(
    name: str, records: Sequence[Record], labels: Sequence[str], index: dict[str, int]
) -> list[Line]:
    """The baseline once (it is the same in all records), then the immunized model of every record.

    Series that are no model (a concept, a task) keep their own names and colours.
    """
    out: list[Line] = []
    for record, label in zip(records, labels, strict=True):
        curve = record["curves"].get(name)
        if curve is None:
            continue
        model_names = series_of(curve)
        others = [
            model_name for model_name in model_names if model_name not in (BASELINE, IMMUNIZED)
        ]
        for model_name in model_names:
            if model_name == BASELINE and any(line.index == 0 for line in out):
                continue
            if model_name in others and len(model_names) > 1:
                out.append(
                    line_of(curve, model_name, _own(label, model_name, records), 1 + len(out))
                )
            else:
                out.append(
                    line_of(curve, model_name, label, 0 if model_name == BASELINE else index[label])
                )
    return out


def _own(label: str, series: str, records: Sequence[Record]) -> str:
    return series if len(records) == 1 else f"{label}: {series}"


def _legend(lines: Sequence[Line], labels: Sequence[str]) -> bool:
    """Whether a plot has series that the legend of the page does not name."""
    return any(line.label not in labels for line in lines)


def _curve(name: str, records: Sequence[Record]) -> dict[str, Any]:
    return next(r["curves"][name] for r in records if name in r["curves"])


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for r in records for name in r["curves"]))


def _while_immunizing(name: str) -> bool:
    return name in _CONDITION or name.startswith("immunize_")


def comparison_curves(
    records: Sequence[Record], labels: Sequence[str], index: dict[str, int]
) -> list[Shown]:
    """κ, RIR and its share of the bound, or what a concept immunizer logged, against immunization
    steps.
    """
    out = []
    for name in dict.fromkeys(
        n for n in (*_CONDITION, *_names(records)) if _while_immunizing(n) and n in _names(records)
    ):
        curve, title = _curve(name, records), _CONDITION.get(name, heading(name))
        reference = 1.0 if name in ("rir", "rir_bound_ratio") else None
        svg = lines_plot(
            _lines(name, records, labels, index),
            title=title,
            x=str(curve.get("x", "step")),
            y=str(curve.get("y", name)),
            log=curve.get("log", ""),
            reference=reference,
        )
        note = {
            "rir_bound_ratio": "1 is the most that any linear immunizer can reach.",
            "rir": "1: no effect.",
        }.get(name, "")
        out.append({"title": title, "svg": svg, "note": note})
    return [shown for shown in out if shown["svg"]]


def trajectories(
    records: Sequence[Record], labels: Sequence[str], index: dict[str, int]
) -> tuple[list[Shown], list[Shown]]:
    """Attack trajectories of all models: (those that decide, all others).

    Harmful and benign share one y axis where both stay readable.
    """
    main: list[Shown] = []
    more: list[Shown] = []
    names = [n for n in _names(records) if not _while_immunizing(n)]
    for attack in list(dict.fromkeys(a for r in records for a in r["attacks"])):
        found = [
            q
            for q in _QUANTITIES
            if any(f"{q}_{role}_{slug(attack)}" in names for role in ("harmful", "benign"))
        ]
        for quantity in found:
            pair = [(role, f"{quantity}_{role}_{slug(attack)}") for role in ("harmful", "benign")]
            drawn = [(r, n, _lines(n, records, labels, index)) for r, n in pair if n in names]
            limits = _shared_limits(
                [ls for _, _, ls in drawn], _curve(drawn[0][1], records).get("log", "")
            )
            for role, name, lines in drawn:
                curve = _curve(name, records)
                title = f"{attack}: {_QUANTITIES[quantity]}, {role} task"
                y = re.sub(r", (harmful|benign) task$", "", str(curve.get("y", name)))
                svg = lines_plot(
                    lines,
                    title=title,
                    x=str(curve.get("x", "step")),
                    y=y,
                    log=curve.get("log", ""),
                    mark=_horizon(records),
                    limits=limits,
                )
                if svg:
                    # the first quantity of an attack decides: norm ratio, else accuracy, else loss
                    (main if quantity == found[0] else more).append(
                        {"title": title, "svg": svg, "note": ""}
                    )
            names = [n for n in names if n not in [p[1] for p in pair]]
    for name in sorted(names, key=_rank):  # stable: others keep their order
        curve, lines, generated = (
            _curve(name, records),
            _lines(name, records, labels, index),
            _rank(name) < len(_GENERATED),
        )
        limits = _gap_limits(lines) if "sgr_" in name and "y" not in curve.get("log", "") else None
        svg = lines_plot(
            lines,
            title=heading(name),
            x=str(curve.get("x", "step")),
            y=str(curve.get("y", name)),
            log=curve.get("log", ""),
            legend=_legend(lines, labels),
            limits=limits,
            mark=_horizon(records) if _attack_steps(curve) else None,
            reference=0.0 if "sgr_" in name and "y" not in curve.get("log", "") else None,
        )
        if svg:
            (main if generated else more).append(
                {"title": heading(name), "svg": svg, "note": CUT if limits else ""}
            )
    return main, more


def _attack_steps(curve: dict[str, Any]) -> bool:
    return "attack" in str(curve.get("x", ""))


def _rank(name: str) -> int:
    """Place of a curve of generations among those that decide; every other comes after them."""
    found = (
        i for i, n in enumerate(_GENERATED) if name == n or (n.endswith("_") and name.startswith(n))
    )
    return next(found, len(_GENERATED))


def has_bands(records: Sequence[Record]) -> bool:
    """Whether any curve has an interval around it."""
    return any(
        len(series_of(c)) < sum(isinstance(v, list) for v in c.values()) - 1
        for r in records
        for c in r["curves"].values()
    )


def _shared_limits(plots: Sequence[Sequence[Line]], log: str) -> tuple[float, float] | None:
    """One y range for several plots, unless that would squash one of them to less than 40 % of its
    height.
    """
    together = _limits([line for lines in plots for line in lines], log)
    ranges = [r for r in (_limits(lines, log) for lines in plots) if r is not None]
    if together is None or not ranges:
        return None

    def height(limits: tuple[float, float]) -> float:
        return math.log(limits[1] / limits[0]) if "y" in log else limits[1] - limits[0]

    return together if min(map(height, ranges)) >= 0.4 * height(together) else None


def _gap_limits(lines: Sequence[Line]) -> tuple[float, float] | None:
    """The y axis of a relative gap that leaves `GAPS`: it ends there. Before an attack the baseline
    shows next to nothing of the concept, and a ratio to next to nothing would squash all that
    follows.
    """
    found = _limits(lines, "")
    if found is None or (GAPS[0] <= found[0] and found[1] <= GAPS[1]):
        return None
    low, high = max(found[0], GAPS[0]), min(found[1], GAPS[1])
    return (low, high) if low < high else None  # nothing of it would be seen


def _limits(lines: Sequence[Line], log: str) -> tuple[float, float] | None:
    drawn = [
        v for line in lines for part in (line.y, line.low or (), line.high or ()) for v in part
    ]
    values = [v for v in drawn if v is not None and is_drawable(v, "y" in log)]
    if not values or min(values) == max(values):
        return None
    low, high = min(values), max(values)
    if "y" in log:
        room = (high / low) ** 0.06
        return low / room, high * room
    room = 0.06 * (high - low)
    return low - room, high + room


def _horizon(records: Sequence[Record]) -> tuple[float, str] | None:
    for record in records:
        budget = record["config"].get("budget")
        if isinstance(budget, dict) and isinstance(budget.get("horizon"), int):
            return float(budget["horizon"]), "1×"
    return None


def spectra(records: Sequence[Record], labels: Sequence[str], index: dict[str, int]) -> list[Shown]:
    """Singular values of the features, principal angles and the pencil, before (baseline) and
    after.
    """
    out = []
    for role in ("harmful", "benign"):
        lines = _table_lines("spectrum", "value", records, labels, index, role)
        title = f"Singular values of the features, {role} task"
        svg = lines_plot(lines, title=title, x="index", y="σ ÷ largest σ", log="y")
        out.append({"title": title, "svg": svg, "note": _first(records, "spectrum")})
    lines = _table_lines("principal_angles", "degrees", records, labels, index)
    title = "Principal angles between both tasks"
    svg = lines_plot(lines, title=title, x="index", y="degrees", limits=(-2.0, 92.0))
    out.append({"title": title, "svg": svg, "note": _first(records, "principal_angles")})
    lines = _table_lines("pencil", "value", records, labels, index)
    title = "Eigenvalues of the pencil (K harmful, K benign)"
    note = (
        f"The wider they spread, the more a linear map can immunize. {_first(records, 'pencil')}"
    ).rstrip()
    out.append(
        {
            "title": title,
            "svg": lines_plot(lines, title=title, x="index", y="λ", log="y"),
            "note": note,
        }
    )
    return [shown for shown in out if shown["svg"]]


def _first(records: Sequence[Record], table: str) -> str:
    """Which case and seed a figure of ``table`` shows, as these tables hold the first ones only."""
    rows = [row for record in records for row in record["tables"].get(table, [])]
    shown = dict.fromkeys(f"{row.get('case')}, seed {row.get('seed')}" for row in rows)
    return f"First case and seed only: {'; '.join(shown)}." if shown else ""


def _table_lines(
    table: str,
    value: str,
    records: Sequence[Record],
    labels: Sequence[str],
    index: dict[str, int],
    role: str | None = None,
) -> list[Line]:
    out: list[Line] = []
    for record, label in zip(records, labels, strict=True):
        rows = [r for r in record["tables"].get(table, []) if role is None or r.get("role") == role]
        for model_name in dict.fromkeys(r["model"] for r in rows):
            if model_name == BASELINE and any(line.index == 0 for line in out):
                continue
            mine = [r for r in rows if r["model"] == model_name]
            number = 0 if model_name == BASELINE else index[label]
            out.append(Line(label, number, [r["index"] for r in mine], [r[value] for r in mine]))
    return out


def heat_maps(records: Sequence[Record], labels: Sequence[str]) -> list[Shown]:
    """Mean RIR over seeds per (benign, harmful) pair, where there are at least three of each."""
    out = []
    for record, label in zip(records, labels, strict=True):
        found: dict[tuple[str, str], list[float]] = {}
        for row in record["tables"].get("pairs", []):
            if row.get("rir") is not None:
                found.setdefault((str(row["benign"]), str(row["task"])), []).append(row["rir"])
        rows, columns = (sorted({key[i] for key in found}, key=_natural) for i in (0, 1))
        if len(rows) < 3 or len(columns) < 3:
            continue
        cells = {k: sum(v) / len(v) for k, v in found.items()}
        above = sum(v > 1 for v in cells.values())
        short = _shared_prefix([*rows, *columns])
        svg: Markup = heat_map(
            [r[short:] for r in rows],
            [c[short:] for c in columns],
            {(r[short:], c[short:]): v for (r, c), v in cells.items()},
            title=f"RIR of {label} per pair of tasks",
            x="harmful task",
            y="benign task",
        )
        mean = sum(cells.values()) / len(cells)
        note = (
            f"{above} of {len(cells)} pairs above 1; mean {figure(mean)}, smallest "
            f"{figure(min(cells.values()))}."
        )
        out.append({"title": f"RIR per pair: {label}", "svg": svg, "note": note})
    return out


def _natural(text: str) -> tuple[str, int]:
    digits = re.search(r"\d+$", text)
    return (text[: digits.start()], int(digits[0])) if digits else (text, -1)


def _shared_prefix(names: Sequence[str]) -> int:
    """Length of the word before the number where all names are that word and a number (digit0 …
    digit9).
    """
    words = {_natural(n)[0] for n in names}
    return len(words.pop()) if len(words) == 1 and all(_natural(n)[1] >= 0 for n in names) else 0
