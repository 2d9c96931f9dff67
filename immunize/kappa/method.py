"""KAPPA (arXiv 2505.23760, Alg. 1), its ablations and its baselines. Thin classes over one loop.

Own extensions (docs/methods.md §2.2): corridor schedule, running and full spectra, cluster
averaging, worst-case weights, the attacker's preconditioner, and ``scale``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar, Literal, TypeVar

from immunize.kappa import spectral
from immunize.kappa.objectives import (
    BilevelObjective,
    SpectralObjective,
    SpectralOptions,
    StepObjective,
)
from immunize.kappa.sampling import SPECTRA, Spectrum
from immunize.kappa.trainer import Schedule, Trainer
from lab.core.data import Case, Kind
from lab.core.errors import UserError
from lab.core.options import choice, count, flag, names, number, unread
from lab.core.types import Checkpoint, FeatureModel, Immunizer, Log

T = TypeVar("T")


def _each(check: Callable[..., object], *limits: float, **options: object) -> None:
    """The same ``check`` of `lab.core.options`, with ``limits``, on every option."""
    for key, value in options.items():
        check(f"immunize.{key}", value, *limits)


def _pick(kind: type[T], source: object, **given: object) -> T:
    """A dataclass ``kind`` whose fields are ``given`` or the attributes of ``source`` of the same
    name.
    """
    rest = [field.name for field in fields(kind) if field.name not in given]  # type: ignore[arg-type]
    return kind(**given, **{name: getattr(source, name) for name in rest})


_READ_BY: tuple[
    tuple[tuple[str, ...], str, object], ...
] = (  # options of `Kappa`, and what makes it read them
    (("ridge_benign", "ridge_harmful"), "preconditioned", True),
    (("corridor_rate", "corridor_benign", "corridor_harmful"), "lambda_schedule", "corridor"),
    (("worst_case_temperature",), "worst_case", True),
    (("running_decay", "running_window"), "spectrum", "running"),
)


# keyword options of an immunizer are fields, each written once; two immunizers stay different
# objects
_options = dataclass(kw_only=True, eq=False)


@_options
class GradientImmunizer(Immunizer):
    """What all gradient immunizers share: the schedule.

    Args:
        epochs: passes over the benign task's rows. steps: number of updates instead, if given.
        batch_size: rows of each task per step. lr: step size η. lr_schedule: ``constant`` or
            ``cosine`` to 0.
        optimizer: ``plain`` θ ← θ − η·gradient (Alg. 1) or ``adam`` (the release).
        layers: blocks that move, by name or as a count from the end; all if None.
        log_points: about how many times κ of the whole training data is measured.
        checkpoint_every: steps between saved states.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep"})

    name: str
    lr: float = 5e-3
    epochs: int = 30
    steps: int | None = None
    batch_size: int = 64
    lr_schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["plain", "adam"] = "plain"
    layers: Sequence[str] | int | None = None
    log_points: int = 25
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        number("immunize.lr", self.lr, above=0)
        _each(count, 1, epochs=self.epochs, checkpoint_every=self.checkpoint_every)
        _each(count, 2, batch_size=self.batch_size, log_points=self.log_points)
        if self.steps is not None:
            count("immunize.steps", self.steps)
        choice("immunize.optimizer", self.optimizer, ("plain", "adam"))
        choice("immunize.lr_schedule", self.lr_schedule, ("constant", "cosine"))
        if isinstance(self.layers, bool | float):
            raise UserError(
                "immunize.layers",
                self.layers,
                "must be null, a count from the end, or names of blocks.",
            )
        if self.layers is not None and not isinstance(self.layers, int):
            self.layers = names("immunize.layers", self.layers)

    @property
    def schedule(self) -> Schedule:
        return _pick(Schedule, self, spectrum="batch", running_decay=0.9, running_window=4)

    def objective(self) -> StepObjective:
        raise NotImplementedError  # abstract: each immunizer below has its own

    def __call__(
        self, model: FeatureModel, case: Case, *, seed: int, checkpoint: Checkpoint | None, log: Log
    ) -> FeatureModel:
        return Trainer(self.schedule, model, case, seed, log).run(
            self.objective(), checkpoint, self.name
        )


@_options
class Kappa(GradientImmunizer):
    """θ ← θ − η∇L(D_P) − ηλ_P K_P⁻¹∇R_well(H_P) − ηλ_H K_H⁻¹∇R_ill(H_H).

    Args:
        lambda_p, lambda_h: λ_P, λ_H ≥ 0; one of them 0 gives the ablations ``kappa_ill_only`` and
            ``kappa_well_only``.
        scale: what the matrices inside the two terms are divided by, K and H alike. ``none``: the
            sum over a batch of rows, as written in the paper, so that λ depends on the units of the
            data; ``initial``: σ_1(H(θ_0)) at the size of a batch; ``current``: σ_1 of the step's
            own H, held constant under the derivative.
        preconditioned: the K⁻¹ of Alg. 1.
        ridge_benign, ridge_harmful: ρ in (K + ρI)⁻¹, in units of ``scale``; 0 is the
            pseudo-inverse.
        solve_side: ``left`` as written, ``right`` as released (needs both ridges > 0); of linear
            extractors, as a layer of a network has its Gram matrix on its input side.
        rank_rule: p and k are numerical ranks (``rank``) or the number of features (``dimension``,
            released).
        rank_tolerance: relative to σ_max of the feature matrix; None for max(n, d)·ε.
        cluster_tolerance: relative width of the cluster of extremal eigenvalues that is averaged.
        optimizer_aware: ``diagonal`` measures κ after the attacker's own Jacobi preconditioner.
        supervised: weight of L(D_P); its head is fitted to θ_0 first and then moves along.
        lambda_schedule: ``fixed`` or ``corridor``: dual ascent with ``corridor_rate``, κ(H_P) at
            most ``corridor_benign`` times and κ(H_H) at least ``corridor_harmful`` times its value
            at the first step.
        worst_case: softmax weights over harmful tasks with ``worst_case_temperature``; else equal
            weights.
        spectrum: rows behind each estimate of a Gram matrix, see
            `immunize.kappa.sampling.RowSampler`.
        running_decay: β. running_window: number of batches, both for ``spectrum=running``.
    """

    name: str = "kappa"
    lambda_p: float
    lambda_h: float
    scale: Literal["none", "initial", "current"] = "initial"
    preconditioned: bool = True
    ridge_benign: float = 0.0
    ridge_harmful: float = 0.0
    solve_side: spectral.Side = "left"
    rank_rule: Literal["rank", "dimension"] = "rank"
    rank_tolerance: float | None = None
    cluster_tolerance: float = 0.0
    optimizer_aware: Literal["none", "diagonal"] = "none"
    supervised: float = 1.0
    lambda_schedule: Literal["fixed", "corridor"] = "fixed"
    corridor_rate: float = 0.1
    corridor_benign: float = 1.0
    corridor_harmful: float = 1.0
    worst_case: bool = False
    worst_case_temperature: float = 1.0
    spectrum: Spectrum = "batch"
    running_decay: float = 0.9
    running_window: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("immunize.spectrum", self.spectrum, SPECTRA)
        number("immunize.running_decay", self.running_decay, above=0, high=1)
        count("immunize.running_window", self.running_window, 1)
        _each(number, 0, lambda_p=self.lambda_p, lambda_h=self.lambda_h, supervised=self.supervised)
        _each(number, 0, ridge_benign=self.ridge_benign, ridge_harmful=self.ridge_harmful)
        number("immunize.corridor_rate", self.corridor_rate, 0)
        positive = ("corridor_benign", "corridor_harmful", "worst_case_temperature")
        _each(partial(number, above=0), **{key: getattr(self, key) for key in positive})
        if self.rank_tolerance is not None:
            number("immunize.rank_tolerance", self.rank_tolerance, above=0, below=1)
        number("immunize.cluster_tolerance", self.cluster_tolerance, 0, below=1)
        _each(flag, preconditioned=self.preconditioned, worst_case=self.worst_case)
        choice("immunize.scale", self.scale, ("none", "initial", "current"))
        choice("immunize.solve_side", self.solve_side, ("left", "right"))
        choice("immunize.rank_rule", self.rank_rule, ("rank", "dimension"))
        choice("immunize.optimizer_aware", self.optimizer_aware, ("none", "diagonal"))
        choice("immunize.lambda_schedule", self.lambda_schedule, ("fixed", "corridor"))
        if self.lambda_p == self.lambda_h == 0:
            raise UserError(
                "immunize.lambda_h",
                0,
                "λ_P and λ_H are both 0; choose immunize=none for no immunization",
            )
        if self.solve_side == "right" and min(self.ridge_benign, self.ridge_harmful) <= 0:
            raise UserError(
                "immunize.solve_side", "right", "needs ridge_benign > 0 and ridge_harmful > 0"
            )
        self._check_unread()

    def _check_unread(self) -> None:
        default = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        for options, key, needed in _READ_BY:
            for option in options:
                needs = f"immunize.{key}={str(needed).lower()}"
                unread(
                    f"immunize.{option}",
                    getattr(self, option),
                    default[option],
                    getattr(self, key) == needed,
                    needs,
                )
        for option, weight in (
            ("corridor_benign", "lambda_p"),
            ("corridor_harmful", "lambda_h"),
        ):  # what it scales
            given, read = getattr(self, option), getattr(self, weight) > 0
            unread(f"immunize.{option}", given, default[option], read, f"immunize.{weight} > 0")

    def check(self, cases: Sequence[Case]) -> None:
        """Hook of `lab.runner.assemble.check_cases`."""
        if self.worst_case and all(len(case.harmful) == 1 for case in cases):
            told = (
                "weighs several harmful tasks; this scenario has one in every case. Take "
                "scenario=mnist_harm_set."
            )
            raise UserError("immunize.worst_case", True, told)

    @property
    def schedule(self) -> Schedule:
        return _pick(Schedule, self)

    @property
    def options(self) -> SpectralOptions:
        benign, harmful = self.terms()
        return _pick(SpectralOptions, self, benign=benign, harmful=harmful)

    @staticmethod
    def terms() -> tuple[spectral.Objective, spectral.Objective]:
        """The functions of H_P and of H_H that are descended."""
        return spectral.well, spectral.ill

    def objective(self) -> StepObjective:
        return SpectralObjective(self.options)


class KappaOpt(Kappa):
    """The baseline Opt κ: descends λ_P log κ(H_P) + λ_H/log κ(H_H) (§5.1 of arXiv 2505.23760, the
    release).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_rule != "rank":
            told = "belongs to R_well and R_ill; log κ has no p and k. Leave it out."
            raise UserError("immunize.rank_rule", self.rank_rule, told)

    @staticmethod
    def terms() -> tuple[spectral.Objective, spectral.Objective]:
        return spectral.log_kappa, spectral.inverse_log_kappa


@_options
class KappaImma(GradientImmunizer):
    """The baseline IMMA (arXiv 2311.18815) on the linear probe, see
    `immunize.kappa.objectives.BilevelObjective`.

    Args:
        inner_steps: attacker's steps per update. inner_step: in units of the stable step 1/L.
        w_prior: weight of the benign loss.
    """

    name: str = "kappa_imma"
    inner_steps: int = 1
    inner_step: float = 0.5
    w_prior: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        count("immunize.inner_steps", self.inner_steps)
        number("immunize.inner_step", self.inner_step, above=0)
        number("immunize.w_prior", self.w_prior, 0)

    def objective(self) -> StepObjective:
        return BilevelObjective(self.inner_steps, self.inner_step, self.w_prior)
