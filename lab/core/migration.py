"""Bring records of older schemas to the current names."""

from __future__ import annotations

import re
from typing import Any

from lab.core.types import BASELINE, IMMUNIZED

Record = dict[str, Any]

# import path of a module in records of schema 1.x → its path now
_MODULES = {
    "attacks.concept_curriculum": "attacks.diffusion.curriculum",
    "attacks.concept_custom_diffusion": "attacks.diffusion.custom_diffusion",
    "attacks.concept_dreambooth": "attacks.diffusion.dreambooth",
    "attacks.concept_full_finetune": "attacks.diffusion.full_finetune",
    "attacks.concept_lora": "attacks.diffusion.lora",
    "attacks.concept_textual_inversion": "attacks.diffusion.textual_inversion",
    "attacks.finetune": "attacks.finetune.full",
    "attacks.linear_probe": "attacks.probes.linear_probe",
    "attacks.lora": "attacks.finetune.lora",
    "eval.audit": "eval.generation.audit",
    "eval.concept_verdict": "eval.generation.concept_verdict",
    "eval.conditioning": "eval.features.conditioning",
    "eval.convergence": "eval.features.convergence",
    "eval.generation": "eval.generation.similarity",
    "eval.geometry": "eval.features.geometry",
    "eval.probe_accuracy": "eval.features.probe_accuracy",
    "eval.relearning": "eval.generation.relearning",
    "eval.transfer": "eval.features.transfer",
    "eval.utility": "eval.generation.utility",
    "eval.verdict": "eval.features.verdict",
    "immunize.closed_form": "immunize.kappa.closed_form",
    "immunize.kappa": "immunize.kappa.method",
    "immunize.mima": "immunize.mima.method",
    "lab.backbones.diffusion": "lab.models.diffusion_backbone",
    "lab.backbones.linear": "lab.models.linear",
    "lab.backbones.vision": "lab.models.vision",
    "lab.erase": "lab.models.erase",
    "lab.judges.clip": "lab.scorers.clip",
    "lab.judges.detector": "lab.scorers.detector",
    "lab.judges.features": "lab.scorers.features",
    "lab.judges.load": "lab.scorers.load",
    "lab.judges.lpips": "lab.scorers.features",
    "lab.judges.nudenet": "lab.scorers.detector",
    "lab.scenarios.folders": "lab.scenarios.vision",
    "lab.scenarios.personalize": "lab.scenarios.world_concepts",
    "lab.scenarios.relearn": "lab.scenarios.world_concepts",
}
# classes that left the module of their neighbours
_TARGETS = {
    "lab.judges.load.shipped_clip": "lab.scorers.clip.OpenClip",
    "lab.judges.load.shipped_detector": "lab.scorers.detector.load_detector",
    "immunize.mima.MimaDeep": "immunize.mima.deep.MimaDeep",
}
_CLASSES = {"FeatureJudge": "FeatureScorer", "Judges": "Scorers"}
# config key in schema 1.x → its name now
_KEYS = {
    "arm": "model",
    "beta": "lr",
    "beta_schedule": "lr_schedule",
    "eta": "lr",
    "eta_schedule": "lr_schedule",
    "judges": "scorers",
    "lower": "inner_loop",
    "lower_batch_size": "inner_batch_size",
}
# config key or column of a table up to schema 2.2 → its name now
_KEYS_2_2 = {
    "kept": "keep_samples",
    "keep_pictures": "keep_images",
    "pictures": "images",
    "sure": "significant",
    "targeted": "target_samples",
    "unrelated_pictures": "unrelated_images",
}
_WORDS = {"control arm": "baseline", "control": "baseline", "arm": "model", "pictures": "images"}
_UNITS = (
    ("usable", "prompt_adherent"),
    ("control", "baseline"),
    ("judged", "scored"),
    ("lower_drop", "inner_loop_drop"),
    ("lower_steps", "inner_loop_steps"),
    ("upper_loss", "outer_loss"),
)


def migrate(record: Record) -> Record:
    """Return ``record`` in the current schema; the input is left untouched.

    Schema 1.x has other names and no ``bound``. Up to 2.1 checks have no ``result``. Up to 2.0 the
    models were called ``none`` and by the immunizer's name, since 2.1 ``baseline`` and
    ``immunized``. Up to 2.1 MiniSD was its first version, whose figures do not compare with those
    of the second: it is called ``minisd_1``. Up to 2.2 some options and columns had other names.
    Up to 2.3 an inconclusive verdict was 0; it has no value. Up to 2.4 stages were called cells.
    """
    version = str(record.get("schema", ""))
    if version.startswith("1."):
        record = _rename_keys(record)
    if version.startswith("1.") or version == "2.0":
        record = _name_models(record)
    if version.startswith("1.") or version in ("2.0", "2.1"):
        first = {"backbone": "minisd_1"} if record["backbone"] == "minisd" else {}
        record = _add_results(record | {"schema": "2.2"} | first)
    if record.get("schema") == "2.2":
        record = record | {
            "schema": "2.3",
            "name": record["name"].replace("class_picture_options", "class_image_options"),
            "config": _renamed(record["config"]),
            "tables": {
                name: _renamed(rows) if name in ("audit", "verdict") else rows
                for name, rows in record["tables"].items()
            },
        }
    if record.get("schema") == "2.3":
        verdict = record["metrics"].get("verdict", {"note": None})
        if str(verdict["note"]).startswith("inconclusive"):
            metrics = record["metrics"] | {"verdict": verdict | {"value": None}}
            record = record | {"metrics": metrics}
        record = record | {"schema": "2.4"}
    if record.get("schema") == "2.4":
        stages = [
            {"kind" if k == "stage" else k: v for k, v in cell.items()} for cell in record["cells"]
        ]
        others = {k: v for k, v in record.items() if k != "cells"}
        record = others | {"schema": "2.5", "stages": stages}
    return record


def _rename_keys(record: Record) -> Record:
    out = dict(record) | {"config": _config(record["config"])}
    out["cells"] = [_cell(cell) for cell in record["cells"]]
    out["metrics"] = {
        current_name(k): v | {"note": _text(v["note"]), "bound": _bound(v["note"])}
        for k, v in record["metrics"].items()
    }
    out["curves"] = {
        current_name(k): {key: _text(line) for key, line in curve.items()}
        for k, curve in record["curves"].items()
    }
    out["tables"] = {
        current_name(k): [_row(r) for r in rows] for k, rows in record["tables"].items()
    }
    out["notes"] = [_text(note) for note in record["notes"]]
    out["skipped"] = {name: _text(reason) for name, reason in record["skipped"].items()}
    return out


def _name_models(record: Record) -> Record:
    names = {record["immunizer"]: IMMUNIZED, "none": BASELINE}

    def named(row: dict[str, Any]) -> dict[str, Any]:
        new = {"model": names.get(row["model"], row["model"])} if "model" in row else {}
        before, separator, attacks = str(row.get("note") or "").partition("best attackers: ")
        if separator:
            words = " ".join(names.get(word, word) for word in attacks.split(" "))
            new["note"] = f"{before}strongest attacks: {words}"
        return row | new

    def series(key: str) -> str:
        model, colon, limit = key.partition(":")
        return f"{names.get(model, model)}{colon}{limit}"

    return record | {
        "cells": [named(cell) for cell in record["cells"]],
        "metrics": {k: named(metric) for k, metric in record["metrics"].items()},
        "curves": {k: {series(s): v for s, v in c.items()} for k, c in record["curves"].items()},
        "tables": {k: [named(row) for row in rows] for k, rows in record["tables"].items()},
    }


def _renamed(node: Any) -> Any:
    if isinstance(node, dict):
        return {_KEYS_2_2.get(k, k): _renamed(v) for k, v in node.items()}
    return [_renamed(item) for item in node] if isinstance(node, list) else node


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a stage; the name of a metric stood under ``attack`` before."""
    new = {_KEYS.get(k, k): v for k, v in cell.items()} | {"metric": None}
    return new | {"metric": cell["attack"], "attack": None} if cell["stage"] == "eval" else new


def target(path: str) -> str:
    """Return the import path of a class as it is now."""
    module, _, name = path.rpartition(".")
    return _TARGETS.get(path, f"{_MODULES.get(module, module)}.{_CLASSES.get(name, name)}")


def _config(node: Any, key: str = "") -> Any:
    if isinstance(node, dict):
        lora = "rank" in node and "targets" in node  # an attacker's own alpha stays
        inner = (
            {"alpha": "lr", "rest": "secondary_optimizer"} if key == "lower" and not lora else {}
        )
        return {
            inner.get(k, _KEYS.get(k, k)): target(v) if k == "_target_" else _config(v, k)
            for k, v in node.items()
            if (key, k) != ("hypergradient", "product")  # an option that is gone
        }
    return [_config(item) for item in node] if isinstance(node, list) else node


def current_name(name: str) -> str:
    """Return the name of a metric, curve, table or column as it is now."""
    for old, new in _UNITS:
        name = re.sub(rf"(?<![a-z]){old}(?![a-z])", new, name)
    return name


def _text(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    for old, new in _WORDS.items():
        text = re.sub(rf"\b{old}\b", new, text)
    return text.replace("usable", "prompt-adherent").replace("judge", "scorer")


def _bound(note: str | None) -> str | None:
    match = re.match("at (least|most)", note or "")
    return {"least": "lower", "most": "upper"}[match[1]] if match else None


def _row(row: dict[str, Any]) -> dict[str, Any]:
    out = {"model" if k == "arm" else current_name(k): _text(v) for k, v in row.items()}
    if "required" in row:  # a check of a verdict
        out["bound"] = _bound(row["note"])
    return out


def _add_results(record: Record) -> Record:
    """Add ``result`` to checks, and the word of the verdict to its note, where they are missing."""
    checks = record["tables"].get("verdict", [])
    verdict = record["metrics"].get("verdict")
    if verdict is None or all("result" in check for check in checks):
        return record
    checks = [check | {"result": result_of(check)} for check in checks]
    words = {check["result"] for check in checks}
    is_open = "inconclusive" in words and "fails" not in words and record["status"] == "ok"
    word = "passes" if verdict["value"] else "inconclusive" if is_open else "fails"
    verdict = verdict | {"note": f"{word}. {verdict['note']}"}
    return record | {
        "metrics": record["metrics"] | {"verdict": verdict},
        "tables": record["tables"] | {"verdict": checks},
    }


def result_of(check: Record) -> str:
    """Return passes, fails or inconclusive, which checks up to schema 2.1 do not say: inconclusive
    is what was not measured everywhere, and a limit that leaves it open on which side of the
    threshold the figure lies.
    """
    if check["passed"]:
        return "passes"
    is_floor = check["required"].startswith(("≥", "interval above"))
    value = check["low"] if check["required"].startswith("interval") else check["value"]
    if value is None or check.get("bound") == ("lower" if is_floor else "upper"):
        return "inconclusive"
    threshold = float(check["required"].split()[-1])
    holds = value > threshold if is_floor else value < threshold
    return "inconclusive" if holds else "fails"
