"""Feature networks that know nothing of a world: perceptual, Fréchet and kernel distances."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.core.config import Count, Text, config
from lab.core.errors import UserError, as_user_error
from lab.core.images import resize
from lab.core.seeding import generator
from lab.models.vision import PACKAGE_MODEL, ImageSize, VisionModel, load_model
from lab.scorers.clip import check_images

_TINY = 1e-10


def map_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over positions of ‖â − b̂‖² [n] of maps [n, c, h, w]; â and b̂ have unit
    length over the channels.
    """
    left, right = (F.normalize(x, dim=1, eps=_TINY) for x in (a, b))
    return (left - right).square().sum(1).mean((1, 2))


@config
class FeatureScorer:
    """A timm network as an observer: pooled features, and a distance over the maps of its stages.

    Args:
        model: a timm architecture: ``tf_efficientnet_lite0``, ``vit_small_patch14_dinov2``, …
        weights: ``imagenet_package`` (EfficientNet-Lite0 from the package index), ``timm`` (hub or
            its cache), or the path of a .safetensors or .pth state dict.
        image_size: side to which images are resized; None: the network's own. MiniSD's 64 px are
            enlarged.
        device, batch: where it runs and images per forward pass.
    """

    model: Text = PACKAGE_MODEL
    weights: Text = "imagenet_package"
    image_size: ImageSize | None = None
    device: Text = "cpu"
    batch: Count = 64

    def __post_init__(self) -> None:
        self._references: tuple[Tensor, list[Tensor]] | None = None

    @cached_property
    def network(self) -> VisionModel:
        """The network, loaded at its first use."""
        known: Any = timm.get_pretrained_cfg(self.model)
        side = self.image_size or (int(known.input_size[-1]) if known else None)
        network = load_model(self.model, self.weights, side, key="scorers.features")
        network = network.to(self.device).requires_grad_(False)
        # depthwise convolutions are three times as fast on a CPU; torch's stubs lack the argument
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return pooled features float32 [n, d] of uint8 images [n, 3, h, w]."""
        parts = check_images(images).split(self.batch)
        return torch.cat([self.network(x.to(self.device)).float().cpu() for x in parts])

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of one batch after each block that are maps [n, c, h, w]."""
        x = self.network.inputs(check_images(images).to(self.device))
        outputs = []
        for block in self.network.blocks:
            x = block(x)
            outputs.append(x)
        return [y.float() for y in outputs if y.ndim == 4 and y.shape[-1] > 1]

    def distance(self, images: Tensor, references: Tensor) -> Tensor:
        """Return the distance float32 [n] ≥ 0 of image i to reference i mod R.

        It is built as LPIPS (arXiv 1801.03924, Eq. 1) without its learned weights and without its
        networks: `map_distance` averaged over stages. Not comparable with LPIPS.

        Args:
            images: uint8 [n, 3, h, w].
            references: uint8 [R, 3, h, w].

        Raises:
            UserError: a network without maps (transformers).
        """
        reference_maps, distances = self._reference_maps(references), []
        for at in torch.arange(len(images)).split(self.batch):
            index = (at % len(references)).to(self.device)
            pairs = zip(self.maps(images[at]), reference_maps, strict=True)
            stages = [map_distance(p, q[index]) for p, q in pairs]
            distances.append(torch.stack(stages).mean(0).cpu())
        return torch.cat(distances)

    def _reference_maps(self, references: Tensor) -> list[Tensor]:
        """Return the maps of all references per stage; those of the last call are kept."""
        if self._references is None or not torch.equal(self._references[0], references):
            parts = [self.maps(x) for x in references.split(self.batch)]
            if not parts[0]:
                fix = "has no feature maps to compare; use tf_efficientnet_lite0 or a ResNet."
                raise UserError("scorers.features.model", self.model, fix)
            stages = [torch.cat(stage) for stage in zip(*parts, strict=True)]
            self._references = (references.clone(), stages)
        return self._references[1]


@config
class Lpips:
    """LPIPS (arXiv 1801.03924) by torchmetrics, for backbones whose images are large enough.

    Args:
        network: ``alex``, ``vgg`` or ``squeeze``; torchvision fetches its ImageNet weights, or
            takes them from TORCH_HOME.
    """

    network: Literal["alex", "vgg", "squeeze"] = "alex"
    device: Text = "cpu"
    batch: Count = 32

    @cached_property
    def _net(self) -> Any:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        fix = "has no weights; put torchvision's file into TORCH_HOME, or use feature_lpips."
        with as_user_error("scorers.lpips.network", self.network, fix):
            metric: Any = LearnedPerceptualImagePatchSimilarity(self.network)
        return metric.net.to(self.device).eval()

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return LPIPS float32 [n] between images of equal index, uint8 [n, 3, h, w], h, w ≥ 64."""
        side, distances = max(64, a.shape[-1]), []
        for pair in zip(a.split(self.batch), b.split(self.batch), strict=True):
            x, y = (resize(check_images(p).float() / 255, side).to(self.device) for p in pair)
            distances.append(self._net(x, y, normalize=True).flatten().float().cpu())
        return torch.cat(distances)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of feature sets [n, d] and [m, d].

    In float64 (arXiv 1706.08500). tr (Σ_a Σ_b)^½ is the sum of the singular values of
    A Bᵀ / √((n − 1)(m − 1)), A and B the centred sets, since their squares are the non-zero
    eigenvalues of Σ_a Σ_b. torchmetrics takes the eigenvalues of that d × d product: at d = 1280
    300 times slower, and off by 6e-8 where n < d.

    With fewer images than dimensions the value is too large, roughly by a constant over n (arXiv
    1911.07023): compare only figures of equal n, and read them beside `floor`. Over features other
    than Inception's it is no "FID".
    """
    a, b = a.double(), b.double()
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    left, right = len(a) - 1, len(b) - 1
    products = _thin(centred_a) @ _thin(centred_b).T
    cross = torch.linalg.svdvals(products).sum() / (left * right) ** 0.5
    spread = centred_a.square().sum() / left + centred_b.square().sum() / right
    distance = (a.mean(0) - b.mean(0)).square().sum() + spread - 2 * cross
    return max(0.0, float(distance))  # rounding can take a distance of 0 below it


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared maximum mean discrepancy of feature sets [n, d] and [m, d] under the
    kernel (xᵀy/d + 1)³.

    The kernel distance of arXiv 1801.01401 in float64, over the first min(n, m) ≥ 2 rows of both: a
    set as small as ours leaves no room for subsets. Unbiased, so it may be below 0. Over features
    other than Inception's it is no "KID".
    """
    from torchmetrics.image.kid import poly_mmd

    size = min(len(a), len(b))
    return float(poly_mmd(a[:size].double(), b[:size].double()))


def _thin(x: Tensor) -> Tensor:
    """Return R of x = QR if it is smaller than x [n, d]; products x yᵀ keep their singular
    values.
    """
    return torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x


def floor(real: Tensor, count: int, *, seed: int, draws: int = 5) -> float:
    """Return the mean Fréchet distance between two disjoint random halves of ``count`` real vectors
    each: what a perfect generator would get.

    Args:
        real: features of real images [n, d], n ≥ 2 ``count``.
        count: images per side; that of the comparison whose floor it is.
    """
    if len(real) < 2 * count:
        raise ValueError(f"a floor for {count} images needs {2 * count} real ones, not {len(real)}")
    distances = []
    for draw in range(draws):
        order = torch.randperm(len(real), generator=generator(seed, "frechet floor", draw))
        distances.append(frechet_distance(real[order[:count]], real[order[count : 2 * count]]))
    return sum(distances) / draws
