"""`action=export`: one immunized model of a record in an open layout, with delta, model card,
record and hashes.

A text-to-image model becomes a diffusers pipeline, a timm network a folder that timm loads, a
linear extractor one matrix. Nobody needs this project to load them. `lab.release.verify` checks
such a folder again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save
from torch import Tensor

from lab.core import record as records
from lab.core.errors import UserError
from lab.core.hashing import write_atomically
from lab.core.options import names
from lab.core.provenance import versions
from lab.core.record import Record
from lab.core.types import Model
from lab.models.diffusion import DiffusionModel
from lab.models.linear import LinearExtractor
from lab.models.vision import VisionBackbone
from lab.release.attack import export_attack
from lab.release.card import card
from lab.release.checksums import SUMS, sha256, write_sums
from lab.release.delta import save_delta, state_hash
from lab.release.source import Choice, Models, backbone_of, choose, rebuild, target

FORMAT = "immunization-export-1"
FACTS, CARD, RECORD, DELTA = "export.json", "README.md", "record.json", "delta.safetensors"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_PRIVATE = ("host",)  # of a record's provenance; paths go too. Neither is part of the content hash
_PACKAGES = ("immunization-bench", "torch", "diffusers", "transformers", "timm", "safetensors")


def export(cfg: DictConfig) -> Path:
    """Write what ``records`` and ``export`` choose to ``path``, a model or an attack; check a
    model, push it if asked.

    Raises:
        UserError: not exactly one record, a choice that does not exist, weights or originals that
            are not there, a target folder that is not empty, a repository that cannot be pushed to.
    """
    from lab.release.push import ready
    from lab.release.verify import check
    from lab.runner.experiment import relative

    if not OmegaConf.is_dict(cfg.export):
        raise UserError(
            "export",
            cfg.export,
            "is a group: export.model, export.case, export.seed, export.attack ….",
        )
    attack = cfg.export.attack is not None or cfg.export.task is not None
    push = (
        None if cfg.push_to is None or attack else ready(str(cfg.push_to))
    )  # a missing token shows before any work
    places = [*names("records", cfg.records)]
    if not places:
        raise UserError(
            "records",
            "[]",
            "name the record of the run to export, e.g. records=outputs/runs/…/record.json.",
        )
    found = records.find(places, Path(cfg.paths.runs))
    if len(found) != 1:
        raise UserError(
            "records", f"{len(found)} records", "export needs exactly one: records=RUN/record.json."
        )
    record = records.read(found[0])
    if attack:
        folder = export_attack(record, cfg)
        print(f"export: {relative(folder)}")
        return folder
    chosen = choose(record, cfg.export)
    folder = target(cfg, _name(record, chosen))
    write(record, chosen, rebuild(record, chosen, cfg), folder)
    report = check(folder, base=cfg.export.base)
    report.require()
    print(report.text())
    print(f"export: {relative(folder)}")
    if push is not None:
        print(f"pushed: {push.upload(folder)}")
    return folder


def _name(record: Record, chosen: Choice) -> str:
    """A folder name that tells models of one record, and equal choices of two records, apart."""
    plain = re.sub(
        r"[^\w.-]+",
        "-",
        f"{record['name'].split('/')[0]}-{chosen.model_name}-{chosen.case}-seed{chosen.seed}",
    )
    return f"{plain}-{record['content_hash'][:8]}"


def write(record: Record, chosen: Choice, models: Models, folder: Path) -> None:
    """All files of an export; ``folder`` appears complete or not at all, unless it is the working
    directory.
    """
    folder = folder.resolve()  # `.` has no name
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        if isinstance(models.released, DiffusionModel):
            facts = _write_diffusion(models, partial)
        else:
            facts = _write_features(record, models.released, partial)
        kept = _write_record(record, partial)
        facts |= {
            "format": FORMAT,
            "model": chosen.model_name,
            "case": chosen.case,
            "seed": chosen.seed,
            "stage_key": chosen.key,
            "content_hash": kept["content_hash"],
            "versions": versions(_PACKAGES),
        }
        _json(partial / FACTS, facts)
        write_atomically(partial / CARD, card(kept, chosen, models, facts).encode())
        write_sums(partial)
        if (
            folder == Path.cwd()
        ):  # it has to stay, others may be in it; without the sums it verifies as nothing
            for path in sorted(partial.iterdir(), key=lambda p: p.name == SUMS):
                os.rename(path, folder / path.name)
            return
        if folder.is_dir():
            folder.rmdir()  # it is empty
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


# ---- weights


def _write_diffusion(models: Models, folder: Path) -> dict[str, Any]:
    released, published = models.released, models.published
    old = published.state_dict()
    beside = [
        k
        for k, v in released.state_dict().items()
        if not k.startswith("unet.") and not torch.equal(v, old[k])
    ]
    if beside:
        told = f"changed {beside[0]}, which lies outside the U-Net: the delta does not cover that."
        raise UserError("immunize", "export", told)
    for tokenizer in released.tokenizers:  # else they save the padding of their last call
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
    released.save(folder)
    _forget_places(folder)
    save_delta(published, released, folder / DELTA)
    state = released.unet.state_dict()
    return {
        "kind": "diffusion",
        "pipeline": released.pipeline_class,
        "unet": state_hash(state),
        "base_unet": state_hash(published.unet.state_dict()),
        "changed": {
            "tensors": sum(not torch.equal(v, old[f"unet.{k}"]) for k, v in state.items()),
            "of": len(state),
            "by_the_immunizer": _changed(models.original.unet, released.unet),
        },
    }


def _forget_places(folder: Path) -> None:
    """Drop where on this machine each part was loaded from, which diffusers writes into its
    configs.
    """
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _changed(before: torch.nn.Module, after: torch.nn.Module) -> int:
    old = before.state_dict()
    return sum(not torch.equal(v, old[k]) for k, v in after.state_dict().items())


def _write_features(record: Record, model: Model, folder: Path) -> dict[str, Any]:
    if isinstance(model, LinearExtractor):
        tensors = {"theta": model.theta}
        config: dict[str, Any] = {
            "kind": "linear",
            "dtype": "float64",
            "theta": list(model.theta.shape),
        }
        config["features"] = "x @ theta, x [n, d] prepared as README.md says"
    else:
        tensors, config = _timm(record, model)
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomically(folder / WEIGHTS, save(plain, {"format": "pt"}))
    _json(folder / CONFIG, config)
    return {
        "kind": "linear" if isinstance(model, LinearExtractor) else "deep",
        "weights": state_hash(plain),
    }


def _timm(record: Record, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under timm's names and the config by which ``timm.create_model("local-dir:DIR")``
    finds them.
    """
    backbone = backbone_of(record)
    if not isinstance(backbone, VisionBackbone):
        told = (
            "is no linear extractor and no timm network; there is no open layout to export it to."
        )
        raise UserError("backbone", record["backbone"], told)
    names, state = backbone.timm_names(), model.state_dict()
    size = model.size or 224
    fixed = bool(getattr(timm.get_pretrained_cfg(backbone.model), "fixed_input_size", False))
    config = {
        "model_args": {"img_size": size} if fixed else {},
        "architecture": backbone.model.split(".")[0],
        "num_classes": 0,
        "num_features": model.feature_dim,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",  # as measured: resized without a crop
            "num_classes": 0,
        },
    }
    return {names[k]: v for k, v in state.items()}, config


# ---- record


def _write_record(record: Record, folder: Path) -> Record:
    """The record without the names of the machine and its folders, and its pictures; the content
    hash stays.
    """
    kept = json.loads(json.dumps(record))
    kept["provenance"] |= dict.fromkeys(_PRIVATE, "removed")
    kept["config"] |= {k: "removed" for k in ("paths", "records") if k in kept["config"]}
    for name, image in kept.get("images", {}).items():
        source = Path(getattr(record, "folder", ".")) / image["path"]
        if not source.is_file() or sha256(source) != image["sha256"]:
            raise UserError(
                "records",
                source,
                f"picture {name} of the record is missing or altered; run it again.",
            )
        (folder / image["path"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / image["path"])
    records.write(kept, folder / RECORD)
    if kept["content_hash"] != record["content_hash"]:
        raise RuntimeError("the content hash must not depend on host and paths")
    return kept
