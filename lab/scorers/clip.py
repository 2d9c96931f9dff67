"""CLIP models through open_clip: pictures and texts as unit vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.core.errors import UserError, nearest
from lab.core.options import count, local
from lab.scorers.images import check
from lab.scorers.networks import (
    CLIP_CONFIG,
    CLIP_WEIGHTS,
    TRAIN,
    clip_network,
    fill,
    read_folder,
    refuse_pickle,
)

KEY = "scorers.clip.name"
WEIGHTS_KEY = "scorers.clip.weights"


class OpenClip:
    """An open_clip model. Same pictures, same vectors; no gradients.

    Args:
        name: a model of open_clip (``ViT-B-32``), ``hf-hub:OWNER/MODEL``, or an open_clip folder
            (``open_clip_config.json``, ``open_clip_model.safetensors`` and tokenizer files), as
            MiniSD's.
        weights: a tag of open_clip (``laion2b_s34b_b79k``) or the path of a .safetensors file; None
            where ``name`` brings its weights along.
        device: where it runs.
        batch: pictures or texts per forward pass.

    Raises:
        UserError: unknown model, weights that cannot be found or reached, that are no safetensors
            or another model's; a damaged folder.
    """

    def __init__(
        self, name: str, weights: str | None = None, *, device: str = "cpu", batch: int = 128
    ) -> None:
        self.name, self.batch, self.device = (
            name,
            count("scorers.clip.batch", batch),
            torch.device(device),
        )
        folder = _folder(name)
        model, self._tokenizer = (
            _from_folder(folder) if folder is not None else _from_library(name, weights)
        )
        self.model = model.to(self.device).eval().requires_grad_(False)
        size = model.visual.image_size
        self.side = int(size[0] if isinstance(size, tuple | list) else size)
        facts = dict(getattr(model.visual, "preprocess_cfg", None) or {})
        self._mode = str(facts.get("interpolation", "bicubic"))
        self._mean = torch.tensor(facts.get("mean") or _OPENAI_MEAN, device=self.device).view(
            1, 3, 1, 1
        )
        self._std = torch.tensor(facts.get("std") or _OPENAI_STD, device=self.device).view(
            1, 3, 1, 1
        )

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Unit vectors float32 [n, d] of uint8 images [n, 3, h, w]; they are resized, not
        cropped.
        """
        parts = [
            self.model.encode_image(self._inputs(x), normalize=True)
            for x in check(images).split(self.batch)
        ]
        return torch.cat(parts).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [n, d]; longer texts than the context are cut."""
        if not texts or isinstance(texts, str):
            raise UserError("texts", texts, "must be a list of at least one text.")
        ids = self._tokenizer(list(texts)).split(self.batch)
        return (
            torch.cat([self.model.encode_text(x.to(self.device), normalize=True) for x in ids])
            .float()
            .cpu()
        )

    def _inputs(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float() / 255
        if x.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            mode = self._mode if self._mode in ("bilinear", "bicubic") else "bicubic"
            x = F.interpolate(x, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
        return (x - self._mean) / self._std


_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP, which most models follow
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def _folder(name: str) -> Path | None:
    """The folder that ``name`` means, if it means one."""
    if not isinstance(name, str) or not name:
        raise UserError(KEY, name, "must be a model of open_clip, hf-hub:OWNER/MODEL, or a folder.")
    path = local(KEY, name.removeprefix("local-dir:"))
    looks = name.startswith(("local-dir:", ".", "/", "~")) or (
        not name.startswith("hf-hub:") and path.is_dir()
    )
    return path if looks else None


def _from_folder(folder: Path) -> tuple[Any, Any]:
    import open_clip

    facts, tensors = read_folder(folder, CLIP_CONFIG, CLIP_WEIGHTS, KEY)
    try:
        model = clip_network(facts, 0)
        model.visual.preprocess_cfg = facts.get("preprocess_cfg", {})  # type: ignore[union-attr]
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            KEY, folder, f"is no complete open_clip folder ({error}); restore it or {TRAIN}."
        ) from error
    fill(model, tensors, folder, KEY)
    return model, tokenizer


def _from_library(name: str, weights: str | None) -> tuple[Any, Any]:
    import open_clip

    hub = name.startswith("hf-hub:")
    if not hub and name not in open_clip.list_models():
        raise UserError(
            KEY,
            name,
            "open_clip has no such model and there is no such folder; "
            f"{nearest(name, open_clip.list_models())}",
        )
    if not hub and weights is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            WEIGHTS_KEY, weights, f"{name} needs weights: the path of a file, or a tag ({tags})."
        )
    if weights is not None:
        refuse_pickle(Path(weights), WEIGHTS_KEY)
        weights = str(local(WEIGHTS_KEY, weights))
    try:
        model = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
        return model, open_clip.get_tokenizer(name)
    except (
        Exception
    ) as error:  # the hub client, urllib, torch and open_clip raise errors of their own
        reason = " ".join(str(error).split())[
            :300
        ]  # torch names missing and surplus keys in its later lines
        fix = (
            f"open_clip could not load it for {name} ({type(error).__name__}: {reason}). "
            "Give the path of a local "
            ".safetensors file of this model, or point HF_HOME to a filled cache."
        )
        raise UserError(WEIGHTS_KEY, weights or name, fix) from error
