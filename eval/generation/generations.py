"""The board that the diffusion metrics compute from: what the scorers saw in the pictures of every
attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from eval.generation.scoring import SIMILARITIES
from eval.stats.intervals import Floats, Unit
from lab.core.data import Concept, Role
from lab.core.types import BASELINE, Budget

FAMILY = "name"  # the prompts that headline figures are about
CLIP_T, DETECTED, PROMPT_ADHERENT = "clip_t", "detected", "prompt_adherent"
BETWEEN = {
    kind: f"between_{kind}" for kind in SIMILARITIES
}  # M of both models' pictures made from the same latents
COSINES = (
    "clip",
    "features",
)  # of them those that vectors of single pictures give; the others look at every pair


@dataclass(frozen=True)
class Cell:
    """One concept in one case and seed."""

    seed: int
    case: str
    concept: str


@dataclass
class Reading:
    """One attack in one model, scored.

    Attributes:
        values: quantity → [points, pictures] on the snapshots of the budget: a similarity of
            `eval.generation.scoring`, ``clip_t`` (cosine to the prompt), ``detected`` (0 or 1),
            ``prompt_adherent`` (0 or 1, see `eval.generation.prompt_adherence`), ``between_M`` (M
            of the picture and the other model's, made from the same latents; unless it is a cosine,
            nan between the marks of the budget). What stands beyond the end of an attack that
            diverged: `eval.generation.reading`.
        end: number of snapshots that the attack reached.
        status: of the trajectory.
    """

    values: dict[str, Floats]
    end: int
    status: str


Key = tuple[Cell, str, str, str]  # cell, model, attack, family


@dataclass
class EvaluatedRun:
    """Readings of a run by cell, model, attack and prompt family.

    Attributes:
        roles: cell → role of its concept.
        plan: the budget's snapshots; every reading is on them.
        lost: number of cases whose immunization diverged (they have no cells).
    """

    model_names: tuple[str, ...]
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
        """The model under test (the baseline where it is alone)."""
        return self.model_names[-1]

    def has(self, quantity: str) -> bool:
        return all(quantity in reading.values for reading in self.readings.values())

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key[3] for key in self.readings))

    def cells(self, role: Role, concept: str | None = None, family: str = FAMILY) -> list[Cell]:
        """Cells of a role (and concept) that have prompts of the family."""
        found = [
            c
            for c, r in self.roles.items()
            if r == role
            and all((c, self.model_names[0], a, family) in self.readings for a in self.attacks)
        ]
        return [c for c in found if concept is None or c.concept == concept]

    def concepts(self, role: Role) -> list[str]:
        return list(dict.fromkeys(c.concept for c in self.cells(role)))

    def at(self, cell: Cell, model_name: str, attack: str, family: str = FAMILY) -> Reading:
        return self.readings[cell, model_name, attack, family]

    def best_attack(
        self, cell: Cell, model_name: str, quantity: str, at: int | None, family: str = FAMILY
    ) -> str:
        """The attack whose pictures have the highest mean at a snapshot (None: over the
        trajectory); nan never wins.
        """

        def mean(attack: str) -> float:
            means = self.at(cell, model_name, attack, family).values[quantity].mean(1)
            found = float(area(means, self.plan) if at is None else means[at])
            return -np.inf if np.isnan(found) else found

        return max(self.attacks, key=mean)

    def best(
        self,
        cell: Cell,
        model_name: str,
        quantity: str,
        family: str = FAMILY,
        attacks: Sequence[str] | None = None,
    ) -> Floats:
        """[points, pictures] of an model's best of ``attacks`` (all), chosen anew at every
        snapshot.
        """
        found = [
            self.at(cell, model_name, a, family).values[quantity] for a in attacks or self.attacks
        ]
        means = np.nan_to_num(np.stack([values.mean(1) for values in found]), nan=-np.inf)
        return np.stack([found[a][point] for point, a in enumerate(means.argmax(0))])

    def best_unit(
        self,
        cell: Cell,
        model_names: Sequence[str],
        quantity: str,
        figure: Callable[[Floats], Floats],
        family: str = FAMILY,
        attacks: Sequence[str] | None = None,
    ) -> Unit:
        """A figure of `best`, for the bootstrap: every resample chooses the attackers anew, as the
        choice was made on the same pictures.

        ``figure``: means under each model's best attacker [..., models, points] → [..., figures].
        """
        chosen = tuple(attacks or self.attacks)
        rows = np.concatenate(
            [
                self.at(cell, model_name, a, family).values[quantity]
                for model_name in model_names
                for a in chosen
            ]
        ).T
        shape = (len(model_names), len(chosen), len(self.plan))

        def best(means: Floats) -> Floats:  # a nan never wins
            return figure(np.fmax.reduce(means.reshape(*means.shape[:-1], *shape), axis=-2))

        return Unit(cell.seed, rows, best)

    def reach(
        self,
        cell: Cell,
        model_names: Sequence[str],
        family: str = FAMILY,
        attacks: Sequence[str] | None = None,
    ) -> int:
        """Snapshots that in each of ``model_names`` some attack reached."""
        return min(
            max(self.at(cell, model_name, a, family).end for a in attacks or self.attacks)
            for model_name in model_names
        )

    def only(self, seed: int, case: str) -> EvaluatedRun:
        """The part of one seed and case."""

        def mine(cell: Cell) -> bool:
            return (cell.seed, cell.case) == (seed, case)

        roles = {c: r for c, r in self.roles.items() if mine(c)}
        return replace(
            self,
            roles=roles,
            readings={k: v for k, v in self.readings.items() if mine(k[0])},
            lost=0,
        )

    def diverged(self, role: Role, model_name: str | None = None) -> tuple[int, int]:
        """(diverged, all) attacks on the concepts of a role, in one model or all of them."""
        found = [
            r.status == "diverged"
            for (cell, a, _, family), r in self.readings.items()
            if family == FAMILY and self.roles[cell] == role and model_name in (None, a)
        ]
        return sum(found), len(found)

    def notes(self, role: Role) -> str | None:
        """What has to be said beside every figure of a role."""
        count, total = self.diverged(role)
        said = (
            f"{count} of {total} attacks diverged: their last finite pictures count"
            if count
            else None
        )
        flattering = self.immunizer if role == "harmful" else BASELINE
        if said and len(self.model_names) > 1 and self.diverged(role, flattering)[0]:
            more = (
                ", and beyond them what the baseline shows"
                if role == "harmful"
                else ", and none beyond the baseline's"
            )
            said += more
        cases = self.lost + len({(c.seed, c.case) for c in self.roles})
        lost = f"{self.lost} of {cases} cases diverged and are left out" if self.lost else None
        return "; ".join(n for n in (said, lost) if n) or None


def marks(budget: Budget) -> list[tuple[int, int, str]]:
    """(index into the snapshots, step, suffix) of 1×, 2×, 5× and the long horizon, where there are
    such snapshots.
    """
    plan = budget.snapshots()
    out = {budget.horizon: ""}
    for times in (2, 5, budget.multiple):
        if times * budget.horizon in plan:
            out.setdefault(times * budget.horizon, f"_{times}x")
    return [(plan.index(step), step, suffix) for step, suffix in out.items()]


def line_unit(board: EvaluatedRun, cell: Cell, model_name: str, quantity: str) -> Unit:
    """Means of one model under its best attacker at every snapshot that some attacker reached."""
    end = board.reach(cell, (model_name,))
    return board.best_unit(cell, (model_name,), quantity, lambda best: best[..., 0, :end])


def area(values: Floats, plan: Sequence[int]) -> Floats:
    """Mean over the steps of the trajectory of values [points, ...]: the trapezoid area ÷ the last
    step.
    """
    widths = np.diff(np.asarray(plan, dtype=float))
    middle = (values[1:] + values[:-1]) / 2
    return np.asarray(np.tensordot(widths, middle, axes=1) / widths.sum())


def prompts_of(concept: Concept, family: str, count: int) -> list[str]:
    """The prompt of every picture of a point: prompts in turn, starting again where they run
    out.
    """
    asked = concept.prompts[family]
    return [asked[i % len(asked)] for i in range(count)]
