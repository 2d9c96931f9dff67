"""What the diffusion metrics ask of the networks that scorer pictures, and the similarities M of
docs/methods.md §4.2.

Pictures are uint8 [n, 3, s, s] here; a scorer resizes and normalises them itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.stats.intervals import Floats
from lab.core.data import ConceptCase
from lab.core.errors import UserError

SIMILARITIES = ("clip", "features", "feature_lpips", "lpips")
PREPROCESSING = ("standard", "legacy")
BATCH = 256  # pictures that are handed to a scorer at once
PAIRS = 32  # pairs that are compared at once: the maps of one side are all kept
LEGACY_SIDE = 64  # px


class Encoder(Protocol):
    """Unit vectors of pictures and texts in one space (CLIP)."""

    def images(self, images: Tensor) -> Tensor: ...

    def texts(self, texts: Sequence[str]) -> Tensor: ...


class Features(Protocol):
    """A feature network: pooled features [n, d]; with them, a perceptual distance [n] in [0, 4] of
    picture i to reference i mod R.
    """

    def features(self, images: Tensor) -> Tensor: ...

    def compared(self, images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]: ...


class Perceptual(Protocol):
    """LPIPS: distance [n] of pictures of equal index."""

    def distance(self, a: Tensor, b: Tensor) -> Tensor: ...


class Detector(Protocol):
    """Says whether a picture shows a concept. ``rates``: concept → its ``false_positive`` and
    ``false_negative``.
    """

    @property
    def rates(self) -> Mapping[str, Mapping[str, float]]: ...

    def detects(self, images: Tensor, name: str) -> Tensor: ...


@runtime_checkable
class Labeller(Protocol):
    """A detector that also names the object and the style of any picture: probabilities [n,
    classes] of both.
    """

    def probabilities(self, images: Tensor) -> Mapping[Literal["object", "style"], Tensor]: ...


class Scorers(Protocol):
    """The networks of one run; ``detector`` and ``lpips`` may be None where nobody has one."""

    def fingerprint(self) -> str: ...

    @property
    def clip(self) -> Encoder: ...

    @property
    def features(self) -> Features: ...

    @property
    def detector(self) -> Detector | None: ...

    @property
    def lpips(self) -> Perceptual | None: ...


def detector_of(scorers: Scorers, key: str) -> Detector:
    """The detector.

    Raises:
        UserError: there is none.
    """
    if scorers.detector is None:
        raise UserError(
            f"{key}.scorers", "detector=null", "needs a detector that knows the concepts."
        )
    return scorers.detector


def dry_open(
    scorers: Scorers, cases: Iterable[ConceptCase], kinds: Sequence[str], detect: str | None = None
) -> None:
    """Score a reference picture, so that what a scorer lacks shows before hours of attacks: one of
    every concept by the detector, and one by the networks, which know no concepts.

    Args:
        kinds: similarities that will be asked for.
        detect: config key of the metric that will ask the detector; None: none will.

    Raises:
        UserError: a concept without reference pictures, and what the scorers raise (missing
            weights, a concept that the detector does not know, a feature network without maps).
    """
    detector = detector_of(scorers, detect) if detect else None
    concepts = [concept for case in cases for concept in case.tasks]
    for concept in concepts:
        if not len(concept.reference):
            raise UserError(
                "scenario",
                concept.name,
                "needs reference pictures that generations are compared with.",
            )
        if detector is not None:
            detector.detects(concept.reference.images[:1], concept.name)
    if concepts:
        image = concepts[0].reference.images[:1]
        References(scorers, image, kinds).similarities(image)


def legacy(images: Tensor) -> Tensor:
    """What the released IMMA evaluation (arXiv 2311.18815) shows its networks: for comparison only.

    It takes pictures in [0, 1] for pictures in [-1, 1], so that all become pale (x/2 + 1/2), and
    shrinks them to 64 px.
    """
    x = images.float() / 510 + 0.5
    if images.shape[-1] > LEGACY_SIDE:
        x = F.interpolate(
            x, (LEGACY_SIDE, LEGACY_SIDE), mode="bilinear", antialias=True, align_corners=False
        )
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def prepared(images: Tensor, preprocessing: str) -> Tensor:
    """Pictures as the scorers shall see them; an empty set is an error."""
    if len(images) == 0:
        raise ValueError("a metric over an empty set: there is no picture")
    return legacy(images) if preprocessing == "legacy" else images


def clip_vectors(scorers: Scorers, images: Tensor) -> Tensor:
    """Unit vectors float64 [n, d]."""
    return torch.cat([_unit(scorers.clip.images(part)) for part in images.split(BATCH)])


def text_vectors(scorers: Scorers, texts: Sequence[str]) -> Tensor:
    """Unit vectors float64 [n, d]; equal texts are encoded once."""
    distinct = list(dict.fromkeys(texts))
    found = dict(zip(distinct, _unit(scorers.clip.texts(distinct)), strict=True))
    return torch.stack([found[text] for text in texts])


def feature_vectors(scorers: Scorers, images: Tensor) -> Tensor:
    """Pooled features float64 [n, d], as they come."""
    return torch.cat(
        [scorers.features.features(part).double().cpu() for part in images.split(BATCH)]
    )


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.double().cpu(), dim=1)


class References:
    """Similarity M of pictures to the reference pictures of one concept.

    ``clip`` and ``features``: mean cosine to all references. ``feature_lpips``: 1 − d/2 for the
    distance d to ONE reference, number i mod R for picture i (all pairs would cost R times as much;
    both models meet the same reference). d is a mean of ‖â − b̂‖² = 2 − 2cos over positions and
    stages, so 1 − d/2 is the mean cosine of maps. 1 − d, as with LPIPS, has no use here: d is near
    1 for two pictures of one concept, and SGR divides by M. ``lpips``: 1 − LPIPS to one reference
    in the same way, the similarity of arXiv 2412.15320 and 2311.18815.

    Args:
        images: uint8 [R, 3, s, s], already `prepared`.
        kinds: which of `SIMILARITIES`.

    Raises:
        UserError: ``lpips`` without a scorer for it.
    """

    def __init__(self, scorers: Scorers, images: Tensor, kinds: Sequence[str]) -> None:
        if "lpips" in kinds and scorers.lpips is None:
            told = (
                "holds lpips, and scorers.lpips is null: take scorers=real, or leave it "
                "out (feature_lpips needs none)."
            )
            raise UserError("eval.generation.similarities", list(kinds), told)
        self.scorers, self.images, self.kinds = scorers, images, tuple(kinds)
        self._mean: dict[str, Tensor] = {}
        if "clip" in kinds:
            self._mean["clip"] = clip_vectors(scorers, images).mean(0)
        if "features" in kinds:
            self._mean["features"] = F.normalize(feature_vectors(scorers, images), dim=1).mean(0)

    def similarities(self, images: Tensor) -> dict[str, Floats]:
        """Per kind, M of every picture [n]."""
        return self.scored(images, self.kinds)[0]

    def scored(
        self,
        images: Tensor,
        kinds: Sequence[str],
        clip: Tensor | None = None,
        features: bool = False,
    ) -> tuple[dict[str, Floats], Tensor | None]:
        """Per kind of ``kinds``, M of every picture [n]; unit vectors of the feature network [n,
        d], where it was asked.

        Args:
            clip: the pictures' unit vectors, where they are known.
            features: whether the feature network's vectors are wanted whatever the kinds.
        """
        asked, found = tuple(kinds), dict[str, Tensor]()
        if "clip" in asked:
            found["clip"] = (
                clip_vectors(self.scorers, images) if clip is None else clip
            ) @ self._mean["clip"]
        pooled = None
        if "feature_lpips" in asked:
            pooled, distance = self.scorers.features.compared(images, self._sized(images))
            found["feature_lpips"] = 1 - distance.double().cpu() / 2
        vectors = None
        if features or "features" in asked:
            vectors = (
                feature_vectors(self.scorers, images) if pooled is None else pooled.double().cpu()
            )
            vectors = F.normalize(vectors, dim=1)
        if "features" in asked and vectors is not None:
            found["features"] = vectors @ self._mean["features"]
        if "lpips" in asked and self.scorers.lpips is not None:
            other = self._sized(images)[torch.arange(len(images)) % len(self.images)]
            found["lpips"] = 1 - self.scorers.lpips.distance(images, other).double().cpu()
        return {kind: np.asarray(found[kind], dtype=float) for kind in asked}, vectors

    def _sized(self, images: Tensor) -> Tensor:
        """The references in the size of ``images``."""
        if self.images.shape[-1] == images.shape[-1]:
            return self.images
        resized = F.interpolate(
            self.images.float(), images.shape[-2:], mode="bilinear", antialias=True
        )
        return resized.round().to(torch.uint8)


def alike(scorers: Scorers, kind: str, a: Tensor, b: Tensor) -> Floats:
    """M by ``feature_lpips`` or ``lpips``, as in `References`, of pictures of equal index [n]."""
    found = []
    for x, y in zip(a.split(PAIRS), b.split(PAIRS), strict=True):
        if kind == "feature_lpips":
            found.append(1 - scorers.features.compared(x, y)[1].double().cpu() / 2)
        elif scorers.lpips is not None:
            found.append(1 - scorers.lpips.distance(x, y).double().cpu())
    return np.asarray(torch.cat(found), dtype=float)


_LAST: list[tuple[weakref.ref[Any], dict[Any, Any]]] = []


def memo(run: Any) -> dict[Any, Any]:
    """A store that lives as long as ``run`` and is shared by the metrics of it, so that pictures
    are made once.
    """
    if not _LAST or _LAST[0][0]() is not run:
        _LAST[:] = [(weakref.ref(run), {})]
    return _LAST[0][1]
