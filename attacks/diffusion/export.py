"""Writes what an attacker ends with in the files that plain diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lab.core.errors import UserError
from lab.core.training import part_of
from lab.core.types import Trajectory

LORA = "pytorch_lora_weights.safetensors"
_MODULES = ("unet", "text_encoder", "text_encoder_2")
_FULL, _DELTA = "diffusion_pytorch_model.safetensors", "{part}_delta.safetensors"


def export(trajectory: Trajectory, folder: Path) -> list[Path]:
    """Write ``trajectory.weights`` to ``folder``, by ``info["form"]``.

    ``lora``: ``pytorch_lora_weights.safetensors`` for ``pipeline.load_lora_weights(folder)``.
    ``unet``: ``unet/`` with config for ``UNet2DConditionModel.from_pretrained(folder,
        subfolder="unet")``.
    ``controlnet``: ``controlnet/`` for ``ControlNetModel.from_pretrained``.
    ``ip_adapter``: ``ip_adapter.safetensors`` for ``pipeline.load_ip_adapter(folder, subfolder="",
        weight_name="ip_adapter.safetensors", image_encoder_folder=None)``.
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
    elif form in ("unet", "controlnet"):
        files = {f"{form}/{_FULL}": part_of(weights, f"{form}.")}
    elif form == "ip_adapter":
        files = {"ip_adapter.safetensors": weights}
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
    if form in ("unet", "controlnet"):
        written.append(folder / form / "config.json")
        written[-1].write_text(json.dumps(info[f"{form}_config"], indent=2))
    return written
