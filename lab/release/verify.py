"""The layout of an exported folder, and its check (``action=verify``), from bytes to weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eval.report.outcomes import outcome
from lab.core import record as records
from lab.core.errors import UserError
from lab.core.fingerprint import model_settings
from lab.core.hashing import state_hash
from lab.core.types import same_weights
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import DiffusionBackbone

FORMAT, SUMS = "immunization-export-2", "SHA256SUMS"
FACTS, CARD, RECORD, DELTA = "export.json", "README.md", "record.json", "delta.safetensors"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
# what git and a hub's client put beside the files of a repository; none of it is loaded
_FOREIGN = (".git/", ".gitattributes", ".cache/huggingface/")


# ---- SHA256SUMS


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*"))}
    return {
        name: path
        for name, path in files.items()
        if (path.is_symlink() or path.is_file()) and name != SUMS and not name.startswith(_FOREIGN)
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
        elif path.suffix in _PICKLES:
            lines.append(f"{name} is a pickle, which could run code")
        elif file_hash(path) != listed[name]:
            lines.append(f"{name} was altered: its SHA-256 is not that of {SUMS}")
    return lines


# ---- the check


class NotChecked(Exception):
    """What a step could not check here."""


@dataclass
class Report:
    """What was checked: lines of (``ok`` | ``FAILED`` | ``not checked``, step, message)."""

    folder: Path
    lines: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def failed(self) -> str | None:
        """The message of the step that failed."""
        return next((text for state, _, text in self.lines if state == "FAILED"), None)

    def text(self) -> str:
        return "\n".join(f"  {state:<11}  {step:<9}  {text}" for state, step, text in self.lines)

    def require(self) -> None:
        """Raise `UserError` with the files at fault."""
        if self.failed:
            raise UserError("path", self.folder, f"is not what was exported: {self.failed}.")


def verify(cfg: DictConfig) -> None:
    """Check the folder ``path``, or the working directory, and print what was checked.

    Raises:
        UserError: there is no such folder, or it is not what was exported; names the files.
    """
    report = check(Path(cfg.path or ".").expanduser(), cfg.export.base)
    print(f"verify: {report.folder}\n{report.text()}")
    report.require()
    is_partial = any(state == "not checked" for state, *_ in report.lines)
    print("verified" + (", as far as it could be checked here" if is_partial else ""))


def check(folder: Path, base: str | None = None) -> Report:
    """Check hashes, record, layout, weights and delta, up to the first step that fails.

    Args:
        base: folder or hub name of the published model, where the record's own path does not lead
            to it here.

    Raises:
        UserError: ``folder`` is no folder or holds no ``SHA256SUMS``.
    """
    if not (folder / SUMS).is_file():
        raise UserError("path", folder, f"is no exported folder: there is no {SUMS} in it.")
    report, export = Report(folder), _Export(folder, base)
    steps = {
        "hashes": export.check_hashes,
        "record": export.check_record,
        "layout": export.check_layout,
        "weights": export.check_weights,
        "delta": export.check_delta,
    }
    for name, step in steps.items():
        try:
            message = step()
        except NotChecked as reason:
            report.lines.append(("not checked", name, str(reason)))
        except (
            UserError,
            OSError,
            ValueError,
            LookupError,
            RuntimeError,
            SafetensorError,
        ) as error:
            message = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            report.lines.append(("FAILED", name, message))
            break
        else:
            report.lines += [("ok", name, message)] if message else []
    return report


@dataclass
class _Export:
    """An exported folder; each check returns what it found to be right and feeds the next one."""

    folder: Path
    base: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    record: records.Record = field(default_factory=dict)
    cell: dict[str, Any] = field(default_factory=dict)  # of the record, about these weights
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of the files, in their type
    model: DiffusionModel | None = None  # the same in float32

    def check_hashes(self) -> str:
        if lines := find_differences(self.folder):
            raise ValueError("; ".join(lines))
        fingerprint = file_hash(self.folder / SUMS)[:16]
        return f"{len(read_sums(self.folder))} files; fingerprint of {SUMS}: {fingerprint}"

    def check_record(self) -> str:
        """Facts, record and card are about one immunization, which has weights."""
        facts = self.facts = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
        self.record = records.read(self.folder / RECORD)
        card = (self.folder / CARD).read_text(encoding="utf-8")
        if facts["format"] != FORMAT:
            raise ValueError(f"{FACTS} does not say format={FORMAT}; export it again")
        if not facts["content_hash"] == self.record["content_hash"] in card:
            raise ValueError(f"{FACTS} or {CARD} is about another run than {RECORD}")
        labels = {key: facts[key] for key in ("model", "case", "seed")}
        wanted = {"stage": "immunize", "key": facts["stage_key"], "status": "ok", **labels}
        cells = [c for c in self.record["cells"] if wanted.items() <= c.items()]
        if not cells:
            raise ValueError(f"{RECORD} has no finished immunization that {FACTS} names")
        self.cell = cells[0]
        for image in self.record.get("images", {}).values():
            if file_hash(self.folder / image["path"]) != image["sha256"]:
                raise ValueError(f"{image['path']} is not the image that {RECORD} names")
        if f"**{outcome(self.record).headline}**" not in card:
            raise NotChecked(f"{CARD} states another verdict than this version; read {RECORD}")
        return f"{self.record['name']}, {labels}: {self.record['status']}"

    def check_layout(self) -> str:
        """The folder loads in diffusers, timm or safetensors."""
        if self.facts["kind"] == "diffusion":
            self.model = DiffusionBackbone(path=str(self.folder), device="cpu").build(None, 0)
            for file in sorted((self.folder / "unet").glob("*.safetensors")):
                self.tensors |= load_file(file)
            return f"diffusers loads it as {self.facts['pipeline']}"
        self.tensors = load_file(self.folder / WEIGHTS)
        if self.facts["kind"] == "deep":
            timm.create_model(f"local-dir:{self.folder}", pretrained=True)
        return f"{len(self.tensors)} tensors"

    def check_weights(self) -> str:
        """All weights are finite, and those that the facts and the record's stage name."""
        for name, tensor in (self.model.state_dict() if self.model else self.tensors).items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} holds nan or inf")
        digest = self.facts["unet" if self.model else "weights"]
        if state_hash(self.tensors) != digest:
            raise ValueError(f"the weights are not those that {FACTS} names")
        changed = {name: self.tensors[file] for name, file in self.facts["immunized"].items()}
        if self.cell.get("weights") not in (None, state_hash(changed)):  # None before schema 1.3
            raise ValueError(f"the weights are not those that {RECORD} measured")
        return f"finite, {len(changed)} tensors as the record has them; SHA-256 {digest[:16]}"

    def check_delta(self) -> str | None:
        """Original + delta = weights, and nothing beside the U-Net differs from the original."""
        if self.model is None:
            return None
        changed = load_file(self.folder / DELTA)
        for name, tensor in changed.items():
            if not torch.equal(tensor, self.tensors[name]):
                raise ValueError(f"{DELTA} holds another {name} than unet")
        original = self._load_original(next(iter(self.tensors.values())).dtype)
        original.unet.load_state_dict({**original.unet.state_dict(), **changed})
        if state_hash(original.unet.state_dict()) != self.facts["unet"]:
            raise ValueError(f"unet is not the original plus {DELTA}")
        original.float()
        for name, part in self.model.named_children():
            if not same_weights(part, getattr(original, name)):
                raise ValueError(f"{name} differs from the original's")
        if model_settings(self.model) != model_settings(original):
            raise ValueError("tokenizers, scheduler or configs differ from the original's")
        parts = f"{len(changed)} of {len(self.tensors)} tensors"
        return f"original + {parts} = unet, bit for bit; all other parts are the original's"

    def _load_original(self, dtype: torch.dtype) -> DiffusionModel:
        """Load the published model, in the type of the export."""
        config = self.record["config"]["backbone"]
        options = {key: config.get(key) for key in ("revision", "variant", "resolution")}
        path = self.base or config["path"]
        failure = NotChecked if self.base is None else ValueError
        try:
            model = DiffusionBackbone(path=path, device="cpu", **options).build(None, 0).to(dtype)
        except UserError as error:
            raise failure(f"name the original: export.base=DIR ({error})") from error
        if dtype == torch.float16:
            model.vae.float()  # as `lab.models.diffusion_backbone` does
        if state_hash(model.unet.state_dict()) != self.facts["base_unet"]:
            raise failure(f"name the original: export.base=DIR ({path} has other weights)")
        return model
