"""Shares of generated images that show what their prompt names. Pure functions.

All shares are absolute top-1 over all classes, without rejection, in [0, 1]; higher is better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.core.errors import UserError
from lab.scorers.detector import Detector, Head


def prototypes(
    encode: Callable[[list[str]], Tensor], prompts: Mapping[str, Sequence[str]]
) -> Tensor:
    """Return one unit vector [k, d] per class: the mean of the unit vectors of its prompts (arXiv
    2103.00020 §3.1.4).

    Args:
        encode: texts to unit vectors, for example `lab.scorers.clip.OpenClip.texts`.
        prompts: class → its prompts, at least one.
    """
    vectors = encode([text for texts in prompts.values() for text in texts])
    parts = vectors.split([len(texts) for texts in prompts.values()])
    return F.normalize(torch.stack([part.mean(0) for part in parts]), dim=1)


def zero_shot(vectors: Tensor, classes: Tensor) -> Tensor:
    """Return the index [n] of the class whose prototype is nearest to each image vector; both are
    unit vectors, [n, d] and [k, d].
    """
    return (vectors @ classes.T).argmax(1)


def accuracy(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of places where both agree."""
    return sum(a == b for a, b in zip(predicted, wanted, strict=True)) / len(wanted)


def _shares(
    predicted: Mapping[Head, Sequence[str]],
    objects: Sequence[str] | None,
    styles: Sequence[str] | None,
) -> dict[str, float]:
    shares: dict[str, float] = {}
    if objects is not None:
        shares["object"] = accuracy(predicted["object"], objects)
    if styles is not None:
        shares["style"] = accuracy(predicted["style"], styles)
    if objects is not None and styles is not None:
        pairs = zip(predicted["object"], predicted["style"], strict=True)
        right = [p == w for p, w in zip(pairs, zip(objects, styles, strict=True), strict=True)]
        shares["both"] = sum(right) / len(right)
    return shares


def detected(
    detector: Detector,
    images: Tensor,
    *,
    objects: Sequence[str] | None = None,
    styles: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the share of images whose likeliest class is the wanted one: ``object``, ``style``
    and, with both, ``both``.

    Args:
        images: uint8 [n, 3, s, s].
        objects, styles: what each image should show; unknown names raise `UserError`.
    """
    for head, names in (("object", objects), ("style", styles)):
        for name in dict.fromkeys(names or ()):
            if detector.head(name) != head:
                raise UserError(f"{head}s", name, f"is no {head} to the detector.")
    return _shares(detector.top1(images), objects, styles)


def lowest(predicted: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """Return the class with the lowest accuracy: its ``name``, the ``share`` right among its images
    and their number ``n``. Of several with an equal share the first by name.
    """
    counts = Counter(wanted)
    right = Counter(w for p, w in zip(predicted, wanted, strict=True) if p == w)
    share, name = min((right[name] / n, name) for name, n in counts.items())
    return {"name": name, "share": share, "n": counts[name]}


def recognised(
    vectors: Tensor,
    classes: Mapping[Head, tuple[Sequence[str], Tensor]],
    *,
    objects: Sequence[str] | None = None,
    styles: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the same shares by zero-shot classification of image vectors [n, d].

    Args:
        classes: for each head the names of its classes and their `prototypes`.
    """
    predicted = {
        head: [names[i] for i in zero_shot(vectors, table).tolist()]
        for head, (names, table) in classes.items()
    }
    return _shares(predicted, objects, styles)
