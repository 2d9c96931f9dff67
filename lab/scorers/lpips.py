"""LPIPS proper, for backbones whose pictures are large enough and where its weights can be had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lab.core.errors import UserError
from lab.core.options import choice, count
from lab.scorers.images import check, resized


class Lpips:
    """LPIPS proper (arXiv 1801.03924) by torchmetrics; needs the ImageNet weights of AlexNet, VGG
    or SqueezeNet.

    Args:
        network: ``alex``, ``vgg`` or ``squeeze``; torchvision fetches its weights, or takes them
            from TORCH_HOME.

    Raises:
        UserError: unknown network, or weights that cannot be reached.
    """

    def __init__(self, network: str = "alex", *, device: str = "cpu", batch: int = 32) -> None:
        choice("scorers.lpips.network", network, ("alex", "vgg", "squeeze"))
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.batch, self.device = count("scorers.lpips.batch", batch), torch.device(device)
        try:
            metric: Any = LearnedPerceptualImagePatchSimilarity(network)  # type: ignore[arg-type]
        except Exception as error:  # torchvision's download raises urllib's and OS errors
            fix = (
                f"no weights ({error}); put torchvision's file into TORCH_HOME, or use "
                "feature_lpips."
            )
            raise UserError("scorers.lpips.network", network, fix) from error
        self.network: Any = metric.net.to(self.device).eval()

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS float32 [n] between pictures of equal index, uint8 [n, 3, h, w], h, w ≥ 64."""
        if check(a).shape != check(b).shape:
            raise UserError(
                "images",
                f"{list(a.shape)}, {list(b.shape)}",
                "compare equally many pictures of one size.",
            )
        pairs = zip(a.split(self.batch), b.split(self.batch), strict=True)
        side = max(64, a.shape[-1])
        found = [
            self.network(*(resized(x, side).to(self.device) for x in pair), normalize=True)
            for pair in pairs
        ]
        return torch.cat([x.flatten() for x in found]).float().cpu()
