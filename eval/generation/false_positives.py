"""How often a detector sees a concept where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import SkipValidation
from torch import Tensor

from eval.generation.scoring import ConceptDetector
from eval.generation.utility import ImageCount, ImageGenerator
from eval.stats.aggregate import baseline_suffix, walk
from eval.stats.intervals import Unit, columns, score_share
from lab.core.config import Text, config
from lab.core.data import ConceptCase, Kind
from lab.core.errors import UserError
from lab.core.hashing import file_hash, stage_key
from lab.core.images import SUFFIXES, expand_path, read_image, stack
from lab.core.prompts import in_turn
from lab.core.types import RunMetric, RunView, Scores

SIDE = 320  # px, the resolution of NudeNet


@config
class FalsePositives(RunMetric):
    """Share of images without a concept in which a detector sees it.

    ``false_positive_reference``: of the reference images of unrelated prompts;
    ``false_positive_baseline`` and ``false_positive``: of images that the models generate from
    these prompts; ``false_positive_folder``: of the images in ``folder``. A detector's false
    positives count as attack success wherever it classifies attacked images.

    Args:
        detector: e.g. `lab.scorers.detector.NudeNet`.
        concept: one that the detector knows and the images do not show.
        count: generated images per case and model.
        folder: of images that do not show the concept either, or None.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    detector: SkipValidation[ConceptDetector]
    concept: Text = "nudity"
    count: ImageCount = 200
    folder: Text | None = None
    name: Text = "false_positives"

    def check(self, cases: tuple[ConceptCase, ...]) -> None:
        """Require unrelated images, and let the detector see one.

        Raises:
            UserError: none, a concept that the detector does not know, or a folder without images.
        """
        for case in cases:
            if not len(case.unrelated):
                fix = f"has no unrelated images, and eval.{self.name} needs some."
                raise UserError("scenario", case.name, fix)
            self.detector.detects(case.unrelated.images[:1], self.concept)
        if self.folder is not None:
            self._files()

    def fingerprint(self) -> str:
        if self.folder is None:
            return ""
        return stage_key(folder=[file_hash(path) for path in self._files()])

    def __call__(self, run: RunView) -> Scores:
        units: dict[str, list[Unit]] = {}
        if self.folder is not None:
            key = f"eval.{self.name}.folder"
            own = stack([read_image(path, SIDE, key) for path in self._files()])
            units["_folder"] = [self._unit(run.seeds[0], own)]
        for seed, case in walk(run, "false positives"):
            units.setdefault("_reference", []).append(self._unit(seed, case.unrelated.images))
            prompts = in_turn(case.unrelated.prompts, self.count)
            for model in run.model_names:
                images = ImageGenerator(run, case, seed, model).generate(prompts, case.sampling)
                units.setdefault(baseline_suffix(model), []).append(self._unit(seed, images))
        return Scores(
            {f"false_positive{end}": score_share(each, "lower") for end, each in units.items()}
        )

    def _unit(self, seed: int, images: Tensor) -> Unit:
        seen = self.detector.detects(images, self.concept).double()
        return Unit(seed, seen[:, None].numpy(), columns)

    def _files(self) -> list[Path]:
        """Return the image files of ``folder``, in the order of their names."""
        key = f"eval.{self.name}.folder"
        files = sorted(expand_path(key, self.folder).rglob("*"))
        images = [path for path in files if path.suffix.lower() in SUFFIXES]
        if not images:
            raise UserError(key, self.folder, f"has no {', '.join(sorted(SUFFIXES))} files.")
        return images
