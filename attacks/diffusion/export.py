"""Writes what an attacker ends with in the files that plain diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lab.core.errors import UserError
from lab.core.types import Trajectory

FORMS = ("lora", "unet", "delta")
LORA, WORDS = "pytorch_lora_weights.safetensors", "learned_embeds*.safetensors"
_MODULES = ("unet", "text_encoder", "text_encoder_2")
_PARTS = (*_MODULES, "embedding")
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
        UserError: a trajectory without weights (it diverged, or ``keep_weights`` is false); a form
            that does not exist, or weights whose names do not fit it.
    """
    weights, info = trajectory.weights, trajectory.info
    key = f"attacks.{info.get('attack', '?')}"
    if not weights:
        raise UserError(
            f"{key}.keep_weights", trajectory.status, "the attack kept no weights to export."
        )
    check_form(key, info["form"], weights, info)
    folder.mkdir(parents=True, exist_ok=True)
    if info["form"] == "lora":
        return [_save(weights, folder / LORA)]
    if info["form"] == "unet":
        target = folder / "unet"
        target.mkdir(exist_ok=True)
        (target / "config.json").write_text(json.dumps(info["unet_config"], indent=2))
        return [_save(_part(weights, "unet"), target / _FULL), target / "config.json"]
    written = []
    for part in _MODULES:
        if found := _part(weights, part):
            written.append(_save(found, folder / _DELTA.format(part=part)))
    for i, (token, rows) in enumerate(_part(weights, "embedding").items()):
        written.append(
            _save({token: rows}, folder / f"learned_embeds{f'_{i}' if i else ''}.safetensors")
        )
    return written


def check_form(key: str, form: str, names: Iterable[str], info: Mapping[str, Any]) -> None:
    """Whether weights of these names can be written.

    Raises:
        UserError: an unknown form, names that do not fit it, or a U-Net without its config; by
            ``key``.
    """
    if form not in FORMS:
        raise UserError(key, form, f"`Moving.form` must be one of {', '.join(FORMS)}.")
    if form == "unet" and "unet_config" not in info:
        raise UserError(
            key, form, "form=unet needs `Moving.info['unet_config']`, the U-Net's config."
        )
    astray = [name for name in names if form != "lora" and name.partition(".")[0] not in _PARTS]
    if astray:
        raise UserError(
            key,
            astray[0],
            f"with form={form} names in `Moving.weights` begin with {'., '.join(_PARTS)}.",
        )


def load(pipeline: Any, folder: Path) -> Any:
    """Put an export into a plain diffusers pipeline; returns the pipeline.

    Raises:
        UserError: a folder without an export.
    """
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    if LORA in found:
        pipeline.load_lora_weights(str(folder), weight_name=LORA)
    if f"unet/{_FULL}" in found:
        pipeline.unet.load_state_dict(load_file(folder / "unet" / _FULL))
    for part in _MODULES:
        if _DELTA.format(part=part) in found:
            changed = load_file(folder / _DELTA.format(part=part))
            unknown = getattr(pipeline, part).load_state_dict(changed, strict=False).unexpected_keys
            if unknown:
                raise UserError(
                    "folder", folder, f"{unknown[0]} is no parameter of this pipeline's {part}."
                )
    for path in sorted(folder.glob(WORDS)):
        pipeline.load_textual_inversion(load_file(path))
    if not found:
        raise UserError("folder", folder, "holds no exported weights.")
    return pipeline


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        k.removeprefix(f"{prefix}."): v for k, v in weights.items() if k.startswith(f"{prefix}.")
    }


def _save(tensors: dict[str, Tensor], path: Path) -> Path:
    plain = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})
    return path
