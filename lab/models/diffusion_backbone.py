"""Stable Diffusion 1.x, 2.x and XL, and MiniSD, as `lab.models.diffusion.DiffusionModel`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lab.core.data import ConceptCase, Kind
from lab.core.errors import UserError
from lab.core.options import choice, count
from lab.core.types import Backbone
from lab.models import diffusion_files as files
from lab.models.devices import pick
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_files import KEY, PARTS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DiffusionBackbone(Backbone):
    """A text-to-image model θ_0 from safetensors weights in diffusers layout; epsilon or
    v-prediction.

    Args:
        path: a folder in diffusers layout, a hub name such as ``CompVis/stable-diffusion-v1-4``, or
            ``minisd``, the weights that come with the project.
        dtype: ``fp32``, ``bf16`` or ``fp16`` (GPU only), whatever the file holds. In fp16 the
            autoencoder stays in float32, since XL's overflows.
        revision: of a hub name: branch, tag or commit.
        variant: ``fp16`` where only ``*.fp16.safetensors`` files shall be read; None for files
            without one.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        resolution: side of the pictures in pixels; None for the side that the U-Net was trained at.

    Raises:
        UserError: a wrong option; a local folder that cannot be loaded (a hub name is looked up by
            `build`).
    """

    kind: ClassVar[Kind] = "diffusion"

    def __init__(
        self,
        *,
        path: str,
        name: str = "sd",
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        revision: str | None = None,
        variant: str | None = None,
        device: str = "auto",
        resolution: int | None = None,
    ) -> None:
        self.name, self.dtype = name, DTYPES[choice("backbone.dtype", dtype, DTYPES)]
        self.device = pick("backbone.device", device)
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise UserError(
                "backbone.dtype", dtype, "is too slow and too coarse on a CPU; use fp32 (or bf16)."
            )
        self.resolution = (
            None if resolution is None else count("backbone.resolution", resolution, 8)
        )
        self.revision, self.variant = revision, variant
        self.source = files.locate(path)
        if isinstance(self.source, Path):
            files.check(self.source, variant)
        self._model: DiffusionModel | None = None

    def build(self, case: object, seed: int) -> DiffusionModel:
        """θ_0, the same weights for every seed, in a U-Net and text encoders of its own (the
        autoencoder is shared).

        Raises:
            UserError: weights that do not fit together or cannot be had; pictures of another size
                than the model's.
        """
        model = self._loaded()
        if isinstance(case, ConceptCase):
            _check_pictures(case, model.image_size)
        return model.copy().to(self.device)  # the cache stays in main memory

    def tokenizers(self) -> list[Any]:
        """Those of the model, which stays loaded for `build`. Raises as `build` does."""
        return self._loaded().tokenizers

    def _loaded(self) -> DiffusionModel:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> DiffusionModel:
        folder = self.source
        if isinstance(folder, str):
            folder = files.fetch(folder, self.revision, self.variant)
        class_name, parts = files.check(folder, self.variant)
        from diffusers import DiffusionPipeline

        with _quiet():
            given: dict[str, Any] = {
                part: _part(folder, part, self.variant, self.dtype) for part in parts
            }
            if class_name == "StableDiffusionXLPipeline":
                given |= {
                    "image_encoder": None,
                    "feature_extractor": None,
                    "add_watermarker": False,
                }
            else:
                given |= {
                    "safety_checker": None,
                    "feature_extractor": None,
                    "requires_safety_checker": False,
                }
            try:
                pipe = DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, **given)
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    KEY, folder, f"its tokenizer or scheduler cannot be loaded: {_line(error)}"
                ) from error
        model = DiffusionModel.from_pipeline(pipe)
        _check_parts(folder, model)
        if self.resolution is not None:
            _resize(model, self.resolution)
        if self.dtype == torch.float16:
            model.vae.to(torch.float32)
        return model


def _part(folder: Path, part: str, variant: str | None, dtype: torch.dtype) -> nn.Module:
    """One network with all of its weights, neither more nor fewer (the loaders themselves only
    warn).
    """
    library, name = PARTS[part]
    options: dict[str, Any] = {
        "subfolder": part,
        "variant": variant,
        "use_safetensors": True,
        "local_files_only": True,
    }
    if library == "diffusers":
        options["torch_dtype"] = dtype
    kind = getattr(importlib.import_module(library), name)
    try:
        model, info = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(KEY, f"{folder}/{part}", f"cannot be loaded: {_line(error)}") from error
    wrong = {
        "missing": sorted(map(str, info["missing_keys"])),
        "surplus": sorted(map(str, info["unexpected_keys"])),
        "of another shape": sorted(
            str(k if isinstance(k, str) else k[0]) for k in info["mismatched_keys"]
        ),
    }
    if any(wrong.values()):
        told = "; ".join(
            f"{len(keys)} keys {label} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for label, keys in wrong.items()
            if keys
        )
        raise UserError(
            KEY,
            f"{folder}/{part}",
            f"is a checkpoint of another model than its config.json says: {told}.",
        )
    return model.to(dtype)


def _check_parts(folder: Path, model: DiffusionModel) -> None:
    """Parts of one folder that belong to different models load without a word and fail in the first
    step.
    """
    unet, scheduler = model.unet.config, model.scheduler
    encoders: list[Any] = list(model.text_encoders)
    width = sum(int(encoder.config.hidden_size) for encoder in encoders)
    fits: list[tuple[bool, str]] = [
        (
            unet.in_channels == model.vae.config.latent_channels,
            "the U-Net takes other latents (an inpainting model?)",
        ),
        (
            unet.cross_attention_dim == width,
            f"the U-Net takes text of {unet.cross_attention_dim}, not {width}, channels",
        ),
        (isinstance(unet.sample_size, int), "the U-Net has no square sample_size"),
        (
            hasattr(scheduler, "alphas_cumprod"),
            f"the scheduler {type(scheduler).__name__} has no discrete noise schedule",
        ),
        (
            scheduler.config.get("prediction_type", "epsilon") in ("epsilon", "v_prediction"),
            f"prediction_type {scheduler.config.get('prediction_type')} is not epsilon or "
            "v_prediction",
        ),
    ]
    for encoder, tokenizer in zip(encoders, model.tokenizers, strict=True):
        rows, positions = encoder.config.vocab_size, encoder.config.max_position_embeddings
        fits.append(
            (
                len(tokenizer) <= rows,
                f"the tokenizer has {len(tokenizer)} tokens, its text encoder {rows}",
            )
        )
        told = (
            f"the tokenizer's model_max_length is {tokenizer.model_max_length}, its text "
            f"encoder takes {positions}"
        )
        fits.append((tokenizer.model_max_length <= positions, told))
    wrong = next((told for fine, told in fits if not fine), None)
    if wrong is not None:
        raise UserError(KEY, folder, f"its parts do not make a model that can be used: {wrong}.")


def _resize(model: DiffusionModel, side: int) -> None:
    """Set the side of pictures and latents.

    The step is the autoencoder's factor alone: the U-Net's up blocks interpolate to odd sizes by
    themselves.
    """
    from diffusers import __version__

    factor = model.image_size // model.latent_size
    least = factor * 2 ** (len(model.unet.config.block_out_channels) - 1)
    if side % factor or side < least:
        fix = (
            f"must be a multiple of {factor} and at least {least} for this model, or null "
            f"for {model.image_size}."
        )
        raise UserError("backbone.resolution", side, fix)
    # pipelines take a sample_size below 64 for an error in configs written by diffusers < 0.9, and
    # set it to 64
    model.unet.register_to_config(sample_size=side // factor)
    if "_diffusers_version" in model.unet.config:
        model.unet.register_to_config(_diffusers_version=__version__)


def _check_pictures(case: ConceptCase, side: int) -> None:
    sets = [
        part
        for concept in case.tasks
        for part in (concept.train, concept.own, concept.reference, concept.prior)
    ]
    for pictures in (*sets, case.keep, case.unrelated):
        if len(pictures) and tuple(pictures.images.shape[-2:]) != (side, side):
            height, width = pictures.images.shape[-2:]
            fix = (
                f"the model makes {side} × {side} pixels, the pictures of case {case.name} "
                f"have {height} × {width}"
            )
            raise UserError(
                "backbone.resolution", side, f"{fix}; set the scenario's size or the resolution."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the loaders' bars and reports off the screen: what matters in them is raised as an
    error.
    """
    from diffusers.utils import logging as theirs
    from transformers.utils import logging as others

    before = [
        (log, log.get_verbosity(), getattr(log, "is_progress_bar_enabled", lambda: True)())
        for log in (theirs, others)
    ]
    for log, _, _ in before:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level, bars in before:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
