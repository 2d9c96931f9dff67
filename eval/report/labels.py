"""What tells records apart: their settings, and a short label for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from eval.report.words import Record
from lab.core.record import VOLATILE_CONFIG

_SILENT = {*VOLATILE_CONFIG, "experiment_name"}  # top-level keys that set no record apart
_SHOWN = 6  # settings in a label
_MISSING = object()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay values."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def settings(record: Record) -> dict[str, Any]:
    """What was asked for, without what cannot change a result."""
    return {k: v for k, v in flatten(record["config"]).items() if k.split(".")[0] not in _SILENT}


def labels(records: Sequence[Record]) -> list[str]:
    """One label per record, all different: the immunizer, plus the settings that set the record
    apart.

    Records of one immunizer in one study are rivals. A setting that most rivals share is the
    study's common one and is named only where a record deviates from it, so that an ablation which
    changes one thing at a time is labelled by that thing; a setting without a majority (a grid) is
    named everywhere.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault((_study(record), record["immunizer"]), []).append(i)
    out = [""] * len(records)
    for places in groups.values():
        for i, label in zip(places, _within([records[i] for i in places]), strict=True):
            out[i] = label
    for form in ("{label} ({study})", "{label} · {hash}"):  # the second: the same settings twice
        counts = Counter(out)
        out = [
            label
            if counts[label] == 1
            else form.format(label=label, study=_study(record), hash=record["content_hash"][:7])
            for label, record in zip(out, records, strict=True)
        ]
    return out


def _study(record: Record) -> str:
    return str(record["name"]).rpartition("/")[0] or str(record["name"])


def _within(rivals: Sequence[Record]) -> list[str]:
    """Labels of records of one immunizer and study; equal where nothing but chance sets them
    apart.
    """
    immunizer = rivals[0]["immunizer"]
    flat = [settings(r) for r in rivals]
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if not k.endswith("_target_")]
    keys = [k for k in keys if len({_known(f, k) for f in flat}) > 1]
    common = {k: _majority([_known(f, k) for f in flat]) for k in keys}
    own = [[k for k in keys if common[k] is None or _known(f, k) != common[k]] for f in flat]
    shown = [_collapsed(mine, f, flat) for mine, f in zip(own, flat, strict=True)]
    names = short_names({key for pairs in shown for key, _ in pairs})
    out = []
    for pairs in shown:
        parts = [f"{names[key]}={value}" for key, value in pairs]
        more = [f"{len(parts) - _SHOWN} more"] if len(parts) > _SHOWN + 1 else []
        parts = parts[:_SHOWN] + more if more else parts
        out.append(" · ".join([immunizer, *parts]))
    if len(rivals) > 2 and out.count(immunizer) == 1:  # the one that deviates in nothing
        out[out.index(immunizer)] = f"{immunizer} · common settings"
    return out


def _known(flat: dict[str, Any], key: str) -> str:
    return repr(flat.get(key, _MISSING))


def _majority(values: Sequence[str]) -> str | None:
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else None


def _collapsed(
    keys: Sequence[str], mine: dict[str, Any], rivals: Sequence[dict[str, Any]]
) -> list[tuple[str, str]]:
    """(key, value as text); a group of options that stands where rivals have one value is named by
    its members.
    """
    out: dict[str, str] = {}
    for key in (k for k in keys if k in mine):
        parents = [key.rsplit(".", n)[0] for n in range(key.count("."), 0, -1)]
        group = next((p for p in parents if any(p in r for r in rivals)), None)
        if group is None:
            out[key] = typed(mine[key])
        else:
            members = [
                k[len(group) + 1 :].split(".")[0]
                for k in keys
                if k.startswith(f"{group}.") and k in mine
            ]
            out[group] = "+".join(dict.fromkeys(members))
    return list(out.items())


def typed(value: Any) -> str:
    """As it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(typed, value))}]" if isinstance(value, list) else str(value)


def short_names(keys: set[str]) -> dict[str, str]:
    """Every dotted key by its shortest ending that no other key has."""
    out = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        out[key] = next(
            (
                e
                for e in endings
                if not any(k != key and (k == e or k.endswith(f".{e}")) for k in keys)
            ),
            key,
        )
    return out
