"""Feature networks that know nothing of a world, and perceptual distances over their maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.core.errors import UserError, nearest
from lab.core.options import count, local, names
from lab.models import weights as loading
from lab.models.chains import VisionModel, chain
from lab.scorers.images import check

KEY = "scorers.features.model"
WEIGHTS_KEY = "scorers.features.weights"
_TINY = 1e-10


def map_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over positions of ‖â − b̂‖² [n], â and b̂ of unit length over the channels of maps [n,
    c, h, w].
    """
    return (
        (F.normalize(a, dim=1, eps=_TINY) - F.normalize(b, dim=1, eps=_TINY))
        .square()
        .sum(1)
        .mean((1, 2))
    )


class FeatureScorer:
    """A timm network as an observer: pooled features, and a distance over the maps of several
    stages.

    Args:
        model: a timm architecture: ``tf_efficientnet_lite0``, ``vit_small_patch14_dinov2``, …
        weights: ``imagenet_package`` (EfficientNet-Lite0 from the package index), ``timm`` (hub or
            its cache), or the path of a .safetensors or .pth state dict.
        image_size: side to which pictures are resized; None: the network's own. MiniSD's 64 px are
            enlarged.
        stages: names of the blocks whose maps `compared` compares; None: all that give maps.
        device, batch: where it runs and pictures per forward pass.

    Raises:
        UserError: unknown model, weights that cannot be loaded, unknown stage.
    """

    def __init__(
        self,
        model: str = loading.PACKAGE_MODEL,
        weights: str = "imagenet_package",
        *,
        image_size: int | None = None,
        stages: Sequence[str] | None = None,
        device: str = "cpu",
        batch: int = 64,
    ) -> None:
        if image_size is not None:
            count("scorers.features.image_size", image_size, 32)
        self.name, self.batch = model, count("scorers.features.batch", batch)
        network = _network(model, weights, image_size).to(device).requires_grad_(False)
        # depthwise convolutions are three times as fast on a CPU; torch's stubs lack the argument
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        known = self.network.block_names
        for stage in names("scorers.features.stages", list(stages or ())):
            if stage not in known:
                raise UserError("scorers.features.stages", stage, nearest(stage, known))
        self.stages = tuple(stages) if stages else known
        self._known: tuple[Tensor, list[Tensor]] | None = None

    @property
    def device(self) -> torch.device:
        return self.network.mean.device

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled features float32 [n, d] of uint8 images [n, 3, h, w]."""
        return torch.cat(
            [self.network(x.to(self.device)).float().cpu() for x in check(images).split(self.batch)]
        )

    @torch.no_grad()
    def maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pooled features [n, d] and the maps [n, c, h, w] of the chosen stages, for one batch;
        blocks that give no maps are left out.
        """
        x = self.network.inputs(check(images).to(self.device))
        found = []
        for i, name in enumerate(self.network.block_names):
            x = self.network.run(x, i, i + 1)
            if name in self.stages and x.ndim == 4 and x.shape[-1] > 1:
                found.append(x.float())
        return x.float(), found

    def compared(self, images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features float32 [n, d], and the distance float32 [n] ≥ 0 of picture i to
        reference i mod R; one pass for both.

        The distance is built as LPIPS (arXiv 1801.03924, Eq. 1) without its learned weights and
        without its networks: `map_distance` averaged over stages. Not comparable with LPIPS.

        Args:
            images: uint8 [n, 3, h, w].
            references: uint8 [R, 3, h, w].

        Raises:
            UserError: pictures of other sizes than the references, or a network without maps
                (transformers).
        """
        if check(images).shape[1:] != check(references).shape[1:]:
            sizes = f"{list(images.shape)}, {list(references.shape)}"
            raise UserError("images", sizes, "compare pictures of one size.")
        known = self._reference_maps(references)
        pooled, distances = [], []
        for at in torch.arange(len(images)).split(self.batch):
            features, found = self.maps(images[at])
            index = (at % len(references)).to(self.device)
            pairs = zip(found, known, strict=True)
            distances.append(
                torch.stack([map_distance(p, q[index]) for p, q in pairs]).mean(0).cpu()
            )
            pooled.append(features.cpu())
        return torch.cat(pooled), torch.cat(distances)

    def _reference_maps(self, references: Tensor) -> list[Tensor]:
        """Per stage, the maps of all references; those of the last call are kept."""
        if self._known is None or not torch.equal(self._known[0], references):
            parts = [self.maps(x)[1] for x in references.split(self.batch)]
            if not parts[0]:
                fix = "has no feature maps to compare; use tf_efficientnet_lite0 or a ResNet."
                raise UserError(KEY, self.name, fix)
            self._known = (
                references.clone(),
                [torch.cat(stage) for stage in zip(*parts, strict=True)],
            )
        return self._known[1]


def _network(model: str, weights: str, image_size: int | None) -> VisionModel:
    import timm

    if not isinstance(model, str) or not timm.is_model(model.split(".")[0]):
        raise UserError(KEY, model, nearest(str(model), timm.list_models()))
    config: Any = timm.get_pretrained_cfg(model) or timm.models.PretrainedCfg()
    side = image_size or int(config.input_size[-1])
    options: dict[str, Any] = {"img_size": side} if config.fixed_input_size else {}
    if weights == "imagenet_package" and model != loading.PACKAGE_MODEL:
        fix = f"holds the weights of {loading.PACKAGE_MODEL} only; use timm or a path for {model}."
        raise UserError(WEIGHTS_KEY, weights, fix)
    if weights == "timm":
        network = _from_hub(model, options)
    else:
        network = timm.create_model(model, pretrained=False, num_classes=0, **options)
        heads = (
            (config.classifier,)
            if isinstance(config.classifier, str)
            else tuple(config.classifier or ())
        )
        try:
            state = (
                loading.imagenet_package()
                if weights == "imagenet_package"
                else loading.read(local(WEIGHTS_KEY, weights))
            )
            loading.fill(network, state, weights, tuple(f"{head}." for head in heads))
        except UserError as error:
            raise UserError(WEIGHTS_KEY, error.value, error.fix) from error
    width = int(getattr(network, "head_hidden_size", network.num_features))
    return VisionModel(chain(network), width, config.mean, config.std, side)


def _from_hub(model: str, options: dict[str, Any]) -> Any:
    import timm

    try:
        return timm.create_model(model, pretrained=True, num_classes=0, **options)
    except Exception as error:  # the hub client raises its own, urllib's, httpx's and OS errors
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        fix = (
            f"timm could not load its weights for {model} ({type(error).__name__}: "
            f"{reason}). Give the path of a local "
            ".safetensors or .pth file, or point HF_HOME to a filled cache."
        )
        raise UserError(WEIGHTS_KEY, "timm", fix) from error
