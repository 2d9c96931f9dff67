"""Networks of timm as chains of named blocks, so that a prefix which does not move is evaluated
once.

Every chain equals ``model.forward_head(model.forward_features(x), pre_logits=True)``: the features
before the classifier. A block without parameters (pooling) is joined to the block before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lab.core.types import FeatureModel

Blocks = list[tuple[str, nn.Module]]


class _Whole(nn.Module):
    """A network that this module does not know how to take apart."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)


class _Embed(nn.Module):
    """Patches, class token and positions of a vision transformer whose blocks and head were taken
    out.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.model._pos_embed(self.model.patch_embed(x))
        return self.model.norm_pre(self.model.patch_drop(tokens))


class _Pool(nn.Module):
    """Class token, or mean over the patch tokens: [n, tokens, d] to [n, d]."""

    def __init__(self, kind: str, prefix: int) -> None:
        super().__init__()
        self.kind, self.prefix = kind, prefix

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.kind == "token" else x[:, self.prefix :].mean(1)


def _efficientnet(model: Any) -> Blocks:
    stages: Blocks = [(f"stage{i}", stage) for i, stage in enumerate(model.blocks)]
    head = nn.Sequential(model.conv_head, model.bn2, model.global_pool)
    return [("stem", nn.Sequential(model.conv_stem, model.bn1)), *stages, ("head", head)]


def _resnet(model: Any) -> Blocks:
    stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    stages: Blocks = [(f"layer{i}", getattr(model, f"layer{i}")) for i in (1, 2, 3)]
    return [("stem", stem), *stages, ("layer4", nn.Sequential(model.layer4, model.global_pool))]


def _vision_transformer(model: Any) -> Blocks:
    blocks: Blocks = [(f"block{i}", block) for i, block in enumerate(model.blocks)]
    pool = _Pool(model.global_pool, model.num_prefix_tokens)
    head = nn.Sequential(model.norm, pool, model.fc_norm)
    model.blocks, model.norm, model.fc_norm, model.head = (
        nn.Sequential(),
        nn.Identity(),
        nn.Identity(),
        nn.Identity(),
    )
    return [("embed", _Embed(model)), *blocks, ("norm", head)]


def chain(model: Any) -> Blocks:
    """Named blocks of a timm network without classifier (``num_classes=0``). Takes the network
    apart.

    EfficientNet, ResNet and plain vision transformers fall into stages; any other network with
    ``forward_features`` and ``forward_head`` becomes one block named ``body``.
    """
    if type(model) is EfficientNet:
        return _efficientnet(model)
    if type(model) is ResNet:
        return _resnet(model)
    plain = (
        type(model) is VisionTransformer
        and model.attn_pool is None
        and model.global_pool in ("token", "avg")
    )
    if plain and not getattr(model, "pool_include_prefix", False):
        return _vision_transformer(model)
    return [("body", _Whole(model))]


class VisionModel(FeatureModel):
    """A chain that takes images: uint8 [n, 3, h, w], or float in [0, 1].

    Args:
        blocks: named blocks, see `chain`.
        feature_dim: d of the features [n, d].
        mean, std: per channel, of images in [0, 1].
        size: side to which images are resized first; None takes them as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        blocks: Blocks,
        feature_dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | None,
    ) -> None:
        super().__init__(blocks, feature_dim)
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def inputs(self, x: Tensor) -> Tensor:
        x = x.to(self.mean.dtype) / 255.0 if x.dtype == torch.uint8 else x.to(self.mean.dtype)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(
                x, size=(self.size, self.size), mode="bilinear", antialias=True
            ).clamp(0.0, 1.0)
        return (x - self.mean) / self.std
