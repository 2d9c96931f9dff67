"""What immunization costs before any attack: unrelated prompts, painted by θ_0 and θ_I from the
same latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Annotated, ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from eval.generation.evaluated_run import ImageMetric
from eval.generation.scoring import (
    Labeller,
    Namer,
    check_scorers,
    encode,
    in_turn,
    named_objects,
    shows_named,
    text_vectors,
    unit_vectors,
)
from eval.stats.aggregate import baseline_suffix, walk
from eval.stats.intervals import SHARE, UNBOUNDED, Better, Unit, columns, score_units
from lab.core.config import Flag, NonNegative, OptionalPrompt, Prompts, Text, config
from lab.core.data import ConceptCase, Sampling
from lab.core.errors import UserError
from lab.core.hashing import digest, model_settings, stage_key
from lab.core.sources import source_hash
from lab.core.types import RunView, Score, Scores
from lab.models.diffusion import DiffusionModel
from lab.scorers.features import frechet_distance, kernel_distance

HEADS = ("object", "style")
COSTS = ("_drift", "_drop")  # quantities that are better when lower
BOUNDS = {"clip_drift": (0.0, 2.0), "feature_drift": (0.0, 2.0), "clip_t": (-1.0, 1.0)}
# images; a block has latents of its own, so that a smaller count is the beginning of a larger one
BLOCK = 32
ImageCount = Annotated[int, Field(strict=True, ge=2)]


@config
class Utility(ImageMetric):
    """Similarity, prompt adherence, detections and feature distance on ``case.unrelated``; compares
    θ_I with θ_0.

    ``utility_clip_drift``: 1 − CLIP cosine of the images of both models from the same latents;
    ``utility_feature_drift`` the same with the feature network. ``utility_clip_t``: cosine to the
    prompt.
    ``utility_detection``: share of images whose likeliest object AND likeliest style are those that
    the same detector sees in the reference image of the prompt; ``utility_object``,
    ``utility_style``: one of them alone.
    ``utility_agreement``: share of images where it sees the same in both models. ``_baseline``
    stands for θ_0, ``_drop`` for baseline − immunized, with a paired interval: a resample draws an
    image of both models at once. Every prompt counts alike, however many images it got, and a
    resample draws prompts.
    ``utility_frechet``, ``utility_frechet_baseline``: Fréchet distance of features to the reference
    images (biased upwards by few images, alike in both models, so no interval is given: compare the
    two). ``utility_kernel``, ``utility_kernel_baseline``: their kernel distance (unbiased).

    Further settings add suffixes to drift, CLIP-T, detection and agreement: ``_guidance_S`` for
    another guidance scale, ``_negative`` for a negative prompt, ``_compositions`` for prompts
    without reference images. There the object and the style must be ones that the prompt names;
    detection is left out where a prompt names neither.

    Args:
        scorers: without a detector that names objects and styles the detection figures are left
            out.
        count: images per case and setting; prompts start again where they run out.
        guidances: further guidance scales; the scenario's own is skipped.
        negative: a negative prompt, or "" for none.
        compositions: prompts, e.g. an object in a style that training never showed.
        features: score with the feature network too (``utility_feature_drift``,
            ``utility_frechet``, ``utility_kernel``).
    """

    needs_models: ClassVar[int] = 2
    needs_attack: ClassVar[bool] = False

    name: Text = "utility"
    count: ImageCount = 200
    guidances: tuple[NonNegative, ...] = ()
    negative: OptionalPrompt = ""
    compositions: Prompts = ()
    features: Flag = True

    def texts(self) -> dict[str, str]:
        """Return config key → text that the model will read."""
        key = f"eval.{self.name}"
        listed = {f"{key}.compositions[{i}]": prompt for i, prompt in enumerate(self.compositions)}
        return {f"{key}.negative": self.negative, **listed}

    def check(self, cases: tuple[ConceptCase, ...]) -> None:
        """Require unrelated prompts, and score one image by every network. Raises as
        `eval.generation.scoring.check_scorers`.
        """
        for case in cases:
            self._settings(case)
        check_scorers(self.scorers, cases, ("clip", "features") if self.features else ("clip",))

    def __call__(self, run: RunView) -> Scores:
        out = Scores()
        lost = len(run.diverged)
        note = f"cases that diverged and are left out: {lost}" if lost else None
        for suffix, cells in self.compare(run).items():
            out.metrics |= utility_scores(cells, suffix, note)
        out.tables["utility"] = [
            {"figure": name, "value": s.value, "low": s.low, "high": s.high, "n": s.n}
            for name, s in out.metrics.items()
        ]
        return out

    def compare(self, run: RunView) -> dict[str, list[CaseUtility]]:
        """Return suffix of a setting → what the scorers see, case by case."""
        out: dict[str, list[CaseUtility]] = {}
        for seed, case in walk(run, "unrelated prompts"):
            settings = self._settings(case)
            images: dict[str, dict[str, Tensor]] = {setting.suffix: {} for setting in settings}
            for model in run.model_names:  # one after the other: only one is in memory
                painter = Painter(run, case, seed, model)
                for setting in settings:
                    prompts = in_turn(setting.prompts, self.count)
                    images[setting.suffix][model] = painter.paint(prompts, setting.sampling)
            for setting in settings:
                cell = self._score(seed, case.name, setting, images[setting.suffix])
                out.setdefault(setting.suffix, []).append(cell)
        return out

    def _settings(self, case: ConceptCase) -> list[Setting]:
        own = case.sampling
        prompts, images = case.unrelated.prompts, case.unrelated.images
        if not prompts:
            fix = "has no unrelated prompts, and eval.utility needs some."
            raise UserError("scenario", case.name, fix)
        out = [Setting("", prompts, images, own)]
        for scale in dict.fromkeys(s for s in self.guidances if s != own.guidance):
            suffix = f"_guidance_{scale:g}".replace(".", "_")
            out.append(Setting(suffix, prompts, images, replace(own, guidance=scale)))
        if self.negative:
            sampling = replace(own, negative=self.negative)
            out.append(Setting("_negative", prompts, images, sampling))
        if self.compositions:
            out.append(Setting("_compositions", self.compositions, None, own))
        return out

    def _score(
        self, seed: int, case: str, setting: Setting, images: dict[str, Tensor]
    ) -> CaseUtility:
        prompts = in_turn(setting.prompts, self.count)
        texts = text_vectors(self.scorers, prompts)
        clip = {model: unit_vectors(self.scorers, "clip", x) for model, x in images.items()}
        baseline, immunized = clip.values()
        rows = {"clip_drift": 1 - (baseline * immunized).sum(1)}
        for model, vectors in clip.items():
            rows[f"clip_t{baseline_suffix(model)}"] = (vectors * texts).sum(1)
        rows |= self._detections(images, setting, prompts)
        distances: dict[str, float] = {}
        if self.features and setting.suffix == "" and setting.images is not None:
            features = {m: encode(self.scorers, "features", x) for m, x in images.items()}
            left, right = (F.normalize(v, dim=1) for v in features.values())
            rows["feature_drift"] = 1 - (left * right).sum(1)
            real = encode(self.scorers, "features", setting.images)
            for model, vectors in features.items():
                end = baseline_suffix(model)
                distances[f"frechet{end}"] = frechet_distance(vectors, real)
                distances[f"kernel{end}"] = kernel_distance(vectors, real)
        values = pd.DataFrame({name: row.double().cpu().numpy() for name, row in rows.items()})
        for base in ("clip_t", "detection", *HEADS):
            if base in values:
                values[f"{base}_drop"] = values[f"{base}_baseline"] - values[base]
        return CaseUtility(seed, case, values.groupby(prompts, sort=False).mean(), distances)

    def _detections(
        self, images: dict[str, Tensor], setting: Setting, prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        detector = self.scorers.detector
        if not isinstance(detector, Labeller):
            return {}
        labels = {model: _likeliest(detector, x) for model, x in images.items()}
        baseline, immunized = labels.values()
        rows = {"agreement": (baseline == immunized).all(0)}
        if setting.images is not None:
            rows_of_prompts = torch.arange(self.count) % len(setting.images)
            true = _likeliest(detector, setting.images[rows_of_prompts])
            right = {model: label == true for model, label in labels.items()}
        else:
            right = _as_named(detector, prompts, labels)
        for model, both in right.items():
            end = baseline_suffix(model)
            rows |= {f"{head}{end}": row for head, row in zip(HEADS, both, strict=True)}
            rows[f"detection{end}"] = both.all(0)
        return rows


@dataclass(frozen=True)
class Setting:
    """How unrelated prompts are painted."""

    suffix: str
    prompts: tuple[str, ...]
    images: Tensor | None  # reference image of every prompt
    sampling: Sampling


@dataclass(frozen=True)
class CaseUtility:
    """One case and seed: a row of quantities per prompt, since images of one prompt are no
    independent evidence on others; distances to the reference images by name.
    """

    seed: int
    case: str
    by_prompt: pd.DataFrame
    distances: dict[str, float]


def utility_scores(cells: Sequence[CaseUtility], suffix: str, note: str | None) -> dict[str, Score]:
    """Return every figure of one setting."""
    out: dict[str, Score] = {}
    for quantity in cells[0].by_prompt:
        base = quantity.removesuffix("_baseline")
        end = quantity.removeprefix(base)
        better: Better = "neutral" if end else "lower" if base.endswith(COSTS) else "higher"
        bounds = BOUNDS.get(base, UNBOUNDED if base.endswith("_drop") else SHARE)
        units = [Unit(c.seed, c.by_prompt[[quantity]].to_numpy(), columns) for c in cells]
        out[f"utility_{base}{suffix}{end}"] = score_units(units, better, note=note, bounds=bounds)
    distances = pd.DataFrame([c.distances for c in cells]).groupby([c.seed for c in cells]).mean()
    for quantity in distances:
        base = quantity.removesuffix("_baseline")
        end = quantity.removeprefix(base)
        few = "biased upwards by few images; compare with the other model"
        out[f"utility_{base}{suffix}{end}"] = Score(
            float(distances[quantity].mean()),
            n=len(distances),
            better="neutral" if end else "lower",
            note=few if base == "frechet" else None,
        )
    return out


def _likeliest(detector: Labeller, images: Tensor) -> Tensor:
    """Return the likeliest object and style of every image: int64 [2, n]."""
    probabilities = detector.probabilities(images)
    return torch.stack([probabilities["object"].argmax(1), probabilities["style"].argmax(1)]).cpu()


def _as_named(
    detector: Labeller, prompts: Sequence[str], labels: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return model → bool [2, n]: whether the likeliest object and style are among those that the
    prompt names, true where it names none of that kind. Empty where a prompt names neither, or the
    detector's classes have no names.
    """
    if not isinstance(detector, Namer):
        return {}
    names = [detector.names[head] for head in HEADS]
    if not all(any(named_objects(known, prompt) for known in names) for prompt in prompts):
        return {}
    return {
        model: torch.tensor(
            [shows_named(n, prompts, row) for n, row in zip(names, both, strict=True)]
        )
        for model, both in labels.items()
    }


# ---- images of unattacked models


@dataclass
class Painter:
    """Paints with one model of a run; the stage cache holds what any run has painted with the same
    weights.
    """

    run: RunView
    case: ConceptCase
    seed: int
    model_name: str

    @cached_property
    def model(self) -> DiffusionModel:
        return self.run.model(self.model_name, self.case, self.seed)

    @cached_property
    def key(self) -> str:
        """Of everything that decides an image besides prompt, latents and sampling."""
        sources = [source_hash(__name__), source_hash(type(self.model).__module__)]
        weights = digest(*self.model.state_dict().values())
        return stage_key(weights=weights, beside=model_settings(self.model), sources=sources)

    def paint(self, prompts: Sequence[str], sampling: Sampling) -> Tensor:
        """Return uint8 [prompts, 3, s, s].

        Latents depend on seed, case and number alone: models and settings share them.
        """
        blocks = []
        for number, start in enumerate(range(0, len(prompts), BLOCK)):
            block = list(prompts[start : start + BLOCK])
            settings = asdict(replace(sampling, count=1))
            key = stage_key(
                model=self.key,
                case=self.case.name,
                seed=self.seed,
                number=number,
                prompts=block,
                sampling=settings,
            )
            compute = partial(self._paint_block, block, number, sampling)
            blocks.append(self.run.cached(key, compute)["images"])
        return torch.cat(blocks)

    def _paint_block(
        self, prompts: list[str], number: int, sampling: Sampling
    ) -> dict[str, Tensor]:
        latents = self.model.latents(BLOCK, self.seed, "utility", self.case.name, number)
        return {"images": self.model.generate(prompts, latents[: len(prompts)], sampling)}
