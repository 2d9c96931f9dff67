"""What immunization costs before anybody attacks: unrelated prompts, painted by θ_0 and θ_I from the same latents."""

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
from eval.generation.scoring import Judges, Labeller, clip_vectors, feature_vectors, text_vectors, try_out
from eval.stats.aggregate import Better, arm_names, diverged_of
from eval.stats.intervals import Floats, Unit, columns, score
from lab.core.data import ConceptCase, Kind, Sampling
from lab.core.errors import UserError
from lab.core.options import count as whole
from lab.core.options import flag, number
from lab.core.prompts import text, texts
from lab.core.types import CONTROL, RunView, Score, Scores
from lab.scorers.frechet import frechet_distance

HEADS = ("object", "style")


class Utility:
    """Similarity, prompt adherence, detections and feature distance on ``case.unrelated``; compares θ_I with θ_0.

    ``utility_clip_drift``: 1 − CLIP cosine of the pictures of both arms from the same latents;
    ``utility_feature_drift`` the same with the feature network. ``utility_clip_t``: cosine to the prompt.
    ``utility_detection``: share of pictures whose likeliest object AND likeliest style are those that the same
    detector sees in the reference picture of the prompt; ``utility_object``, ``utility_style``: one of them alone.
    ``utility_agreement``: share of pictures where it sees the same in both arms. ``_control`` stands for θ_0, ``_drop``
    for control − immunized, with a paired interval: a resample draws a picture of both arms at once.
    Every prompt counts alike, however many pictures it got, and a resample draws prompts.
    ``utility_frechet``, ``utility_frechet_control``: Fréchet distance of features to the reference pictures (biased
    upwards by few pictures, alike in both arms, so no interval is given: compare the two).

    Further settings add suffixes to drift, CLIP-T, detection and agreement: ``_guidance_S`` for another guidance scale,
    ``_negative`` for a negative prompt, ``_compositions`` for prompts without reference pictures. There the object and
    the style must be ones that the prompt names; detection is left out where a prompt names neither.

    Args:
        judges: without a detector that names objects and styles the detection figures are left out.
        count: pictures per case and setting; prompts start again where they run out.
        guidances: further guidance scales; the scenario's own is skipped.
        negative: a negative prompt, or "" for none.
        compositions: prompts, e.g. an object in a style that training never showed.
        features: judge with the feature network too (``utility_feature_drift``, ``utility_frechet``).
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})
    needs_arms: ClassVar[int] = 2
    needs_attack: ClassVar[bool] = False

    def __init__(
        self,
        judges: Judges,
        name: str = "utility",
        count: int = 200,
        guidances: Sequence[float] = (),
        negative: str = "",
        compositions: Sequence[str] = (),
        features: bool = True,
    ) -> None:
        key = f"eval.{name}"
        self.judges, self.name, self.features = judges, name, flag(f"{key}.features", features)
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
        """Before anything runs: there are unrelated prompts, and the judges work. Raises as `eval.generation.scoring.try_out`."""
        for case in cases:
            self._settings(case)
        try_out(self.judges, cases, ("clip", "features") if self.features else ("clip",))

    def __call__(self, run: RunView) -> Scores:
        out = Scores(tables={"utility": []})
        lost = len(diverged_of(run))
        note = f"cases that diverged and are left out: {lost}" if lost else None
        for suffix, cells in self.judged(run).items():
            metrics = scores(cells, suffix, note)
            out.metrics |= metrics
            for name, s in metrics.items():
                row = {"figure": name, "value": s.value, "low": s.low, "high": s.high, "n": s.n}
                out.tables["utility"].append(row)
        return out

    def judged(self, run: RunView) -> dict[str, list[Judged]]:
        """Suffix of a setting → what the judges see, case by case.

        Raises:
            ValueError: no case.
        """
        found: dict[str, list[Judged]] = {}
        for seed, case in each_case(run, "unrelated prompts"):
            for setting in self._settings(case):
                pictures = {
                    arm: paint(run, case, seed, arm, setting.prompts, setting.sampling, self.count)
                    for arm in arm_names(run)
                }
                found.setdefault(setting.suffix, []).append(self._judge(seed, case.name, setting, pictures))
        if not found:
            raise ValueError("a metric over an empty set: no case")
        return found

    def _settings(self, case: ConceptCase) -> list[_Setting]:
        own = case.sampling
        asked, images = case.unrelated.prompts, case.unrelated.images
        if not asked:
            raise UserError("scenario", case.name, "has no unrelated prompts, and eval.utility needs some.")
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

    def _judge(self, seed: int, case: str, setting: _Setting, painted: dict[str, Tensor]) -> Judged:
        rows: dict[str, Floats] = {}
        texts = text_vectors(self.judges, setting.asked(self.count))
        clip = {arm: clip_vectors(self.judges, images) for arm, images in painted.items()}
        control, immunized = clip.values()
        rows["clip_drift"] = _array(1 - (control * immunized).sum(1))
        for arm, vectors in clip.items():
            rows[f"clip_t{_end(arm)}"] = _array((vectors * texts).sum(1))
        references = None
        if setting.images is not None:
            references = setting.images[torch.arange(self.count) % len(setting.images)]
        rows |= self._detections(painted, references, setting.asked(self.count))
        frechet = {}
        if self.features and setting.suffix == "":
            features = {arm: feature_vectors(self.judges, images) for arm, images in painted.items()}
            left, right = (F.normalize(v, dim=1) for v in features.values())
            rows["feature_drift"] = _array(1 - (left * right).sum(1))
            assert setting.images is not None
            whole = feature_vectors(self.judges, setting.images)
            frechet = {arm: frechet_distance(v, whole) for arm, v in features.items()}
        return Judged(seed, case, tuple(setting.asked(self.count)), rows, frechet)

    def _detections(
        self, painted: dict[str, Tensor], references: Tensor | None, prompts: Sequence[str]
    ) -> dict[str, Floats]:
        detector = self.judges.detector
        if not isinstance(detector, Labeller):
            return {}
        seen = {arm: _labels(detector, images) for arm, images in painted.items()}
        control, immunized = seen.values()
        rows = {"agreement": _array((control == immunized).all(0))}
        if references is not None:
            true = _labels(detector, references)
            right = {arm: labels == true for arm, labels in seen.items()}
        else:
            right = _named(detector, prompts, seen)
        for arm, found in right.items():
            for head, one in zip(HEADS, found, strict=True):
                rows[f"{head}{_end(arm)}"] = _array(one)
            rows[f"detection{_end(arm)}"] = _array(found.all(0))
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
class Judged:
    """One case and seed: the prompt of every picture, quantity → [pictures], and Fréchet distance by arm."""

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


def scores(cells: Sequence[Judged], suffix: str, note: str | None) -> dict[str, Score]:
    """Every figure of one setting."""
    out: dict[str, Score] = {}
    quantities = list(cells[0].rows)

    def add(name: str, better: Better, *used: str, **kwargs: Any) -> None:
        units = [Unit(c.seed, c.by_prompt(used), columns if len(used) == 1 else _difference) for c in cells]
        out[f"utility_{name}"] = score(units, better, note=note, **kwargs)

    for quantity in quantities:
        base, control = quantity.removesuffix("_control"), quantity.endswith("_control")
        drift = base.endswith("drift")
        better: Better = "neutral" if control else "lower" if drift else "higher"
        bounds = (0.0, 2.0) if drift else (-1.0, 1.0) if base == "clip_t" else (0.0, 1.0)
        add(f"{base}{suffix}{'_control' if control else ''}", better, quantity, bounds=bounds)
    for base in ("clip_t", "detection", *HEADS):
        if f"{base}_control" in quantities:
            add(f"{base}_drop{suffix}", "lower", f"{base}_control", base)
    for arm in cells[0].frechet:
        by_seed: dict[int, list[float]] = {}
        for c in cells:
            by_seed.setdefault(c.seed, []).append(c.frechet[arm])
        value = float(np.mean([np.mean(v) for v in by_seed.values()]))
        told = f"biased upwards: {len(cells[0].rows['clip_drift'])} pictures; compare with the other arm"
        better = "neutral" if arm == CONTROL else "lower"
        out[f"utility_frechet{suffix}{_end(arm)}"] = Score(value, n=len(by_seed), better=better, note=told)
    return out


def _labels(detector: Labeller, images: Tensor) -> Tensor:
    """The likeliest object and style of every picture: int64 [2, n]."""
    found = detector.probabilities(images)
    return torch.stack([found["object"].argmax(1), found["style"].argmax(1)]).cpu()


def _named(detector: Labeller, prompts: Sequence[str], seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arm → bool [2, n]: whether the likeliest object and style are among those that the prompt names, true where it
    names none of that kind. Empty where a prompt names neither, or the detector's classes have no names.
    """
    if not isinstance(detector, Namer):
        return {}
    wanted = [[asked(detector.names[head], prompt) for prompt in prompts] for head in HEADS]
    if not all(objects or styles for objects, styles in zip(*wanted, strict=True)):
        return {}

    def right(names: list[tuple[int, ...]], likeliest: list[int]) -> list[bool]:
        return [not w or best in w for w, best in zip(names, likeliest, strict=True)]

    pairs = {arm: zip(wanted, labels.tolist(), strict=True) for arm, labels in seen.items()}
    return {arm: torch.tensor([right(*pair) for pair in found]) for arm, found in pairs.items()}


def _difference(means: Floats) -> Floats:
    return means[..., :1] - means[..., 1:]


def _array(values: Tensor) -> Floats:
    return np.asarray(values.double().cpu(), dtype=float)


def _end(arm: str) -> str:
    return "_control" if arm == CONTROL else ""
