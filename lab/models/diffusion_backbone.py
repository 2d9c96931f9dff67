"""Stable Diffusion 1.x, 2.x and XL, and MiniSD, as `lab.models.diffusion.DiffusionModel`."""

from __future__ import annotations

import importlib
import json
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from lab.core.config import Text, config
from lab.core.data import ConceptCase, Kind
from lab.core.errors import UserError, as_user_error
from lab.core.types import Backbone
from lab.models.devices import pick
from lab.models.diffusion import PIPELINES, DiffusionModel

KEY = "backbone.path"
MINISD = Path(__file__).resolve().parent.parent / "minisd" / "weights" / "model"
INCLUDED = {"minisd": MINISD, "minisd_retrained": MINISD.parents[1] / "retrained" / "model"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# part → library and class: nothing else is imported, whatever a model_index.json asks for
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
UNUSED = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))


@config
class DiffusionBackbone(Backbone[DiffusionModel, object]):
    """A text-to-image model θ_0 from safetensors weights in diffusers layout.

    Args:
        path: a folder in diffusers layout, a hub name such as ``CompVis/stable-diffusion-v1-4``, or
            ``minisd``, the weights that come with the project.
        dtype: ``fp32``, ``bf16`` or ``fp16`` (GPU only), whatever the file holds. In fp16 the
            autoencoder stays in float32, since XL's overflows.
        revision: of a hub name: branch, tag or commit.
        variant: ``fp16`` to read ``*.fp16.safetensors`` files; None for files without one.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        resolution: side of the images in pixels; None for the side that the U-Net was trained at.
    """

    kind: ClassVar[Kind] = "diffusion"
    path: Text
    name: Text = "sd"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    revision: Text | None = None
    variant: Text | None = None
    device: Text = "auto"
    resolution: Annotated[int, Field(strict=True, ge=8)] | None = None

    def __post_init__(self) -> None:
        self._device = pick("backbone.device", self.device)
        if self.dtype == "fp16" and self._device.type == "cpu":
            fix = "is too slow and too coarse on a CPU; use fp32 (or bf16)."
            raise UserError("backbone.dtype", self.dtype, fix)
        self._source = locate(self.path)

    def build(self, case: object, seed: int) -> DiffusionModel:
        """Return θ_0, the same weights for every seed, in a U-Net and text encoders of its own.

        Raises:
            UserError: weights that do not fit together or cannot be found, or images of another
                size than the model's.
        """
        if isinstance(case, ConceptCase):
            _check_image_size(case, self._model.image_size)
        return self._model.copy().to(self._device)  # the cache stays in main memory

    def tokenizers(self) -> list[Any]:
        """Return those of the model, which stays loaded for `build`. Raises as `build` does."""
        return self._model.tokenizers

    @cached_property
    def _model(self) -> DiffusionModel:
        source = self._source
        folder = source if isinstance(source, Path) else self._fetch(source)
        _silence()
        model = load(folder, self.variant, DTYPES[self.dtype])
        if self.resolution is not None:
            _resize(model, self.resolution)
        return model

    def _fetch(self, name: str) -> Path:
        """Return the folder of a hub model in the local cache; safetensors only."""
        from diffusers import DiffusionPipeline

        options = {"revision": self.revision, "variant": self.variant, "use_safetensors": True}
        fix = (
            "is no folder here and could not be loaded from the hub. Set it to a local folder with "
            "safetensors weights, point HF_HOME to a filled cache, or on a machine with network "
            f"run `hf download {name}`."
        )
        with as_user_error(KEY, name, fix):
            return Path(DiffusionPipeline.download(name, **options, **UNUSED))


def folder_of(path: str) -> Path:
    """Return the folder that ``path`` means: of an included model (`INCLUDED`), or itself."""
    return INCLUDED.get(path) or Path(path).expanduser()


def locate(path: str, key: str = KEY) -> Path | str:
    """Return the folder that ``path`` means (names of `INCLUDED` are the package's own), or the hub
    name.

    Raises:
        UserError: neither; of the config key ``key``.
    """
    folder = folder_of(path)
    if (folder / "model_index.json").is_file():
        return folder
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) and not folder.parent.is_dir():
        return path
    fix = (
        "there is no such folder in diffusers layout (model_index.json), nor is it OWNER/MODEL. "
        "`python run.py experiment=train_minisd` makes MiniSD's. A single file is converted by "
        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
    )
    raise UserError(key, path, fix)


def locate_folder(path: str, key: str) -> Path:
    """Return the folder that ``path`` means, as `locate` does.

    Raises:
        UserError: of the config key ``key``; a hub name too.
    """
    folder = locate(path, key)
    if isinstance(folder, str):
        fix = f"must be a folder on this machine; `hf download {path}` prints one."
        raise UserError(key, path, fix)
    return folder


def load_folder(path: str, key: str) -> DiffusionModel:
    """Return the model in the folder that ``path`` means, in full precision. Raises as
    `locate_folder` and `load` do.
    """
    return load(locate_folder(path, key), None, DTYPES["fp32"])


def read_sampling(path: str) -> dict[str, float]:
    """Return ``resolution`` [pixels], ``steps`` and ``guidance`` that suit a checkpoint.

    The resolution is read from the config files of U-Net and autoencoder. Miniatures of up to 64
    pixels take the steps of MiniSD, others the convention of Stable Diffusion v1, which also stands
    in where there are no such files (a hub name).
    """
    folder, side = folder_of(path), 512
    with suppress(OSError, ValueError, LookupError, TypeError):
        unet, vae = (
            json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
            for part in ("unet", "vae")
        )
        side = int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    steps, guidance = (8, 4.0) if side <= 64 else (50, 7.5)
    return {"resolution": side, "steps": steps, "guidance": guidance}


def load(folder: Path, variant: str | None, dtype: torch.dtype) -> DiffusionModel:
    """Return the model in a folder of diffusers layout; safetensors only.

    Raises:
        UserError: another pipeline, text encoder, autoencoder or U-Net; missing, damaged or pickled
            weights.
    """
    import diffusers

    with as_user_error(KEY, folder, "its model_index.json is damaged."):
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = index["_class_name"]
    if name not in PIPELINES:
        raise UserError(KEY, folder, f"holds a {name}; {' or '.join(PIPELINES)} is needed.")
    parts = [part for part in PARTS if part in index]
    for part in parts:
        if tuple(index[part]) != PARTS[part]:
            fix = f"its {part} must be {'.'.join(PARTS[part])}, model_index.json says {index[part]}"
            raise UserError(KEY, folder, fix)
    options: dict[str, Any] = {
        **{part: _load_part(folder, part, variant, dtype) for part in parts},
        **{part: None for part in UNUSED if part in index},
    }
    with as_user_error(KEY, folder, "its tokenizer or scheduler cannot be loaded."):
        pipe = getattr(diffusers, name).from_pretrained(str(folder), **options)
    model = DiffusionModel.from_pipeline(pipe)
    if dtype == torch.float16:
        model.vae.to(torch.float32)
    return model


def _load_part(folder: Path, part: str, variant: str | None, dtype: torch.dtype) -> nn.Module:
    """Return one network with all of its weights; the loaders themselves only warn."""
    library, name = PARTS[part]
    options = {"torch_dtype": dtype} if library == "diffusers" else {}
    fix = f"cannot be loaded from safetensors with backbone.variant={variant}."
    with as_user_error(KEY, folder / part, fix):
        network, report = getattr(importlib.import_module(library), name).from_pretrained(
            str(folder),
            subfolder=part,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    wrong = {kind: keys for kind, keys in report.items() if keys and kind.endswith("_keys")}
    if wrong:
        fix = f"is a checkpoint of another model than its config.json says: {wrong}"
        raise UserError(KEY, folder / part, fix[:300])
    return network.to(dtype)


def _resize(model: DiffusionModel, side: int) -> None:
    """Set the side of images and latents.

    The step is the autoencoder's factor alone: the U-Net's up blocks interpolate to odd sizes.
    """
    from diffusers import __version__

    factor = model.image_size // model.latent_size
    least = factor * 2 ** (len(model.unet.config.block_out_channels) - 1)
    if side % factor or side < least:
        fix = f"must be a multiple of {factor} and at least {least}, or null ({model.image_size})."
        raise UserError("backbone.resolution", side, fix)
    # pipelines take a sample_size below 64 for an error in configs written by diffusers < 0.9, and
    # set it to 64
    model.unet.register_to_config(sample_size=side // factor, _diffusers_version=__version__)


def _check_image_size(case: ConceptCase, side: int) -> None:
    sets = [s for c in case.tasks for s in (c.train, c.own, c.reference, c.prior)]
    for images in (*sets, case.keep, case.unrelated):
        if len(images) and tuple(images.images.shape[-2:]) != (side, side):
            height, width = images.images.shape[-2:]
            fix = (
                f"the model makes {side} × {side} pixels, the images of case {case.name} have "
                f"{height} × {width}; set the scenario's size or the resolution."
            )
            raise UserError("backbone.resolution", side, fix)


def _silence() -> None:
    """Keep the loaders' progress bars and warnings off the terminal; errors are raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for log in (diffusers_logging, transformers_logging):
        log.set_verbosity_error()
        log.disable_progress_bar()
