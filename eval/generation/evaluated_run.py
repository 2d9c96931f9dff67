"""What the scorers see in the images of every attack of a run, each image scored once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import SkipValidation
from torch import Tensor

from eval.generation.scoring import (
    COSINES,
    Namer,
    References,
    detector_of,
    is_prompt_adherent,
    prepare,
    shows_objects,
    similarity_of_pairs,
    text_vectors,
    unit_vectors,
)
from eval.stats.aggregate import left_out, mean_over_steps, walk
from eval.stats.intervals import Floats, Unit, columns, joined, score_worst
from lab.core.config import config
from lab.core.data import Concept, ConceptCase, Kind, Role
from lab.core.errors import UserError
from lab.core.hashing import digest, fingerprint, stage_key
from lab.core.prompts import in_turn
from lab.core.sources import source_hash
from lab.core.types import BASELINE, Budget, RunMetric, RunView, Score, Trajectory
from lab.scorers.load import Scorers

FAMILY = "name"  # the prompts that headline figures are about
UNRELATED = "unrelated"  # the prompts that show whether an attacked model is still usable
CLIP_T, DETECTED, PROMPT_ADHERENT = "clip_t", "detected", "prompt_adherent"
USABLE = "usable"
# a snapshot's index, the mean over all steps, or every snapshot reached
At = int | Literal["mean", "curve"]
BETWEEN = "between_"  # M of both models' images made from the same latents: between_clip, …


@config
class ImageMetric(RunMetric):
    """A family of metrics over the images of a text-to-image model, attacked unless it says so.

    Args:
        scorers: networks that score images.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})
    needs_attack: ClassVar[bool] = True

    scorers: SkipValidation[Scorers]


@dataclass(frozen=True)
class ConceptCell:
    """One concept in one case and seed."""

    seed: int
    case: str
    concept: str


@dataclass
class EvaluatedAttack:
    """One attack on one model, scored.

    Attributes:
        values: quantity → [points, images] on the snapshots of the budget: a similarity of
            `eval.generation.scoring`, ``clip_t`` (cosine to the prompt), ``detected`` (0 or 1),
            ``prompt_adherent`` (0 or 1), ``usable`` (``prompt_adherent`` where that was measured,
            else ``detected``, while the attacked model is usable, and 0 else), ``between_M`` (M of
            the image and the other model's, made from the same latents; unless it is a cosine, nan
            between the marks of the budget). What stands beyond the end of an attack that diverged:
            `fill_beyond_end`.
        end: number of snapshots that the attack reached.
        status: of the trajectory.
        usable: [points] whether the attacked model is still usable; None where it was not measured.
    """

    values: dict[str, Floats]
    end: int
    status: str
    usable: NDArray[np.bool_] | None = None


@dataclass
class EvaluatedRun:
    """Scored attacks of a run by cell, model, attack and prompt family.

    Attributes:
        roles: cell → role of its concept.
        left_out: note on the cases whose immunization diverged (they have no cells).
    """

    model_names: tuple[str, ...]
    attacks: tuple[str, ...]
    budget: Budget
    roles: dict[ConceptCell, Role] = field(default_factory=dict)
    results: dict[tuple[ConceptCell, str, str, str], EvaluatedAttack] = field(default_factory=dict)
    left_out: str | None = None

    @property
    def plan(self) -> tuple[int, ...]:
        """The budget's snapshots; every result is on them."""
        return self.budget.snapshots()

    @property
    def axis(self) -> str:
        """What the plan counts."""
        return {"images": "images seen by the attack", "steps": "steps of the attack"}[
            self.budget.unit
        ]

    @property
    def horizon_index(self) -> int:
        """The index of 1× in the plan."""
        return self.plan.index(self.budget.horizon)

    @property
    def readings(self) -> list[tuple[At, str]]:
        """Where metrics read a trajectory, and the suffix of their names: `marks`, and the mean."""
        return [*((index, suffix) for index, _, suffix in marks(self.budget)), ("mean", "_auc")]

    @property
    def tested_model(self) -> str:
        """The model under test (the baseline where it is alone)."""
        return self.model_names[-1]

    def has(self, quantity: str) -> bool:
        """Return True if every attack has the quantity for the prompts that name the concept."""
        named = (result for key, result in self.results.items() if key[3] == FAMILY)
        return all(quantity in result.values for result in named)

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key[3] for key in self.results))

    def cells(
        self, role: Role, concept: str | None = None, family: str = FAMILY
    ) -> list[ConceptCell]:
        """Return the cells of a role (and concept) that have prompts of the family."""
        return [
            cell
            for cell, its_role in self.roles.items()
            if its_role == role
            and concept in (None, cell.concept)
            and all((cell, self.model_names[0], a, family) in self.results for a in self.attacks)
        ]

    def concepts(self, role: Role) -> list[str]:
        return list(dict.fromkeys(cell.concept for cell in self.cells(role)))

    def at(
        self, cell: ConceptCell, model: str, attack: str, family: str = FAMILY
    ) -> EvaluatedAttack:
        return self.results[cell, model, attack, family]

    def best_attack(
        self, cell: ConceptCell, model: str, quantity: str, at: At, family: str = FAMILY
    ) -> str:
        """Return the attack whose images have the highest mean of a quantity; nan never wins."""

        def mean(attack: str) -> float:
            means = self.at(cell, model, attack, family).values[quantity].mean(1)
            return float(np.nan_to_num(read(means, at, self.plan)[0], nan=-np.inf))

        return max(self.attacks, key=mean)

    def best_unit(
        self,
        cell: ConceptCell,
        models: Sequence[str],
        quantity: str,
        at: At,
        figure: Callable[[Floats], Floats] = columns,
        family: str = FAMILY,
        attacks: Sequence[str] | None = None,
    ) -> Unit:
        """Return a figure of models, each under its best of ``attacks`` (all) at every snapshot.

        Every resample of the bootstrap chooses the attackers anew, as the choice was made on the
        same images.

        Args:
            at: ``curve`` ends with the last snapshot that some attack reached in every model.
            figure: means of all models, one after the other [..., models · points read] →
                [..., figures].
        """
        chosen = tuple(attacks or self.attacks)
        rows = [self.at(cell, m, a, family).values[quantity] for m in models for a in chosen]
        end = self.reach(cell, models, family, chosen) if at == "curve" else len(self.plan)

        def best(means: Floats) -> Floats:
            each = means.reshape(*means.shape[:-1], len(models), len(chosen), len(self.plan))
            highest = np.fmax.reduce(each, axis=-2)  # a nan never wins
            values = read(highest[..., :end], at, self.plan)
            return figure(values.reshape(*means.shape[:-1], -1))

        return Unit(cell.seed, np.concatenate(rows).T, best)

    def curve_units(
        self, role: Role, concept: str | None, quantity: str
    ) -> dict[str, Sequence[Unit]]:
        """Return model → means under its best attacker at every snapshot, in every cell."""
        cells = self.cells(role, concept)
        return {
            model: [self.best_unit(cell, (model,), quantity, "curve") for cell in cells]
            for model in self.model_names
        }

    def reach(
        self,
        cell: ConceptCell,
        models: Sequence[str],
        family: str = FAMILY,
        attacks: Sequence[str] | None = None,
    ) -> int:
        """Return the number of snapshots that in each of ``models`` some attack reached."""
        chosen = attacks or self.attacks
        return min(max(self.at(cell, m, a, family).end for a in chosen) for m in models)

    def only(self, seed: int, case: str) -> EvaluatedRun:
        """Return the part of one seed and case."""
        roles = {c: r for c, r in self.roles.items() if (c.seed, c.case) == (seed, case)}
        results = {k: v for k, v in self.results.items() if k[0] in roles}
        return replace(self, roles=roles, results=results, left_out=None)

    def notes(self, role: Role) -> str | None:
        """Return what has to be said beside every figure of a role."""
        attacks = [
            (model, result.status == "diverged")
            for (cell, model, _, family), result in self.results.items()
            if family == FAMILY and self.roles[cell] == role
        ]
        count = sum(diverged for _, diverged in attacks)
        note = f"{count} of {len(attacks)} attacks diverged: their last finite images count"
        if len(self.model_names) > 1 and role == "harmful" and (self.tested_model, True) in attacks:
            note += ", and beyond them what the baseline shows"
        if len(self.model_names) > 1 and role == "benign" and (BASELINE, True) in attacks:
            note += ", and none beyond the baseline's"
        return joined(note if count else None, self.left_out)


def marks(budget: Budget) -> list[tuple[int, int, str]]:
    """Return (index into the snapshots, step, suffix) of 1×, 2×, 5× and the long horizon, where
    there are such snapshots.
    """
    plan = budget.snapshots()
    out = {budget.horizon: ""}
    for times in (2, 5, budget.multiple):
        if times * budget.horizon in plan:
            out.setdefault(times * budget.horizon, f"_{times}x")
    return [(plan.index(step), step, suffix) for step, suffix in out.items()]


def read(values: Floats, at: At, plan: Sequence[int]) -> Floats:
    """Return what is read of values [..., points] at the steps of ``plan``: [..., points read]."""
    if at == "mean":
        return mean_over_steps(values, plan)[..., None]
    return values if at == "curve" else values[..., [at]]


def worst_concept(
    scores: dict[str, Score], units: Sequence[Sequence[Unit]], role: Role, geometric: bool = False
) -> tuple[str, Score]:
    """Return the least-protected target, or the other concept that lost most, with its score.

    Args:
        scores: concept → its score, with a value.
        units: of every concept, as `score_worst` takes them.
    """
    pick = min if role == "harmful" else max
    worst = pick(scores, key=lambda concept: scores[concept].value or 0.0)
    return worst, score_worst(scores[worst], units, role, geometric=geometric)


def usable_points(adherent: Floats, least: float) -> NDArray[np.bool_]:
    """Return for each step [points] whether the attacked model is still usable.

    It is where its images show what unrelated prompts name at least ``least`` times as often as
    those of the same model before the attack. An attack that destroys the model it attacks gains
    nothing from it (TamperBench bounds the loss of utility likewise,
    github.com/criticalml-uw/TamperBench).

    Args:
        adherent: 0 or 1 [points, images]; the first point is before the attack.
    """
    shares = adherent.mean(1)
    return np.asarray(shares >= least * shares[0])


def evaluate(
    run: RunView,
    scorers: Scorers,
    quantities: Iterable[str],
    *,
    scorers_of: Callable[[int, ConceptCase], Scorers] | None = None,
    skipped: Collection[str] = (),
    usable_share: float = 0.0,
    preprocessing: str = "standard",
    label: str = "scores",
) -> EvaluatedRun:
    """Score the images of every attack.

    Args:
        quantities: names of `EvaluatedAttack.values`.
        scorers_of: other scorers for each seed and case.
        skipped: concepts that were not attacked.
        usable_share: see `usable_points`. ``usable`` is added to ``detected`` where attacks have
            images of unrelated prompts and the detector names objects.

    Raises:
        UserError: an attack without images of the prompts that name the concept, or with another
            number of them.
    """
    out = EvaluatedRun(run.model_names, run.attacks, run.budget, left_out=left_out(run))
    for seed, case in walk(run, label):
        networks = scorers_of(seed, case) if scorers_of else scorers
        for concept in (task for task in case.tasks if task.name not in skipped):
            cell = ConceptCell(seed, case.name, concept.name)
            out.roles[cell] = concept.role
            scorer = _ConceptScorer(run, networks, concept, preprocessing, usable_share)
            counts: dict[str, int] = {}
            for attack in run.attacks:
                both = {m: run.trajectory(m, attack, case, concept, seed) for m in run.model_names}
                families = _families(both, concept, attack, counts)
                for family in (f for f in families if f != UNRELATED):
                    for model, result in scorer.score(both, family, tuple(quantities)).items():
                        out.results[cell, model, attack, family] = result
    return out


def evaluate_detections(
    metric: ImageMetric, run: RunView, *more: str, usable_share: float, label: str
) -> EvaluatedRun:
    """Return `evaluate` of the quantities ``more``, and of prompt-adherent images where they can be
    others than detections: styles are among the concepts, and the detector names objects.

    Raises:
        UserError: there is no detector.
    """
    named = isinstance(detector_of(metric.scorers, f"eval.{metric.name}"), Namer)
    if named and any(task.kind == "style" for _, case in walk(run) for task in case.tasks):
        more = (*more, PROMPT_ADHERENT)
    return evaluate(run, metric.scorers, more, usable_share=usable_share, label=label)


def _families(
    trajectories: dict[str, Trajectory], concept: Concept, attack: str, counts: dict[str, int]
) -> list[str]:
    """Return the prompt families that every model has images for.

    ``counts``: family → images a step of the attacks so far; completed here, since figures under
    each model's best attacker resample the images of all attackers together.

    Raises:
        UserError: no images of the prompts that name the concept, or another number of them than
            another model or attack has.
    """
    for family, images in chain(*(t.samples.items() for t in trajectories.values())):
        count = images.shape[1]
        if counts.setdefault(family, count) != count:
            fix = (
                f"images a step by {family}, not {counts[family]}; give all attackers and models "
                "the same number, scenario.sampling.count."
            )
            raise UserError(f"attacks.{attack}", count, fix)
    common = [f for f in concept.prompts if all(f in t.samples for t in trajectories.values())]
    if FAMILY not in common:
        fix = f"must contain {FAMILY}: the figures are about prompts that name the concept."
        raise UserError(f"attacks.{attack}.families", common, fix)
    return common


@dataclass
class _ConceptScorer:
    """Scores images of one concept; the stage cache holds what any run has scored before, since
    every immunizer of a sweep meets the same baseline.
    """

    run: RunView
    scorers: Scorers
    concept: Concept
    preprocessing: str
    usable_share: float

    def __post_init__(self) -> None:
        references = prepare(self.concept.reference.images, self.preprocessing)
        self.references = References(self.scorers, references)

    @cached_property
    def key(self) -> str:
        """Of all that decides a score besides the images."""
        return stage_key(
            sources=source_hash(__name__),
            preprocessing=self.preprocessing,
            scorers=self.scorers.fingerprint(),
            concept=fingerprint(self.concept),
        )

    def _cached(
        self, name: str, family: str, images: Tensor, compute: Callable[[], Tensor]
    ) -> Tensor:
        """Return what ``compute`` makes of ``images`` [points, ...] and prompts of a family."""
        key = stage_key(scorer=self.key, quantity=name, images=digest(images), family=family)
        return self.run.cached(key, lambda: {name: compute()})[name]

    def _score_points(self, images: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        points = (prepare(point, self.preprocessing) for point in images)
        return torch.stack([score(point) for point in points])

    def _vectors(self, kind: str, images: Tensor) -> Tensor:
        """Return unit vectors [points, images, d]."""
        encode = partial(unit_vectors, self.scorers, kind)
        name = f"vectors of {kind}"
        return self._cached(name, "", images, lambda: self._score_points(images, encode))

    def _quantity(self, quantity: str, family: str, images: Tensor) -> Tensor:
        """Score images [points, images, ...] of one model."""
        prompts = in_turn(self.concept.prompts[family], images.shape[1])
        if quantity in COSINES:
            vectors = self._vectors(quantity, images)
            return torch.stack([self.references.cosine(quantity, point) for point in vectors])
        if quantity == CLIP_T:
            return (self._vectors("clip", images) * text_vectors(self.scorers, prompts)).sum(2)
        if quantity in (DETECTED, PROMPT_ADHERENT):
            adherent = quantity == PROMPT_ADHERENT
            return self._score_points(images, partial(self._detect, prompts, adherent))
        return self._score_points(images, partial(self.references.similarity, quantity))

    def _usable(self, samples: dict[str, Tensor]) -> NDArray[np.bool_] | None:
        """Return `usable_points` of a model's recorded steps, of unrelated prompts and of a style's
        own, which name objects; None where there are no images of unrelated prompts.
        """
        detector = self.scorers.detector
        if UNRELATED not in samples or not isinstance(detector, Namer):
            return None
        usable = []
        for family in (UNRELATED, FAMILY) if self.concept.kind == "style" else (UNRELATED,):
            prompts = in_turn(self.concept.prompts[family], samples[family].shape[1])
            score = partial(shows_objects, detector, prompts)
            compute = partial(self._score_points, samples[family], score)
            adherent = self._cached("objects", family, samples[family], compute)
            usable.append(usable_points(np.asarray(adherent, dtype=float), self.usable_share))
        return np.logical_and.reduce(usable)

    def _detect(self, prompts: Sequence[str], adherent: bool, images: Tensor) -> Tensor:
        detector = detector_of(self.scorers, "eval")
        seen = np.asarray(detector.detects(images, self.concept.name).cpu(), dtype=float)
        if adherent:
            seen = is_prompt_adherent(detector, self.concept, images, prompts, seen)
        return torch.from_numpy(seen)

    def _between(self, kind: str, a: Tensor, b: Tensor) -> Floats:
        """Return M [points, images] of both models' images of equal index; unless it is a cosine,
        nan between the marks of the budget, since a pass of the network for every pair takes long.
        """
        if kind in COSINES:
            return np.asarray((self._vectors(kind, a) * self._vectors(kind, b)).sum(2), dtype=float)
        at = [index for index, *_ in marks(self.run.budget)]
        both = torch.cat([a[at], b[at]], dim=1)
        values = np.full(a.shape[:2], np.nan)

        def compare(x: Tensor) -> Tensor:
            return similarity_of_pairs(self.scorers, kind, *x.chunk(2))

        compute = partial(self._score_points, both, compare)
        values[at] = self._cached(BETWEEN + kind, "", both, compute)
        return values

    def score(
        self, trajectories: dict[str, Trajectory], family: str, quantities: Sequence[str]
    ) -> dict[str, EvaluatedAttack]:
        """Score one attack and prompt family on every model, on the snapshots of the budget."""
        plan, out = torch.tensor(self.run.budget.snapshots()), {}
        held = {}  # images at the last recorded step that is not beyond a snapshot
        for model, t in trajectories.items():
            index = torch.searchsorted(torch.tensor(t.steps), plan, right=True) - 1
            held[model] = t.samples[family][index]
            values = {}
            for quantity in quantities:
                if not quantity.startswith(BETWEEN):
                    compute = partial(self._quantity, quantity, family, t.samples[family])
                    scores = self._cached(quantity, family, t.samples[family], compute)
                    values[quantity] = np.asarray(scores[index], dtype=float)
            result = EvaluatedAttack(values, int((plan <= t.steps[-1]).sum()), t.status)
            usable = self._usable(t.samples) if DETECTED in values and family == FAMILY else None
            if usable is not None:
                result.usable = usable[index]
                shown = values.get(PROMPT_ADHERENT, values[DETECTED])
                values[USABLE] = shown * result.usable[:, None]
            out[model] = result
        for quantity in quantities if len(out) == 2 else ():
            if quantity.startswith(BETWEEN):
                between = self._between(quantity.removeprefix(BETWEEN), *held.values())
                out[BASELINE].values[quantity] = between
        fill_beyond_end(out, self.concept.role)
        return out


def fill_beyond_end(results: dict[str, EvaluatedAttack], role: Role) -> None:
    """Set what stands at the snapshots that a diverged attack did not reach: its last images,
    unless these flatter.

    An attack on a target that diverged on the immunized model proves no protection: beyond its end
    it counts as on the baseline, where that shows more. An attack on another concept that diverged
    on the baseline leaves nothing to compare the benign user's loss with: nan beyond its end.
    A second call changes nothing.
    """
    baseline = results[BASELINE]
    if role == "benign":
        for values in baseline.values.values() if baseline.status == "diverged" else ():
            values[baseline.end :] = np.nan
        return
    for model, result in results.items():
        if model == BASELINE or result.status != "diverged":
            continue
        for quantity, values in result.values.items():
            for point in range(result.end, len(values)):
                if baseline.values[quantity][point].mean() > values[point].mean():
                    values[point] = baseline.values[quantity][point]
        for quantity, values in baseline.values.items():
            if quantity.startswith(BETWEEN):
                values[result.end :] = 1.0
