"""What the judges see in the pictures of every attack, read once: the board that the diffusion metrics compute from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from eval.aggregate import arm_names, diverged_of
from eval.intervals import Floats
from eval.judging import Judges, References, clip_vectors, detector_of, prepared, text_vectors
from lab.errors import UserError
from lab.progress import progress
from lab.types import CONTROL, Budget, Concept, ConceptCase, Role, RunView, Trajectory

FAMILY = "name"  # the prompts that headline figures are about
BETWEEN, CLIP_T, DETECTED = "between", "clip_t", "detected"
Pick = Literal["lowest", "highest"]


@dataclass(frozen=True)
class Cell:
    """One concept in one case and seed."""

    seed: int
    case: str
    concept: str


@dataclass
class Reading:
    """One attack in one arm, judged.

    Attributes:
        values: quantity → [points, pictures] on the snapshots of the budget: a similarity of `eval.judging`, ``clip_t``
            (cosine to the prompt), ``detected`` (0 or 1), ``between`` (CLIP cosine to the other arm's picture made
            from the same latents). After a divergence the last finite values are held.
        end: number of snapshots that the attack reached.
        status: of the trajectory.
    """

    values: dict[str, Floats]
    end: int
    status: str


Key = tuple[Cell, str, str, str]  # cell, arm, attack, family


@dataclass
class Board:
    """Readings of a run by cell, arm, attack and prompt family.

    Attributes:
        roles: cell → role of its concept.
        plan: the budget's snapshots; every reading is on them.
        lost: number of cases whose immunization diverged (they have no cells).
    """

    arms: tuple[str, ...]
    attacks: tuple[str, ...]
    budget: Budget
    roles: dict[Cell, Role] = field(default_factory=dict)
    readings: dict[Key, Reading] = field(default_factory=dict)
    lost: int = 0

    @property
    def plan(self) -> tuple[int, ...]:
        return self.budget.snapshots()

    @property
    def immunizer(self) -> str:
        """The arm under test (the control where it is alone)."""
        return self.arms[-1]

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key[3] for key in self.readings))

    def cells(self, role: Role, concept: str | None = None, family: str = FAMILY) -> list[Cell]:
        """Cells of a role (and concept) that have prompts of the family."""
        found = [
            c
            for c, r in self.roles.items()
            if r == role and all((c, self.arms[0], a, family) in self.readings for a in self.attacks)
        ]
        return [c for c in found if concept is None or c.concept == concept]

    def concepts(self, role: Role) -> list[str]:
        return list(dict.fromkeys(c.concept for c in self.cells(role)))

    def at(self, cell: Cell, arm: str, attack: str, family: str = FAMILY) -> Reading:
        return self.readings[cell, arm, attack, family]

    def end(self, cell: Cell, attack: str, family: str = FAMILY) -> int:
        """Snapshots that all arms reached."""
        return min(self.at(cell, arm, attack, family).end for arm in self.arms)

    def only(self, seed: int, case: str) -> Board:
        """The part of one seed and case."""

        def mine(cell: Cell) -> bool:
            return (cell.seed, cell.case) == (seed, case)

        roles = {c: r for c, r in self.roles.items() if mine(c)}
        return replace(self, roles=roles, readings={k: v for k, v in self.readings.items() if mine(k[0])}, lost=0)

    def pick(self, value: Callable[[str], float], worst: Pick) -> str:
        """The attack whose ``value`` is lowest or highest; nan never wins against a number."""
        sign = 1.0 if worst == "lowest" else -1.0
        known = {a: sign * value(a) for a in self.attacks}
        return min(known, key=lambda a: np.inf if np.isnan(known[a]) else known[a])

    def diverged(self, role: Role, arm: str | None = None) -> tuple[int, int]:
        """(diverged, all) attacks on the concepts of a role, in one arm or all of them."""
        found = [
            r.status == "diverged"
            for (cell, a, _, family), r in self.readings.items()
            if family == FAMILY and self.roles[cell] == role and arm in (None, a)
        ]
        return sum(found), len(found)

    def notes(self, role: Role) -> str | None:
        """What has to be said beside every figure of a role."""
        count, total = self.diverged(role)
        said = f"{count} of {total} attacks diverged: their last finite pictures count" if count else None
        cases = self.lost + len({(c.seed, c.case) for c in self.roles})
        lost = f"{self.lost} of {cases} cases diverged and are left out" if self.lost else None
        return "; ".join(n for n in (said, lost) if n) or None


def marks(budget: Budget) -> list[tuple[int, int, str]]:
    """(index into the snapshots, step, suffix) of 1×, 2× and the long horizon, where there are such snapshots."""
    plan = budget.snapshots()
    out = {budget.horizon: ""}
    for times in (2, budget.multiple):
        if times * budget.horizon in plan:
            out.setdefault(times * budget.horizon, f"_{times}x")
    return [(plan.index(step), step, suffix) for step, suffix in out.items()]


def area(values: Floats, plan: Sequence[int]) -> Floats:
    """Mean over the steps of the trajectory of values [points, ...]: the trapezoid area ÷ the last step."""
    widths = np.diff(np.asarray(plan, dtype=float))
    middle = (values[1:] + values[:-1]) / 2
    return np.asarray(np.tensordot(widths, middle, axes=1) / widths.sum())


def prompts_of(concept: Concept, family: str, count: int) -> list[str]:
    """The prompt of every picture of a point: prompts in turn, starting again where they run out."""
    asked = concept.prompts[family]
    return [asked[i % len(asked)] for i in range(count)]


def each_case(run: RunView, label: str) -> Iterator[tuple[int, ConceptCase]]:
    """(seed, case) with a progress bar."""
    for seed in run.seeds:
        cases = run.cases(seed)
        for case in progress(cases, f"{label}, seed {seed}", total=len(cases)):
            yield seed, case


def read(
    run: RunView, judges: Judges, quantities: Iterable[str], *, preprocessing: str = "standard", label: str = "judge"
) -> Board:
    """Judge the pictures of every attack.

    Args:
        quantities: names of `Reading.values`.

    Raises:
        ValueError: no case, no attack, or arms with different numbers of pictures.
        UserError: an attack without pictures of the prompts that name the concept.
    """
    wanted = tuple(dict.fromkeys(quantities))
    board = Board(arm_names(run), run.attacks, run.budget, lost=len(diverged_of(run)))
    for seed, case in each_case(run, label):
        for concept in case.tasks:
            cell = Cell(seed, case.name, concept.name)
            board.roles[cell] = concept.role
            judge = _Judge(judges, concept, wanted, preprocessing)
            for attack in run.attacks:
                found = {arm: run.trajectory(arm, attack, case, concept, seed) for arm in board.arms}
                for family in _families(found, concept, attack):
                    for arm, reading in judge.family(found, family, board.plan).items():
                        board.readings[cell, arm, attack, family] = reading
    if not board.readings:
        raise ValueError("a metric over an empty set: no attack was run")
    return board


def _families(found: dict[str, Trajectory], concept: Concept, attack: str) -> list[str]:
    """Prompt families that every arm has pictures for.

    Raises:
        UserError: none of the prompts that name the concept.
    """
    common = [f for f in concept.prompts if all(f in t.samples for t in found.values())]
    if FAMILY not in common:
        told = f"must contain {FAMILY}: the figures are about prompts that name the concept."
        raise UserError(f"attacks.{attack}.families", common, told)
    return common


class _Judge:
    """Judges the trajectories of one concept."""

    def __init__(self, judges: Judges, concept: Concept, wanted: Sequence[str], preprocessing: str) -> None:
        self.judges, self.concept, self.wanted, self.preprocessing = judges, concept, wanted, preprocessing
        kinds = [q for q in wanted if q not in (BETWEEN, CLIP_T, DETECTED)]
        self.references = References(judges, prepared(concept.reference.images, preprocessing), kinds)

    def family(self, found: dict[str, Trajectory], family: str, plan: Sequence[int]) -> dict[str, Reading]:
        """Arm → reading on the snapshots ``plan``, for one attack and prompt family."""
        if len({t.samples[family].shape[1] for t in found.values()}) > 1:
            raise ValueError(f"arms have different numbers of pictures of {self.concept.name}")
        out, vectors = {}, {}
        for arm, trajectory in found.items():
            points, vectors[arm] = self._points(trajectory.samples[family], family)
            held = _held(trajectory.steps, plan)
            end = sum(step <= trajectory.steps[-1] for step in plan)
            out[arm] = Reading({q: v[held] for q, v in points.items()}, end, trajectory.status)
            vectors[arm] = [vectors[arm][i] for i in held] if vectors[arm] else []
        if BETWEEN in self.wanted and len(found) == 2:
            pairs = zip(*vectors.values(), strict=True)
            between = np.stack([np.asarray((a * b).sum(1), dtype=float) for a, b in pairs])
            out[CONTROL].values[BETWEEN] = between
        return out

    def _points(self, samples: Tensor, family: str) -> tuple[dict[str, Floats], list[Tensor]]:
        """Quantity → [points, pictures], and the CLIP vectors of every point where they are needed."""
        rows: dict[str, list[Floats]] = {}
        vectors = []
        asked = prompts_of(self.concept, family, samples.shape[1])
        texts = text_vectors(self.judges, asked) if CLIP_T in self.wanted else None
        for images in samples:
            seen = prepared(images, self.preprocessing)
            clip = None
            if {BETWEEN, CLIP_T, "clip"} & set(self.wanted):
                clip = clip_vectors(self.judges, seen)
                vectors.append(clip)
            values = self.references.similarities(seen, clip)
            if texts is not None and clip is not None:
                values[CLIP_T] = np.asarray((clip * texts).sum(1), dtype=float)
            if DETECTED in self.wanted:
                detector = detector_of(self.judges, "eval")
                values[DETECTED] = np.asarray(detector.detects(seen, self.concept.name).cpu(), dtype=float)
            for quantity, value in values.items():
                rows.setdefault(quantity, []).append(value)
        return {quantity: np.stack(values) for quantity, values in rows.items()}, vectors


def _held(steps: Sequence[int], plan: Sequence[int]) -> list[int]:
    """For every planned snapshot, the index of the last recorded step that is not beyond it."""
    return [int(i) for i in torch.searchsorted(torch.tensor(steps), torch.tensor(plan), right=True) - 1]
