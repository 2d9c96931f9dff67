"""What immunization costs before anybody attacks: unrelated prompts, painted by θ_0 and θ_I from
the same latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.generation.painting import paint
from eval.generation.prompt_adherence import Namer, asked
from eval.generation.reading import each_case
from eval.generation.scoring import (
    Labeller,
    Scorers,
    clip_vectors,
    dry_open,
    feature_vectors,
    text_vectors,
)
from eval.stats.aggregate import Better, diverged_of, model_name_names
from eval.stats.intervals import Floats, Unit, columns, score
from lab.core.data import ConceptCase, Kind, Sampling
from lab.core.errors import UserError
from lab.core.options import count as whole
from lab.core.options import flag, number
from lab.core.prompts import text, texts
from lab.core.types import BASELINE, RunMetric, RunView, Score, Scores
from lab.scorers.features import frechet_distance

HEADS = ("object", "style")


class Utility(RunMetric):
    """Similarity, prompt adherence, detections and feature distance on ``case.unrelated``; compares
    θ_I with θ_0.

    ``utility_clip_drift``: 1 − CLIP cosine of the pictures of both models from the same latents;
    ``utility_feature_drift`` the same with the feature network. ``utility_clip_t``: cosine to the
    prompt.
    ``utility_detection``: share of pictures whose likeliest object AND likeliest style are those
    that the same detector sees in the reference picture of the prompt; ``utility_object``,
    ``utility_style``: one of them alone.
    ``utility_agreement``: share of pictures where it sees the same in both models. ``_baseline``
    stands for θ_0, ``_drop`` for baseline − immunized, with a paired interval: a resample draws a
    picture of both models at once. Every prompt counts alike, however many pictures it got, and a
    resample draws prompts.
    ``utility_frechet``, ``utility_frechet_baseline``: Fréchet distance of features to the reference
    pictures (biased upwards by few pictures, alike in both models, so no interval is given: compare
    the two).

    Further settings add suffixes to drift, CLIP-T, detection and agreement: ``_guidance_S`` for
    another guidance scale, ``_negative`` for a negative prompt, ``_compositions`` for prompts
    without reference pictures. There the object and the style must be ones that the prompt names;
    detection is left out where a prompt names neither.

    Args:
        scorers: without a detector that names objects and styles the detection figures are left
            out.
        count: pictures per case and setting; prompts start again where they run out.
        guidances: further guidance scales; the scenario's own is skipped.
        negative: a negative prompt, or "" for none.
        compositions: prompts, e.g. an object in a style that training never showed.
        features: scorer with the feature network too (``utility_feature_drift``,
            ``utility_frechet``).
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})
    needs_models: ClassVar[int] = 2
    needs_attack: ClassVar[bool] = False

    def __init__(
        self,
        scorers: Scorers,
        name: str = "utility",
        count: int = 200,
        guidances: Sequence[float] = (),
        negative: str = "",
        compositions: Sequence[str] = (),
        features: bool = True,
    ) -> None:
        key = f"eval.{name}"
        self.scorers, self.name, self.features = scorers, name, flag(f"{key}.features", features)
        self.count = whole(f"{key}.count", count, 2)
        self.guidances = tuple(number(f"{key}.guidances", g, low=0) for g in guidances)
        self.negative = text(f"{key}.negative", negative, empty=True)
        self.compositions = texts(f"{key}.compositions", compositions, least=0, repeats=True)

    def texts(self) -> dict[str, str]:
        """Hook of `lab.runner.assemble.check_cases`."""
        key = f"eval.{self.name}"
        listed = {f"{key}.compositions[{i}]": prompt for i, prompt in enumerate(self.compositions)}
        return {f"{key}.negative": self.negative, **listed}

    def check(self, cases: tuple[ConceptCase, ...]) -> None:
        """Before anything runs: there are unrelated prompts, and the scorers work. Raises as
        `eval.generation.scoring.dry_open`.
        """
        for case in cases:
            self._settings(case)
        dry_open(self.scorers, cases, ("clip", "features") if self.features else ("clip",))

    def __call__(self, run: RunView) -> Scores:
        out = Scores(tables={"utility": []})
        lost = len(diverged_of(run))
        note = f"cases that diverged and are left out: {lost}" if lost else None
        for suffix, cells in self.scored(run).items():
            metrics = scores(cells, suffix, note)
            out.metrics |= metrics
            for name, s in metrics.items():
                row = {"figure": name, "value": s.value, "low": s.low, "high": s.high, "n": s.n}
                out.tables["utility"].append(row)
        return out

    def scored(self, run: RunView) -> dict[str, list[Scorerd]]:
        """Suffix of a setting → what the scorers see, case by case.

        Raises:
            ValueError: no case.
        """
        found: dict[str, list[Scorerd]] = {}
        for seed, case in each_case(run, "unrelated prompts"):
            for setting in self._settings(case):
                pictures = {
                    model_name: paint(
                        run, case, seed, model_name, setting.prompts, setting.sampling, self.count
                    )
                    for model_name in model_name_names(run)
                }
                found.setdefault(setting.suffix, []).append(
                    self._scorer(seed, case.name, setting, pictures)
                )
        if not found:
            raise ValueError("a metric over an empty set: no case")
        return found

    def _settings(self, case: ConceptCase) -> list[_Setting]:
        own = case.sampling
        asked, images = case.unrelated.prompts, case.unrelated.images
        if not asked:
            raise UserError(
                "scenario", case.name, "has no unrelated prompts, and eval.utility needs some."
            )
        out = [_Setting("", asked, images, own)]
        for scale in dict.fromkeys(self.guidances):
            if scale != own.guidance:
                suffix = f"_guidance_{scale:g}".replace(".", "_")
                out.append(_Setting(suffix, asked, images, replace(own, guidance=scale)))
        if self.negative:
            out.append(_Setting("_negative", asked, images, replace(own, negative=self.negative)))
        if self.compositions:
            out.append(_Setting("_compositions", self.compositions, None, own))
        return out

    def _scorer(
        self, seed: int, case: str, setting: _Setting, painted: dict[str, Tensor]
    ) -> Scorerd:
        rows: dict[str, Floats] = {}
        texts = text_vectors(self.scorers, setting.asked(self.count))
        clip = {
            model_name: clip_vectors(self.scorers, images) for model_name, images in painted.items()
        }
        baseline, immunized = clip.values()
        rows["clip_drift"] = _array(1 - (baseline * immunized).sum(1))
        for model_name, vectors in clip.items():
            rows[f"clip_t{_end(model_name)}"] = _array((vectors * texts).sum(1))
        references = None
        if setting.images is not None:
            references = setting.images[torch.arange(self.count) % len(setting.images)]
        rows |= self._detections(painted, references, setting.asked(self.count))
        frechet = {}
        if self.features and setting.suffix == "":
            features = {
                model_name: feature_vectors(self.scorers, images)
                for model_name, images in painted.items()
            }
            left, right = (F.normalize(v, dim=1) for v in features.values())
            rows["feature_drift"] = _array(1 - (left * right).sum(1))
            assert setting.images is not None
            whole = feature_vectors(self.scorers, setting.images)
            frechet = {model_name: frechet_distance(v, whole) for model_name, v in features.items()}
        return Scorerd(seed, case, tuple(setting.asked(self.count)), rows, frechet)

    def _detections(
        self, painted: dict[str, Tensor], references: Tensor | None, prompts: Sequence[str]
    ) -> dict[str, Floats]:
        detector = self.scorers.detector
        if not isinstance(detector, Labeller):
            return {}
        seen = {model_name: _labels(detector, images) for model_name, images in painted.items()}
        baseline, immunized = seen.values()
        rows = {"agreement": _array((baseline == immunized).all(0))}
        if references is not None:
            true = _labels(detector, references)
            right = {model_name: labels == true for model_name, labels in seen.items()}
        else:
            right = _named(detector, prompts, seen)
        for model_name, found in right.items():
            for head, one in zip(HEADS, found, strict=True):
                rows[f"{head}{_end(model_name)}"] = _array(one)
            rows[f"detection{_end(model_name)}"] = _array(found.all(0))
        return rows


@dataclass(frozen=True)
class _Setting:
    suffix: str
    prompts: tuple[str, ...]
    images: Tensor | None  # reference picture of every prompt
    sampling: Sampling

    def asked(self, count: int) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in range(count)]


@dataclass(frozen=True)
class Scorerd:
    """One case and seed: the prompt of every picture, quantity → [pictures], and Fréchet distance
    by model.
    """

    seed: int
    case: str
    prompts: tuple[str, ...]
    rows: dict[str, Floats]
    frechet: dict[str, float]

    def by_prompt(self, quantities: Sequence[str]) -> Floats:
        """[prompts, quantities]: pictures of one prompt are no independent evidence on others."""
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(self.prompts))}
        index = np.array([distinct[prompt] for prompt in self.prompts])
        sums = [np.bincount(index, self.rows[quantity]) for quantity in quantities]
        return np.asarray(np.stack(sums, axis=1) / np.bincount(index)[:, None])


def scores(cells: Sequence[Scorerd], suffix: str, note: str | None) -> dict[str, Score]:
    """Every figure of one setting."""
    out: dict[str, Score] = {}
    quantities = list(cells[0].rows)

    def add(name: str, better: Better, *used: str, **kwargs: Any) -> None:
        units = [
            Unit(c.seed, c.by_prompt(used), columns if len(used) == 1 else _difference)
            for c in cells
        ]
        out[f"utility_{name}"] = score(units, better, note=note, **kwargs)

    for quantity in quantities:
        base, baseline = quantity.removesuffix("_baseline"), quantity.endswith("_baseline")
        drift = base.endswith("drift")
        better: Better = "neutral" if baseline else "lower" if drift else "higher"
        bounds = (0.0, 2.0) if drift else (-1.0, 1.0) if base == "clip_t" else (0.0, 1.0)
        add(f"{base}{suffix}{'_baseline' if baseline else ''}", better, quantity, bounds=bounds)
    for base in ("clip_t", "detection", *HEADS):
        if f"{base}_baseline" in quantities:
            add(f"{base}_drop{suffix}", "lower", f"{base}_baseline", base)
    for model_name in cells[0].frechet:
        by_seed: dict[int, list[float]] = {}
        for c in cells:
            by_seed.setdefault(c.seed, []).append(c.frechet[model_name])
        value = float(np.mean([np.mean(v) for v in by_seed.values()]))
        told = (
            f"biased upwards: {len(cells[0].rows['clip_drift'])} pictures; compare with "
            "the other model"
        )
        better = "neutral" if model_name == BASELINE else "lower"
        out[f"utility_frechet{suffix}{_end(model_name)}"] = Score(
            value, n=len(by_seed), better=better, note=told
        )
    return out


def _labels(detector: Labeller, images: Tensor) -> Tensor:
    """The likeliest object and style of every picture: int64 [2, n]."""
    found = detector.probabilities(images)
    return torch.stack([found["object"].argmax(1), found["style"].argmax(1)]).cpu()


def _named(
    detector: Labeller, prompts: Sequence[str], seen: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Arm → bool [2, n]: whether the likeliest object and style are among those that the prompt
    names, true where it names none of that kind. Empty where a prompt names neither, or the
    detector's classes have no names.
    """
    if not isinstance(detector, Namer):
        return {}
    wanted = [[asked(detector.names[head], prompt) for prompt in prompts] for head in HEADS]
    if not all(objects or styles for objects, styles in zip(*wanted, strict=True)):
        return {}

    def right(names: list[tuple[int, ...]], likeliest: list[int]) -> list[bool]:
        return [not w or best in w for w, best in zip(names, likeliest, strict=True)]

    pairs = {
        model_name: zip(wanted, labels.tolist(), strict=True) for model_name, labels in seen.items()
    }
    return {
        model_name: torch.tensor([right(*pair) for pair in found])
        for model_name, found in pairs.items()
    }


def _difference(means: Floats) -> Floats:
    return means[..., :1] - means[..., 1:]


def _array(values: Tensor) -> Floats:
    return np.asarray(values.double().cpu(), dtype=float)


def _end(model_name: str) -> str:
    return "_baseline" if model_name == BASELINE else ""
