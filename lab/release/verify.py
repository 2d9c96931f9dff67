"""The layout of an exported folder, sums included, and its check (``action=verify``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from eval.report.outcomes import outcome
from lab.core import record as records
from lab.core.errors import UserError
from lab.core.hashing import file_hash, model_settings, state_hash
from lab.core.types import changed_tensors
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import DiffusionBackbone
from lab.scorers.clip import PICKLED

FORMAT, SUMS = "immunization-export-2", "SHA256SUMS"
FACTS, CARD, RECORD, DELTA = "export.json", "README.md", "record.json", "delta.safetensors"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# what git and a hub's client put beside the files of a repository; none of it is loaded
_FOREIGN = (".git/", ".cache/huggingface/")


# ---- SHA256SUMS


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        n: p
        for n, p in files.items()
        if n not in (SUMS, ".gitattributes") and not n.startswith(_FOREIGN)
    }


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` over every other file; ``sha256sum -c SHA256SUMS`` reads it."""
    lines = [f"{file_hash(path)}  {name}\n" for name, path in _files(folder).items()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Return file → SHA-256."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def find_differences(folder: Path) -> list[str]:
    """Name every file that is missing, altered, surplus, a link or a pickle."""
    listed, files = read_sums(folder), _files(folder)
    lines = [f"{name} is missing" for name in listed if name not in files]
    for name, path in files.items():
        if path.is_symlink():
            lines.append(f"{name} is a link; an exported folder has none")
        elif name not in listed:
            lines.append(f"{name} is surplus: {SUMS} does not list it")
        elif path.suffix in PICKLED:
            lines.append(f"{name} is a pickle, which could run code")
        elif file_hash(path) != listed[name]:
            lines.append(f"{name} was altered: its SHA-256 is not that of {SUMS}")
    return lines


# ---- the check


def verify(cfg: DictConfig) -> None:
    """Check the folder ``path``, or the working directory, and print what was checked.

    Raises:
        UserError: there is no such folder, or it is not what was exported; names the files.
    """
    folder = Path(cfg.path or ".").expanduser()
    checked = check(folder, cfg.export.base)
    print(f"verify: {folder}", *checked, sep="\n  ")
    partial = any("not checked" in line for line in checked)
    print("verified" + (", as far as it could be checked here" if partial else ""))


def check(folder: Path, base: str | None = None) -> list[str]:
    """Check hashes, record, layout, weights and delta; return a line about each.

    Args:
        base: folder or hub name of the published model, where the record's own path does not lead
            to it here.

    Raises:
        UserError: ``folder`` is not what was exported.
    """
    if not (folder / SUMS).is_file():
        raise UserError("path", folder, f"is no exported folder: there is no {SUMS} in it.")
    lines: list[str] = []
    try:
        if differences := find_differences(folder):
            raise ValueError("; ".join(differences))
        fingerprint = file_hash(folder / SUMS)[:16]
        lines.append(f"hashes: {len(read_sums(folder))} files; fingerprint {fingerprint}")
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        record = records.read(folder / RECORD)
        stage, line = find_stage(folder, facts, record)
        lines.append(f"record: {line}")
        model, tensors = load_export(folder, facts)
        lines.append(f"layout: {facts['kind']}, {len(tensors)} tensors")
        lines.append(f"weights: {check_weights(facts, stage, model, tensors)}")
        if model is not None:
            lines.append(f"delta: {check_delta(folder, facts, record, model, tensors, base)}")
    except (*_UNFIT, UserError) as error:
        step = STEPS[len(lines)]
        raise UserError("path", folder, f"is not what was exported: {step}: {error}.") from error
    return lines


STEPS = ("hashes", "record", "layout", "weights", "delta")  # each gives a line
_UNFIT = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
    SafetensorError,
)


def find_stage(
    folder: Path, facts: dict[str, Any], record: records.Record
) -> tuple[dict[str, Any], str]:
    """Return the immunization of ``record`` that the folder is about, and a line on it.

    Facts, record, images and card must be about this one.
    """
    card = (folder / CARD).read_text(encoding="utf-8")
    if facts.get("format") != FORMAT:
        raise ValueError(f"{FACTS} does not say format={FORMAT}; export it again")
    if not facts["content_hash"] == record["content_hash"] in card:
        raise ValueError(f"{FACTS} or {CARD} is about another run than {RECORD}")
    labels = {key: facts[key] for key in ("model", "case", "seed")}
    wanted = {"kind": "immunize", "key": facts["stage_key"], "status": "ok", **labels}
    stage = next((s for s in record["stages"] if wanted.items() <= s.items()), None)
    if stage is None:
        raise ValueError(f"{RECORD} has no finished immunization that {FACTS} names")
    for image in record.get("images", {}).values():
        if file_hash(folder / image["path"]) != image["sha256"]:
            raise ValueError(f"{image['path']} is not the image that {RECORD} names")
    line = f"{record['name']}, {labels}: {record['status']}"
    if f"**{outcome(record).headline}**" not in card:
        line += f"; {CARD} not checked: it states another verdict than this version, read {RECORD}"
    return stage, line


def load_export(
    folder: Path, facts: dict[str, Any]
) -> tuple[DiffusionModel | None, dict[str, Tensor]]:
    """Load the folder in diffusers, timm or safetensors.

    Returns:
        the text-to-image model in float32, if it is one, and the tensors of its U-Net or of the
        feature model in their own type.
    """
    if facts["kind"] == "diffusion":
        model = DiffusionBackbone(path=str(folder), device="cpu").build(None, 0)
        tensors: dict[str, Tensor] = {}
        for file in sorted((folder / "unet").glob("*.safetensors")):
            tensors |= load_file(file)
        return model, tensors
    if facts["kind"] == "deep":
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    return None, load_file(folder / WEIGHTS)


def check_weights(
    facts: dict[str, Any],
    stage: dict[str, Any],
    model: DiffusionModel | None,
    tensors: dict[str, Tensor],
) -> str:
    """Check that all weights are finite, and those that the facts and the record's stage name."""
    for name, tensor in (model.state_dict() if model else tensors).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds nan or inf")
    if state_hash(tensors) != facts["unet" if model else "weights"]:
        raise ValueError(f"the weights are not those that {FACTS} names")
    changed = {name: tensors[file] for name, file in facts["immunized"].items()}
    if stage.get("weights") not in (None, state_hash(changed)):  # None before schema 1.3
        raise ValueError(f"the weights are not those that {RECORD} measured")
    return f"finite, {len(changed)} tensors as the record has them"


def check_delta(
    folder: Path,
    facts: dict[str, Any],
    record: records.Record,
    model: DiffusionModel,
    tensors: dict[str, Tensor],
    base: str | None,
) -> str:
    """Check that original + delta = weights, and that only the U-Net differs from the original.

    Where nobody names ``base``, the record's own path may lead to another model, or to none.
    """
    config = record["config"]["backbone"]
    options = {key: config.get(key) for key in ("revision", "variant", "resolution")}
    path = base or config["path"]
    dtype = next(iter(tensors.values())).dtype
    with safe_open(folder / DELTA, "pt") as handle:
        expected = (handle.metadata() or {}).get("base")
    try:
        original = DiffusionBackbone(path=path, device="cpu", **options).build(None, 0).to(dtype)
        state = original.unet.state_dict()
        if state_hash(state) != expected:
            raise UserError("export.base", path, f"{DELTA} belongs to the base {expected}.")
    except UserError as error:
        if base is None:
            return f"not checked; name the original: export.base=DIR ({error})"
        raise
    hashes = [state_hash(state), state_hash(state | load_file(folder / DELTA))]
    if dtype == torch.float16:
        original.vae.float()  # as `lab.models.diffusion_backbone` does
    if hashes != [facts["base_unet"], facts["unet"]]:
        raise ValueError(f"unet is not the original plus {DELTA}")
    original.float()
    for name, part in model.named_children():
        if name != "unet" and changed_tensors(getattr(original, name), part):
            raise ValueError(f"{name} differs from the original's")
    if model_settings(model) != model_settings(original):
        raise ValueError("tokenizers, scheduler or configs differ from the original's")
    return f"original + {DELTA} = unet, bit for bit; all else is the original's"
