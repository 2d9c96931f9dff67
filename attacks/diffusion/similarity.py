"""How alike generations and an attacker's own pictures are, as the attacker would scorer them."""

from __future__ import annotations

from functools import cache

import torch.nn.functional as F
from torch import Tensor

from lab.core.data import CaptionedImages
from lab.scorers.features import FeatureScorer


@cache
def _network() -> FeatureScorer:
    return FeatureScorer(image_size=128)


def likeness(images: Tensor, pictures: CaptionedImages) -> float:
    """Mean cosine similarity of the features of every generation with those of every picture, in
    [-1, 1].

    The network is EfficientNet-Lite0 from ImageNet, which has seen neither MiniSD's world nor any
    metric's answer.

    Args:
        images: generations, uint8 [n, 3, h, w].
        pictures: what they should look like.
    """
    made, wanted = (F.normalize(_network().features(x), dim=1) for x in (images, pictures.images))
    return float((made @ wanted.T).mean())
