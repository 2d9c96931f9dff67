"""Writes what an attacker ends with in the files that plain diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lab.core.errors import UserError
from lab.core.training import part_of
from lab.core.types import Trajectory

LORA, WORDS = "pytorch_lora_weights.safetensors", "learned_embeds*.safetensors"
_MODULES = ("unet", "text_encoder", "text_encoder_2")
_FULL, _DELTA = "diffusion_pytorch_model.safetensors", "{part}_delta.safetensors"


def export(trajectory: Trajectory, folder: Path) -> list[Path]:
    """Write ``trajectory.weights`` to ``folder``, by ``info["form"]``.

    ``lora``: ``pytorch_lora_weights.safetensors`` for ``pipeline.load_lora_weights(folder)``.
    ``unet``: ``unet/`` with config for ``UNet2DConditionModel.from_pretrained(folder,
        subfolder="unet")``.
    ``delta``: ``unet_delta.safetensors`` (``text_encoder_delta.safetensors``) for
    ``load_state_dict(…, strict=False)``, and ``learned_embeds.safetensors`` per new word for
    ``pipeline.load_textual_inversion``.

    Returns:
        the files.

    Raises:
        UserError: a trajectory without weights (it diverged, or ``keep_weights`` is false).
    """
    weights, info = trajectory.weights, trajectory.info
    key = f"attacks.{info.get('attack', '?')}"
    if not weights:
        raise UserError(
            f"{key}.keep_weights", trajectory.status, "the attack kept no weights to export."
        )
    form, written = info["form"], []
    if form == "lora":
        files = {LORA: weights}
    elif form == "unet":
        files = {f"unet/{_FULL}": part_of(weights, "unet.")}
    else:
        files = {_DELTA.format(part=part): part_of(weights, f"{part}.") for part in _MODULES}
        for i, (token, rows) in enumerate(part_of(weights, "embedding.").items()):
            files[f"learned_embeds{f'_{i}' if i else ''}.safetensors"] = {token: rows}
    for name, tensors in files.items():
        plain = {k: t.detach().to("cpu", torch.float32).contiguous() for k, t in tensors.items()}
        if plain:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(plain, folder / name, metadata={"format": "pt"})
            written.append(folder / name)
    if form == "unet":
        written.append(folder / "unet" / "config.json")
        written[-1].write_text(json.dumps(info["unet_config"], indent=2))
    return written


def load(pipeline: Any, folder: Path) -> Any:
    """Put an export into a plain diffusers pipeline and return it.

    Raises:
        UserError: a folder without an export.
    """
    if not any(folder.rglob("*.safetensors")):
        raise UserError("folder", folder, "holds no exported weights.")
    if (folder / LORA).exists():
        pipeline.load_lora_weights(str(folder), weight_name=LORA)
    if (folder / "unet" / _FULL).exists():
        pipeline.unet.load_state_dict(load_file(folder / "unet" / _FULL))
    for part in _MODULES:
        path = folder / _DELTA.format(part=part)
        if path.exists():
            net = getattr(pipeline, part)
            unknown = net.load_state_dict(load_file(path), strict=False).unexpected_keys
            if unknown:
                reason = f"{unknown[0]} is no parameter of this pipeline's {part}."
                raise UserError("folder", folder, reason)
    for path in sorted(folder.glob(WORDS)):
        pipeline.load_textual_inversion(load_file(path))
    return pipeline
