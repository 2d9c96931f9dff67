"""The networks that score images, the similarities M of docs/reference/methods.md §4.2, and what a
prompt names.

Images are uint8 [n, 3, s, s] here; a network resizes and normalises them itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.stats.intervals import Floats
from lab.core.data import Concept, ConceptCase
from lab.core.errors import UserError
from lab.core.images import resize_bytes
from lab.scorers.load import Scorers

Similarity = Literal["clip", "features", "feature_lpips", "lpips"]
COSINES: tuple[Similarity, ...] = ("clip", "features")  # the others look at every pair of images
BATCH = 256  # images that are handed to a network at once
PAIRS = 32  # pairs that are compared at once: the maps of one side are all kept
LEGACY_SIDE = 64  # px


class ConceptDetector(Protocol):
    """Says whether an image shows a concept. ``rates``: concept → its ``false_positive`` and
    ``false_negative``.
    """

    @property
    def rates(self) -> Mapping[str, Mapping[str, float]]: ...

    def detects(self, images: Tensor, name: str) -> Tensor: ...


@runtime_checkable
class Labeller(Protocol):
    """A detector that also names the object and the style of any image: probabilities [n, classes]
    of both.
    """

    def probabilities(self, images: Tensor) -> Mapping[Literal["object", "style"], Tensor]: ...


@runtime_checkable
class Namer(Labeller, Protocol):
    """A detector that also says what its classes are called, in their order."""

    @property
    def names(self) -> Mapping[str, Sequence[str]]: ...


def detector_of(scorers: Scorers, key: str) -> ConceptDetector:
    """Return the detector.

    Raises:
        UserError: there is none.
    """
    if scorers.detector is None:
        fix = "needs a detector that knows the concepts."
        raise UserError(f"{key}.scorers", "detector=null", fix)
    return scorers.detector


def check_scorers(
    scorers: Scorers,
    cases: Iterable[ConceptCase],
    kinds: Sequence[Similarity],
    detect: str | None = None,
) -> None:
    """Score a reference image of every concept by the detector, and one by the networks, so that
    what a scorer lacks shows before hours of attacks.

    Args:
        kinds: similarities that will be computed.
        detect: config key of the metric that needs the detector; None: none does.

    Raises:
        UserError: a concept without reference images, and what the scorers raise (missing weights,
            a concept that the detector does not know, a feature network without maps).
    """
    detector = detector_of(scorers, detect) if detect else None
    concepts = [concept for case in cases for concept in case.tasks]
    for concept in concepts:
        if not len(concept.reference):
            fix = "needs reference images that generations are compared with."
            raise UserError("scenario", concept.name, fix)
        if detector is not None:
            detector.detects(concept.reference.images[:1], concept.name)
    for kind in kinds if concepts else ():
        image = concepts[0].reference.images[:1]
        References(scorers, image).similarity(kind, image)


def prepare(images: Tensor, preprocessing: str) -> Tensor:
    """Return images as the scorers shall see them.

    ``legacy`` is what the released IMMA evaluation (arXiv 2311.18815) shows its networks, for
    comparison only. It takes images in [0, 1] for images in [-1, 1], so that all become pale
    (x/2 + 1/2), and shrinks them to 64 px.
    """
    if preprocessing == "standard":
        return images
    x = images.float() / 510 + 0.5
    if images.shape[-1] > LEGACY_SIDE:
        x = F.interpolate(x, (LEGACY_SIDE, LEGACY_SIDE), mode="bilinear", antialias=True)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def encode(scorers: Scorers, kind: str, images: Tensor) -> Tensor:
    """Return vectors float64 [n, d] of ``clip``, or of the feature network as they come."""
    network = scorers.clip.images if kind == "clip" else scorers.features.features
    return torch.cat([network(part).double().cpu() for part in images.split(BATCH)])


def unit_vectors(scorers: Scorers, kind: str, images: Tensor) -> Tensor:
    return F.normalize(encode(scorers, kind, images), dim=1)


def text_vectors(scorers: Scorers, texts: Sequence[str]) -> Tensor:
    """Return unit vectors float64 [n, d]; equal texts are encoded once."""
    distinct = list(dict.fromkeys(texts))
    vectors = F.normalize(scorers.clip.texts(distinct).double().cpu(), dim=1)
    return vectors[[distinct.index(text) for text in texts]]


def similarity_of_pairs(scorers: Scorers, kind: str, a: Tensor, b: Tensor) -> Tensor:
    """Return M by ``feature_lpips`` or ``lpips``, as in `References`, of images of equal index."""
    pairs = zip(a.split(PAIRS), b.split(PAIRS), strict=True)
    return torch.cat([_by_distance(scorers, kind, x, y) for x, y in pairs])


def _by_distance(scorers: Scorers, kind: str, images: Tensor, others: Tensor) -> Tensor:
    """Return M by ``feature_lpips`` or ``lpips`` of image i to the one with number i mod R of
    ``others``.

    Raises:
        UserError: ``lpips`` without a scorer for it.
    """
    if kind == "feature_lpips":
        return 1 - scorers.features.distance(images, others).double().cpu() / 2
    if scorers.lpips is None:
        fix = (
            "scorers.lpips is null: take scorers=real, or leave it out (feature_lpips needs none)."
        )
        raise UserError("eval.generation.similarities", kind, fix)
    others = others[torch.arange(len(images)) % len(others)]
    return 1 - scorers.lpips.distance(images, others).double().cpu()


class References:
    """Similarity M of images to the reference images of one concept.

    ``clip`` and ``features``: mean cosine to all references. ``feature_lpips``: 1 − d/2 for the
    distance d to ONE reference, number i mod R for image i (all pairs would cost R times as much;
    both models meet the same reference). d is a mean of ‖â − b̂‖² = 2 − 2cos over positions and
    stages, so 1 − d/2 is the mean cosine of maps. 1 − d, as with LPIPS, has no use here: d is near
    1 for two images of one concept, and SGR divides by M. ``lpips``: 1 − LPIPS to one reference in
    the same way, the similarity of arXiv 2412.15320 and 2311.18815.

    Args:
        images: uint8 [R, 3, s, s], as `prepare` returns them.
    """

    def __init__(self, scorers: Scorers, images: Tensor) -> None:
        self.scorers, self.images = scorers, images
        self._means: dict[str, Tensor] = {}

    def cosine(self, kind: str, vectors: Tensor) -> Tensor:
        """Return the mean cosine [n] of unit vectors [n, d] to all references."""
        if kind not in self._means:
            self._means[kind] = unit_vectors(self.scorers, kind, self.images).mean(0)
        return vectors @ self._means[kind]

    def similarity(self, kind: str, images: Tensor) -> Tensor:
        """Return M of every image, float64 [n].

        Raises:
            UserError: ``lpips`` without a scorer for it.
        """
        if kind in COSINES:
            return self.cosine(kind, unit_vectors(self.scorers, kind, images))
        return _by_distance(self.scorers, kind, images, resize_bytes(self.images, images.shape[-1]))


# ---- prompts


def named_objects(objects: Sequence[str], prompt: str) -> tuple[int, ...]:
    """Return the numbers of the ``objects`` that ``prompt`` names as whole words; of names within
    names the longest only.
    """
    left, named = prompt.lower(), []
    for name in sorted(objects, key=len, reverse=True):
        left, times = re.subn(rf"\b{re.escape(name.lower())}\b", " ", left)
        named += [objects.index(name)] if times else []
    return tuple(sorted(named))


def shows_named(names: Sequence[str], prompts: Sequence[str], likeliest: Tensor) -> list[bool]:
    """Return per image whether its likeliest class [n] is one that its prompt names, true where it
    names none.
    """
    wanted = [named_objects(names, prompt) for prompt in prompts]
    return [not w or best in w for w, best in zip(wanted, likeliest.tolist(), strict=True)]


def shows_objects(detector: Namer, prompts: Sequence[str], images: Tensor) -> Tensor:
    """Return bool [n]: the likeliest object of an image is one that its prompt names, true where it
    names none.
    """
    likeliest = detector.probabilities(images)["object"].argmax(1)
    return torch.tensor(shows_named(detector.names["object"], prompts, likeliest))


def is_prompt_adherent(
    detector: ConceptDetector,
    concept: Concept,
    images: Tensor,
    prompts: Sequence[str],
    detected: Floats,
) -> Floats:
    """Return 0 or 1 per image: it shows the concept *and* the object that its prompt names.

    A style detector sees colours and strokes; it also says yes to an image in which nothing else is
    left (a model that was broken on the way, whose every image is a purple gradient, "has learned"
    sunset). An attacker wants images of something. Detections alone stay the headline, the reading
    that is hard on the immunizer; this one stands beside them. A concept that is an object, and a
    prompt that names no object which the detector knows, ask for nothing more.

    Args:
        images: uint8 [n, 3, s, s], made by ``prompts`` [n].
        detected: [n].
    """
    if concept.kind != "style" or not isinstance(detector, Namer):
        return detected
    return detected * shows_objects(detector, prompts, images).numpy()
