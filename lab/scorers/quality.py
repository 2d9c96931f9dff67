"""How good generated pictures are: shares of pictures that show what was asked for. Pure functions.

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
    """One unit vector [k, d] per class: the mean of the unit vectors of its prompts (arXiv
    2103.00020 §3.1.4).

    Args:
        encode: texts to unit vectors, for example `lab.scorers.clip.OpenClip.texts`.
        prompts: class → its prompts, at least one.
    """
    if not prompts or not all(prompts.values()):
        raise UserError("prompts", dict(prompts), "every class needs at least one prompt.")
    vectors = encode([text for texts in prompts.values() for text in texts])
    parts = vectors.split([len(texts) for texts in prompts.values()])
    return F.normalize(torch.stack([part.mean(0) for part in parts]), dim=1)


def zero_shot(vectors: Tensor, classes: Tensor) -> Tensor:
    """Index [n] of the class whose prototype is nearest to each image vector (both unit, [n, d] and
    [k, d]).
    """
    return (vectors @ classes.T).argmax(1)


def share_right(found: Sequence[str], asked: Sequence[str]) -> float:
    """Share of places where both agree.

    Raises:
        UserError: nothing to compare, or different lengths.
    """
    if not asked or len(found) != len(asked):
        raise UserError(
            "pictures",
            f"{len(found)} found, {len(asked)} asked",
            "one label per picture, at least one.",
        )
    return sum(a == b for a, b in zip(found, asked, strict=True)) / len(asked)


def _shares(
    found: Mapping[Head, Sequence[str]], objects: Sequence[str] | None, styles: Sequence[str] | None
) -> dict[str, float]:
    asked: dict[Head, Sequence[str]] = {}
    asked |= {"object": objects} if objects is not None else {}
    asked |= {"style": styles} if styles is not None else {}
    if not asked:
        raise UserError("labels", None, "name the objects or the styles that were asked for.")
    shares: dict[str, float] = {
        head: share_right(found[head], labels) for head, labels in asked.items()
    }
    if objects is not None and styles is not None:
        pairs = [f"{o}\n{s}" for o, s in zip(found["object"], found["style"], strict=True)]
        shares["both"] = share_right(
            pairs, [f"{o}\n{s}" for o, s in zip(objects, styles, strict=True)]
        )
    return shares


def detected(
    detector: Detector,
    images: Tensor,
    *,
    objects: Sequence[str] | None = None,
    styles: Sequence[str] | None = None,
) -> dict[str, float]:
    """Share of pictures whose likeliest class is the one asked for: ``object``, ``style`` and, with
    both, ``both``.

    Args:
        images: uint8 [n, 3, s, s].
        objects, styles: what each picture was asked to show; unknown names raise
            `lab.core.errors.UserError`.
    """
    for head, asked in (("object", objects), ("style", styles)):
        for name in dict.fromkeys(asked or ()):
            if detector.head(name) != head:
                raise UserError(f"{head}s", name, f"is no {head} to the detector.")
    return _shares(detector.top1(images), objects, styles)


def lowest(found: Sequence[str], asked: Sequence[str]) -> dict[str, Any]:
    """The class that is met least often: its ``name``, the ``share`` right among its pictures and
    their number ``n``.

    Of several with an equal share the first by name; raises as `share_right` does.
    """
    share_right(found, asked)
    right = Counter(a for f, a in zip(found, asked, strict=True) if f == a)
    share, name = min((right[name] / n, name) for name, n in Counter(asked).items())
    return {"name": name, "share": share, "n": Counter(asked)[name]}


def recognised(
    vectors: Tensor,
    classes: Mapping[Head, tuple[Sequence[str], Tensor]],
    *,
    objects: Sequence[str] | None = None,
    styles: Sequence[str] | None = None,
) -> dict[str, float]:
    """The same shares by zero-shot classification of image vectors [n, d].

    Args:
        classes: for each head the names of its classes and their `prototypes`.
    """
    found: dict[Head, Sequence[str]] = {
        head: [names[i] for i in zero_shot(vectors, table).tolist()]
        for head, (names, table) in classes.items()
    }
    return _shares(found, objects, styles)
