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
    form, written = info["form"], []
    if form == "lora":
        files = {LORA: weights}
    elif form == "unet":
        files = {f"unet/{_FULL}": _part(weights, "unet")}
    else:
        files = {_DELTA.format(part=part): _part(weights, part) for part in _MODULES}
        for i, (token, rows) in enumerate(_part(weights, "embedding").items()):
            files[f"learned_embeds{f'_{i}' if i else ''}.safetensors"] = {token: rows}
    (folder / "unet" if form == "unet" else folder).mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        plain = {k: t.detach().to("cpu", torch.float32).contiguous() for k, t in tensors.items()}
        if plain:
            save_file(plain, folder / name, metadata={"format": "pt"})
            written.append(folder / name)
    if form == "unet":
        written.append(folder / "unet" / "config.json")
        written[-1].write_text(json.dumps(info["unet_config"], indent=2))
    return written


def check_form(key: str, form: str, names: Iterable[str], info: Mapping[str, Any]) -> None:
    """Check that weights of these names can be written.

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
    """Put an export into a plain diffusers pipeline and return it.

    Raises:
        UserError: a folder without an export.
    """
    if not list(folder.rglob("*.safetensors")):
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


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        k.removeprefix(f"{prefix}."): v for k, v in weights.items() if k.startswith(f"{prefix}.")
    }
