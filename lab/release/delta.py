"""What an immunizer changed, as one small file.

The file is safetensors: the changed tensors of the U-Net in full, named as in its ``state_dict``,
and in the metadata the SHA-256 of the U-Net that they belong to. Loading gives the immunized
weights bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lab.core.errors import UserError
from lab.core.hashing import write_atomically
from lab.models.diffusion import DiffusionModel

FORMAT = "immunization-delta-1"


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names; the same on every
    device.
    """
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        total.update(struct.pack("<Q", len(head)) + head)
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_delta(base: DiffusionModel, immunized: DiffusionModel, file: Path | str) -> Path:
    """Write the U-Net tensors in which ``immunized`` differs from ``base``; atomically, folders are
    made.

    Raises:
        UserError: the two U-Nets have other tensors, shapes or dtypes.
    """
    old, new = base.unet.state_dict(), immunized.unet.state_dict()
    differ = sorted(old.keys() ^ new.keys()) or [
        k for k in old if old[k].shape != new[k].shape or old[k].dtype != new[k].dtype
    ]
    if differ:
        raise UserError(
            "delta",
            differ[0],
            "is not the same kind of tensor in both U-Nets; give the model's own base.",
        )
    changed = {
        k: v.detach().cpu().contiguous()
        for k, v in new.items()
        if not torch.equal(v.to(old[k].device), old[k])
    }
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "base": state_hash(old), "tensors": json.dumps(sorted(changed))}
    write_atomically(path, _ordered(save(changed, metadata)))
    return path


def _ordered(data: bytes) -> bytes:
    """The same safetensors file with its header sorted: the library writes the metadata in another
    order every time.
    """
    size = int.from_bytes(data[:8], "little")
    head = json.dumps(
        json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")
    ).encode()
    head += b" " * (-len(head) % 8)  # as the library pads it
    return len(head).to_bytes(8, "little") + head + data[8 + size :]


def load_delta(model: DiffusionModel, file: Path | str) -> DiffusionModel:
    """A copy of ``model`` with the tensors of ``file``; ``model`` is the base that the file was
    made from.

    Raises:
        UserError: no such file, a damaged one, one of another kind, or another base.
    """
    path = Path(file)
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError("delta", path, f"cannot be read as safetensors ({error}).") from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            "delta", path, f"is no immunization delta; its metadata must say format={FORMAT}."
        )
    if metadata.get("tensors") != json.dumps(sorted(tensors)):
        raise UserError(
            "delta", path, "does not hold the tensors that its metadata lists; export it again."
        )
    state = model.unet.state_dict()
    found = state_hash(state)
    if found != metadata.get("base"):
        of = str(metadata.get("base"))[:12]
        told = (
            f"belongs to the base with SHA-256 {of}…, this U-Net has {found[:12]}…; load that base."
        )
        raise UserError("delta", path, told)
    result = model.copy()
    result.unet.load_state_dict({**state, **{k: v.to(state[k].device) for k, v in tensors.items()}})
    return result
