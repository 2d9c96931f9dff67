"""How much of what ignorance is worth a method attains: its slowdown beside that of a model that
never saw the targets.
"""

from __future__ import annotations

import math

from eval.report.words import Record
from lab.core.slugs import slug

REFERENCE = "retrained"  # conf/immunize/retrained.yaml


def _logs(record: Record) -> dict[str, float]:
    """Return target → logarithm of its slowdown, by usable attacks where they were measured."""
    rows, metrics = record["tables"].get("relearning", []), record["metrics"]
    found = {}
    for target in sorted({row["concept"] for row in rows if row.get("role") == "harmful"}):
        names = (f"steps_to_relearn_{kind}_{slug(target)}" for kind in ("usable_ratio", "ratio"))
        values = [metrics[name]["value"] for name in names if name in metrics]
        if values and values[0]:
            found[target] = math.log(values[0])
    return found


def shares(record: Record, reference: Record) -> dict[str, float]:
    """Return target → log slowdown of ``record`` ÷ log slowdown of ``reference``.

    1 is as slow as a model that never saw the target; more is possible. Targets that the reference
    learns as fast as the baseline are left out.
    """
    own, theirs = _logs(record), _logs(reference)
    return {name: own[name] / log for name, log in theirs.items() if log > 0 and name in own}


def least_share(record: Record, reference: Record) -> str:
    """Return the least of `shares` with its target, as text; empty where there is none."""
    found = shares(record, reference)
    if not found:
        return ""
    name = min(found, key=lambda key: found[key])
    return f"{found[name]:.2f} ({name})"
