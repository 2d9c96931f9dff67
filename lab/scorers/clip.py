"""CLIP models through open_clip: images and texts as unit vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.core.config import Count, Text, config
from lab.core.errors import UserError, as_user_error
from lab.core.images import resize
from lab.models.diffusion_backbone import MINISD

SHIPPED = MINISD.parent / "scorers"  # the folders ``clip`` and ``detector``
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def check_images(images: Tensor) -> Tensor:
    """Return ``images`` if they are uint8 [n, 3, h, w], n ≥ 1; floats would be taken for black."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            f"scorers take uint8 images [n, 3, h, w], not {images.dtype} {list(images.shape)}"
        )
    return images


@config
class OpenClip:
    """An open_clip model. Equal images give equal vectors; no gradients. Loaded at its first use.

    Args:
        name: ``minisd``, a model of open_clip (``ViT-B-32``), ``hf-hub:OWNER/MODEL``, or an
            open_clip folder (``open_clip_config.json``, ``open_clip_model.safetensors`` and
            tokenizer files).
        weights: a tag of open_clip (``laion2b_s34b_b79k``) or the path of a .safetensors file; None
            where ``name`` brings its weights along.
        device: where it runs.
        batch: images or texts per forward pass.
    """

    name: Text = "minisd"
    weights: Text | None = None
    device: Text = "cpu"
    batch: Count = 128

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights.endswith(PICKLED):
            fix = "is no safetensors file and could run code when it is read; convert it first."
            raise UserError("scorers.clip.weights", self.weights, fix)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Return unit vectors float32 [n, d] of uint8 images [n, 3, h, w]; they are resized, not
        cropped.
        """
        parts = [self._normalised(x) for x in check_images(images).split(self.batch)]
        return torch.cat([self.model.encode_image(x, normalize=True) for x in parts]).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors float32 [n, d]; texts longer than the context are cut."""
        parts = self._loaded[1](list(texts)).to(self.device).split(self.batch)
        return torch.cat([self.model.encode_text(x, normalize=True) for x in parts]).float().cpu()

    @property
    def model(self) -> Any:
        """The open_clip model."""
        return self._loaded[0]

    def _normalised(self, images: Tensor) -> Tensor:
        visual = self.model.visual
        side, facts = visual.image_size, visual.preprocess_cfg
        mode = "bilinear" if facts["interpolation"] == "bilinear" else "bicubic"
        x = images.to(self.device).float() / 255
        x = resize(x, side if isinstance(side, int) else side[0], mode)
        mean, std = (torch.tensor(facts[k], device=x.device) for k in ("mean", "std"))
        return (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import open_clip

        folder = Path(self.name.removeprefix("local-dir:")).expanduser()
        folder = SHIPPED / "clip" if self.name == "minisd" else folder
        name = f"local-dir:{folder}" if folder.is_dir() else self.name
        weights = None if self.weights is None else str(Path(self.weights).expanduser())
        fix = (
            f"open_clip cannot load it with weights={weights}. Give a tag of open_clip, a local "
            ".safetensors file or an open_clip folder, or point HF_HOME to a filled cache."
        )
        with as_user_error("scorers.clip.name", self.name, fix):
            model = open_clip.create_model(
                name, pretrained=weights, device=self.device, require_pretrained=True
            )
            return model.eval().requires_grad_(False), open_clip.get_tokenizer(name)
