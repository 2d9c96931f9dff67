"""A detector for concepts that no detector knows: similarity to the concept's own pictures,
calibrated on the case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.generation.scoring import References, prepared
from eval.stats.intervals import Floats
from lab.core.data import Concept, ConceptCase
from lab.core.errors import UserError

KINDS = ("features", "clip")  # at equal errors the first one counts


@dataclass(frozen=True)
class Cut:
    """A picture shows the concept where its similarity ``kind`` to the references is at least
    ``threshold``.
    """

    references: References
    kind: str
    threshold: float
    false_positive: float
    false_negative: float


class ReferenceDetector:
    """Implements `eval.generation.scoring.Detector` for the concepts of one case.

    The similarity is the mean cosine to the concept's reference pictures. Positives are pictures of
    the concept that are not among these (the immunizer's and the attacker's own), negatives those
    of the other concepts, of its class without it (``prior``) and of unrelated things. The
    threshold has the least sum of both error rates; of feature network and CLIP the one with fewer
    errors decides. ``rates`` are measured on the pictures that set the threshold: with few pictures
    they flatter it.

    Raises:
        UserError: a concept that has no such pictures, or that its pictures do not tell apart from
            others.
    """

    def __init__(self, scorers: Any, case: ConceptCase, names: Iterable[str], key: str) -> None:
        self._cuts = {name: self._cut(scorers, case, case.task(name), key) for name in names}

    @property
    def rates(self) -> Mapping[str, Mapping[str, float]]:
        return {
            name: {"false_positive": cut.false_positive, "false_negative": cut.false_negative}
            for name, cut in self._cuts.items()
        }

    def detects(self, images: Tensor, name: str) -> Tensor:
        cut = self._cuts[name]
        return torch.from_numpy(cut.references.similarities(images)[cut.kind] >= cut.threshold)

    @staticmethod
    def _cut(scorers: Any, case: ConceptCase, concept: Concept, key: str) -> Cut:
        shown = [concept.own.images, concept.train.images]
        others = [
            p.images
            for c in case.tasks
            if c.name != concept.name
            for p in (c.own, c.train, c.reference)
        ]
        others += [concept.prior.images, case.keep.images, case.unrelated.images]
        yes, no = (
            torch.cat([p for p in parts if len(p)] or [parts[0]]) for parts in (shown, others)
        )
        if not len(yes) or not len(no):
            told = (
                "needs pictures of the concept and of other things beside its references "
                "to be told apart."
            )
            raise UserError(key, concept.name, told)
        found = []
        for kind in KINDS:
            references = References(
                scorers, prepared(concept.reference.images, "standard"), (kind,)
            )
            high, low = (references.similarities(prepared(p, "standard"))[kind] for p in (yes, no))
            found.append(Cut(references, kind, *best_threshold(high, low)))
        best = min(found, key=lambda c: c.false_positive + c.false_negative)
        if best.false_positive + best.false_negative >= 1:
            told = (
                "its pictures are not told apart from others by features or CLIP; give "
                "eval.audit another detector."
            )
            raise UserError(key, concept.name, told)
        return best


def best_threshold(positive: Floats, negative: Floats) -> tuple[float, float, float]:
    """(threshold, false-positive rate, false-negative rate) with the least sum of the rates.

    Youden, Cancer 3 (1950) 32. Of equal thresholds the middle one.
    """
    values = np.unique(np.concatenate([positive, negative]))
    middles = np.concatenate([[values[0]], (values[1:] + values[:-1]) / 2])
    false_positive = (negative[None] >= middles[:, None]).mean(1)
    false_negative = (positive[None] < middles[:, None]).mean(1)
    total = false_positive + false_negative
    best = np.flatnonzero(total <= total.min() + 1e-12)
    at = int(best[len(best) // 2])
    return float(middles[at]), float(false_positive[at]), float(false_negative[at])
