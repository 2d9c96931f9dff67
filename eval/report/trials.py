"""What records must share to be ranked: the same attackers with the same budget, on the same
cases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from eval.report.words import Record

_LISTED = 4  # cases that a title names
_SILENT = ("keep_weights", "families", "_target_")


class Place(NamedTuple):
    """Where records are comparable. ``trial`` is empty where all records of scenario and backbone
    share one.
    """

    scenario: str
    backbone: str
    trial: str

    @property
    def title(self) -> str:
        return f"{self.scenario} on {self.backbone}" + (f" · {self.trial}" if self.trial else "")


def trial(record: Record) -> str:
    """Attackers, budget, place of the data and cases, in words. Options of the attackers are a
    row's settings.
    """
    cases = sorted(
        {str(cell["case"]) for cell in record.get("cells", []) if cell["case"] is not None}
    )
    return " · ".join(
        [_asked(record), *([_listed(cases)] if cases and cases != [record["scenario"]] else [])]
    )


def terms(record: Record) -> dict[str, Any]:
    """Every option of the attackers and of the budget, but those that leave an attack as it is."""
    given = record["config"].get("attacks")
    attacks = given if isinstance(given, dict) else {}
    kept = {
        name: {k: v for k, v in options.items() if k not in _SILENT}
        if isinstance(options, dict)
        else options
        for name, options in attacks.items()
    }
    return {"attacks": kept, "budget": record["config"].get("budget")}


def _asked(record: Record) -> str:
    """The part of `trial` that a run which ended early has, too."""
    budget: dict[str, Any] = record["config"].get("budget") or {}
    horizon, multiple = budget.get("horizon"), budget.get("multiple")
    parts = [", ".join(sorted(record["attacks"])) or "not attacked"]
    if record["attacks"] and horizon is not None and multiple is not None:
        parts.append(f"{horizon} steps (1×) of {horizon * multiple}")
    scenario = record["config"].get("scenario")
    if isinstance(scenario, dict) and scenario.get("path") is not None:
        parts.append(f"data: {scenario['path']}")
    return " · ".join(parts)


def _listed(cases: Sequence[str]) -> str:
    """The cases by name; many of them by number, ends and a hash over all."""
    if len(cases) <= _LISTED:
        return f"case{'s' if len(cases) > 1 else ''} {', '.join(cases)}"
    digest = hashlib.sha256("\n".join(cases).encode()).hexdigest()[:6]
    return f"{len(cases)} cases {cases[0]} … {cases[-1]} ({digest})"


def groups(records: Sequence[Record]) -> dict[Place, list[Record]]:
    """Records by scenario, backbone and trial, in order of appearance: fewer attackers make a
    better worst case.

    A run that has no figures may not have come to its cases: it stands with the first others that
    were asked for the same, else with the first ones of its scenario and backbone.
    """
    trials: dict[tuple[str, str], dict[str, str]] = {}  # trial → what was asked for
    for record in records:
        known = trials.setdefault((record["scenario"], record["backbone"]), {})
        if record["metrics"]:
            known[trial(record)] = _asked(record)
    out: dict[Place, list[Record]] = {}
    for record in records:
        scenario, backbone = record["scenario"], record["backbone"]
        known = trials[scenario, backbone]
        alike = [name for name, asked in known.items() if asked == _asked(record)]
        own = trial(record) if record["metrics"] else next(iter([*alike, *known]), "")
        out.setdefault(Place(scenario, backbone, own if len(known) > 1 else ""), []).append(record)
    return out
