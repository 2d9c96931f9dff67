"""How similar the targets of a case are to each other."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from eval.generation.evaluated_run import ImageMetric
from eval.generation.scoring import unit_vectors
from eval.stats.aggregate import grouped, walk
from eval.stats.intervals import score_samples
from lab.core.config import Text, config
from lab.core.types import BASELINE, RunView, Scores
from lab.models.diffusion import encoded, word_positions

KINDS = ("text", "image")


@config
class TargetSimilarity(ImageMetric):
    """Mean cosine over all pairs of targets of a case, before any attack.

    ``target_similarity_text``: between the mean rows of the baseline's text encoder for the tokens
    of the targets' words, the rows that the merge maps. ``target_similarity_image``: between the
    mean unit CLIP vectors of the attacker's images. Cases of one target are left out.
    """

    needs_attack: ClassVar[bool] = False

    name: Text = "target_similarity"

    def __call__(self, run: RunView) -> Scores:
        figures: dict[str, dict[tuple[int, str], float | None]] = {kind: {} for kind in KINDS}
        for seed, case in walk(run, "similarity of targets"):
            model = run.model(BASELINE, case, seed)
            words = [target.words for target in case.targets]
            rows = [encoded(model, [w])[0, word_positions(model, w, w)].mean(0) for w in words]
            images = [
                unit_vectors(self.scorers, "clip", target.train.images).mean(0)
                for target in case.targets
            ]
            first, second = torch.triu_indices(len(words), len(words), 1)
            for kind, vectors in zip(KINDS, (rows, images), strict=True):
                unit = F.normalize(torch.stack(vectors).double(), dim=1)
                cosines = (unit[first] * unit[second]).sum(1)
                figures[kind][seed, case.name] = float(cosines.mean()) if len(first) else None
        return Scores(
            {
                f"target_similarity_{kind}": score_samples(
                    grouped(run, values), "neutral", "a single target", bounds=(-1.0, 1.0)
                )
                for kind, values in figures.items()
            }
        )
