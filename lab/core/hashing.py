"""Hash what a run computes and what from, and write files that are whole or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lab.core.data import ConceptCase, Sampling
from lab.core.types import AnyCase, AnyTask, FeatureModel, Model


def digest(*tensors: Tensor) -> str:
    """Return the SHA-256 of shapes, types and bytes of ``tensors``."""
    sha = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        sha.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        sha.update(flat.view(torch.uint8).numpy().data if flat.ndim else str(flat.item()).encode())
    return sha.hexdigest()


def state_hash(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, in the order of the names.

    It is the same on every device.
    """
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        total.update(struct.pack("<Q", len(head)) + head)
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below ``folder``, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def folder_hash(folder: Path) -> str:
    """Return the SHA-256 of names and bytes of all files below ``folder``."""
    return stage_key(**file_hashes(folder))


def stage_key(**inputs: Any) -> str:
    """Return the SHA-256 of the canonical JSON of ``inputs``."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds the old or the new bytes, never a part of them.

    A temporary file in the same folder is synchronised and then renamed.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temp, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of ``folder`` in the end, all of it in one rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _plain(value: Any, tensors: list[Tensor], derived: bool) -> Any:
    """Return ``value`` as JSON; a tensor in it moves to ``tensors`` and leaves its number."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"tensor {len(tensors)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name), tensors, derived)
            for f in dataclasses.fields(value)
            if derived or not f.metadata.get("derived")
        }
    if isinstance(value, tuple | list):
        return [_plain(item, tensors, derived) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, tensors, derived) for key, item in value.items()}
    return value


def fingerprint(case: AnyCase | AnyTask, derived: bool = True) -> str:
    """Return the SHA-256 of everything that a case holds: images or rows, labels, prompts, roles.

    ``derived``: what follows from the rest counts too (fields that say so), as it has to for a
        cached stage.
    """
    tensors: list[Tensor] = []
    return stage_key(case=_plain(case, tensors, derived), tensors=digest(*tensors))


def without_sampling(case: AnyCase) -> AnyCase:
    """Return ``case`` as erasers and immunizers see it: with the default `Sampling`.

    How images are generated is the attacks' and the metrics' business, so that other sampling steps
    do not immunize again.
    """
    return dataclasses.replace(case, sampling=Sampling()) if isinstance(case, ConceptCase) else case


# parts of a tokenizer; its padding changes with use
_TOKENIZER = ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")
# entries of a config that describe its file, not of what it computes
_ORIGIN = ("transformers_version", "torch_dtype", "dtype", "architectures")


def model_settings(model: Model) -> dict[str, str]:
    """Return a hash of what a text-to-image model computes with besides its weights.

    That is the noise schedule, the prediction type, scaling factors and tokenizers. Empty for a
    feature model, which its backbone's options describe.
    """
    if isinstance(model, FeatureModel):
        return {}
    encoders = [encoder.config.to_dict() for encoder in model.text_encoders]
    configs = [model.unet.config, model.vae.config, model.scheduler.config, *encoders]
    plain = [
        {k: v for k, v in c.items() if not k.startswith("_") and k not in _ORIGIN} for c in configs
    ]
    facts: dict[str, Any] = {
        "configs": plain,
        "tokenizers": [_tokenizer(t) for t in model.tokenizers],
        "pipeline": model.pipeline_class,
        "zero_negative": model.zero_negative,
    }
    return {"settings": stage_key(facts=json.dumps(facts, sort_keys=True, default=str))}


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {"model": tokenizer.get_vocab()}
    if tokenizer.is_fast:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return {"context": tokenizer.model_max_length, **{key: whole.get(key) for key in _TOKENIZER}}
