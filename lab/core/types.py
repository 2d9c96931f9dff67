"""The contracts that immunizers, attackers, metrics, scenarios and backbones meet.

Nothing here computes. A noun package (`immunize`, `attacks`, `eval`) imports this module and the
pure functions of `lab` (`condition`, `seeding`, `activations`, `errors`), never another noun.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from lab.core.data import Kind, ScenarioData

BASELINE = "none"


@runtime_checkable
class Scenario(Protocol):
    """Loads real data. Same seed, same bytes.

    Optional: a method ``asks_erasure() -> str | None``, the config key of what asks for something
    to be erased before a case starts. `lab.runner.assemble.assemble` then refuses ``erase=none``,
    unless a metric is of ``released`` weights.
    """

    name: str
    provides: ClassVar[frozenset[Kind]]  # the backbone kinds that its inputs suit

    def load(self, seed: int) -> ScenarioData:
        """All cases of ``seed``. Raises `UserError` for data that are missing or cannot be used."""


class FeatureModel(nn.Module):
    """A feature extractor: raw inputs [n, ...] to features [n, d].

    The network is a chain of named blocks, so that a prefix which does not move can be evaluated
    once (`lab.models.activations.prefix`). Parameters of ``blocks`` are all that a model has.
    Batch-norm layers stay in evaluation mode throughout the project: features must not depend on
    the batch they are computed in.
    """

    kind: ClassVar[Kind] = "deep"

    def __init__(self, blocks: Sequence[tuple[str, nn.Module]], feature_dim: int) -> None:
        super().__init__()
        self.block_names: tuple[str, ...] = tuple(name for name, _ in blocks)
        self.blocks = nn.ModuleList([module for _, module in blocks])
        self.feature_dim = feature_dim
        self.eval()

    def train(self, mode: bool = True) -> FeatureModel:
        """Stays in evaluation mode whatever ``mode`` is."""
        return super().train(False)

    def inputs(self, x: Tensor) -> Tensor:
        """Raw inputs to what the first block takes (deep models scale and normalise images
        here).
        """
        return x

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Blocks ``start`` to ``stop`` on what block ``start`` takes (``inputs(x)`` for 0)."""
        for block in list(self.blocks)[start:stop]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inputs(x))


# A `FeatureModel` with its `Case`, or a `lab.models.diffusion.DiffusionModel` with its
# `ConceptCase`: each part says in ``accepts`` which of the two it takes, and
# `lab.runner.assemble.check_fit` holds it to that before anything runs.
Model: TypeAlias = Any
AnyCase: TypeAlias = Any
AnyTask: TypeAlias = Any


@runtime_checkable
class Backbone(Protocol):
    """Builds the original model θ_0 for a case. Called again, it returns an equal, independent
    model.

    Optional: ``tokenizers()``, a list of those that read the texts; all texts are then checked, see
        `Attacker`.
    """

    name: str
    kind: Kind

    def build(self, case: AnyCase, seed: int) -> Model:
        """θ_0. Raises `UserError` for weights that are missing or of another model."""


@runtime_checkable
class Eraser(Protocol):
    """Takes ``case.erased`` out of a model before the experiment starts; returns new weights, input
    untouched.
    """

    name: str
    accepts: ClassVar[frozenset[Kind]]

    def __call__(self, model: Model, case: AnyCase, *, seed: int) -> Model:
        """A new model without ``case.erased``."""


class Checkpoint(Protocol):
    """Where a long stage keeps its state, so that a killed job continues at its last step."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state saved last (tensors and JSON-able values), or None."""

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Keep this state in place of the last one; ``values["step"]`` is told where a run was
        interrupted.
        """


class Log(Protocol):
    """Called by an immunizer: ``log(step, kappa_harmful=…, loss=…)``; float values, inf and nan
    allowed.
    """

    def __call__(self, step: int, **values: float) -> None: ...


@runtime_checkable
class Immunizer(Protocol):
    """Returns new weights; ``model`` is left untouched. Only declared parameters move.

    ``checkpoint`` may be None (tests, tiny runs). Raises `lab.core.errors.Diverged` when numbers
    leave the finite range and `lab.core.errors.UserError` for options that cannot work.
    """

    name: str
    accepts: ClassVar[frozenset[Kind]]

    def __call__(
        self, model: Model, case: AnyCase, *, seed: int, checkpoint: Checkpoint | None, log: Log
    ) -> Model: ...


@dataclass(frozen=True)
class Budget:
    """What an attacker may spend, equal in every model. A trajectory runs to ``horizon * multiple``
    steps.
    """

    horizon: int
    multiple: int = 5
    points: int = 20  # snapshots along the trajectory, step 0 and the last step included
    at: tuple[int, ...] | None = None  # the snapshots themselves, in place of ``points``

    @property
    def steps(self) -> int:
        return self.horizon * self.multiple

    def snapshots(self) -> tuple[int, ...]:
        """Steps at which to measure: geometric, always with 0, ``horizon`` and the last step."""
        last = self.steps
        grid = {0, self.horizon, last}
        if self.at is not None:
            return tuple(sorted(grid | set(self.at)))
        grid |= {round(last ** (i / max(self.points - 2, 1))) for i in range(self.points - 1)}
        return tuple(sorted(grid))


@dataclass
class Trajectory:
    """An attack, step by step.

    Attributes:
        steps: increasing step numbers, the first is 0 (before any update).
        values: one list per quantity, as long as ``steps``. Always ``train_loss`` and
            ``test_loss``; ``train_accuracy`` and ``test_accuracy`` for classification;
            ``norm_ratio`` where the attack has a unique optimum (linear probes).
        status: ``diverged`` keeps all finite points before the divergence.
        info: JSON-able facts (chosen learning rate, loss, number of trainable parameters, …).
        weights: what the attacker ends with (safetensors).
        samples: diffusion only: prompt family → uint8 [len(steps), count, 3, s, s], generated at
            every step of ``steps`` from the same latents.
    """

    steps: list[int]
    values: dict[str, list[float]]
    status: Literal["ok", "diverged"] = "ok"
    info: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)

    def at(self, name: str, step: int) -> float:
        """Value at the last recorded step that is ≤ ``step``."""
        index = max(i for i, s in enumerate(self.steps) if s <= step)
        return self.values[name][index]


@runtime_checkable
class Attacker(Protocol):
    """Fine-tunes a copy of ``model`` for ``task``. Input untouched; harmful and benign tasks alike.

    Optional: a method ``check(cases: tuple[Case, ...]) -> None``. Where present it is called once
    per seed before anything runs and raises `lab.core.errors.UserError` for data that the attacker
    cannot work on. A method ``texts() -> dict[str, str]``: config key → text that a text-to-image
    model will read, refused before anything runs where it holds a special token of the model's
    tokenizer.
    """

    name: str
    accepts: ClassVar[frozenset[Kind]]

    def __call__(
        self,
        model: Model,
        task: AnyTask,
        *,
        seed: int,
        budget: Budget,
        checkpoint: Checkpoint | None,
    ) -> Trajectory: ...


@dataclass
class Score:
    """One figure with its interval.

    ``n`` is the number of seeds. ``interval`` says what the interval supports: ``across_seeds`` (n
    ≥ 3), ``within_seed`` (fewer; no claim across seeds), ``point`` (nothing to resample). ``value``
    None needs a ``note`` with the reason (for example an infinite bound).
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 1
    better: Literal["higher", "lower", "neutral"] = "higher"
    interval: Literal["across_seeds", "within_seed", "point"] = "point"
    note: str | None = None
    unit: str = ""
    bound: Literal["lower", "upper"] | None = None  # ``value`` is a limit: the true one lies beyond


@dataclass
class SeedScore(Score):
    """A score that still knows its value in every seed, in the run's order, so that two runs can be
    paired.
    """

    per_seed: tuple[float, ...] = ()


@dataclass(frozen=True)
class ImageGrid:
    """Pictures uint8 [rows, columns, 3, s, s] with a label for every row and column."""

    images: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    caption: str = ""


@dataclass
class Scores:
    """What a metric returns.

    ``curves``: name → {"step": [...], model: [...], "x": label, "y": label, "log": "x" | "y" | "xy"
        | ""};
    ``tables``: name → list of flat rows (JSON-able); ``images``: name → a grid of pictures.
    """

    metrics: dict[str, Score] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    images: dict[str, ImageGrid] = field(default_factory=dict)


class RunView(Protocol):
    """Read access to everything that a run produced; loads lazily from the stage cache."""

    scenario: str
    immunizer: str  # the model under test; equals BASELINE when only the baseline model was run
    model_names: tuple[str, ...]  # (BASELINE,) or (BASELINE, immunizer)
    attacks: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: Budget
    diverged: dict[tuple[str, int], Any]  # (case, seed) → error of an immunization that diverged

    def cases(self, seed: int) -> tuple[AnyCase, ...]:
        """Cases of ``seed`` whose immunization did not diverge."""

    def model(self, model_name: str, case: AnyCase, seed: int) -> Model:
        """θ_I for the immunizer's model, θ_0 for the baseline model."""

    def history(self, case: AnyCase, seed: int) -> dict[str, list[float]]:
        """What the immunizer logged: ``step`` and one equally long list per quantity."""

    def trajectory(
        self, model_name: str, attack: str, case: AnyCase, task: AnyTask, seed: int
    ) -> Trajectory:
        """What ``attack`` did to the model of ``model_name`` on ``task``, at the snapshots of the
        budget.
        """

    def cached(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of a metric that other runs share, from the stage cache: ``key`` names all that
        determines them.
        """


@runtime_checkable
class RunMetric(Protocol):
    """A family of figures over a run. ``needs_models`` = 2 compares with the baseline model.

    Optional: the methods ``check`` and ``texts``, as in `Attacker`; ``released = True`` where the
    backbone is what somebody released, so that nothing is erased any more.
    """

    name: str
    accepts: ClassVar[frozenset[Kind]]
    needs_models: ClassVar[int]
    needs_attack: ClassVar[bool]

    def __call__(self, run: RunView) -> Scores:
        """The family's figures, curves and tables."""


def clone(model: Model) -> Model:
    """An independent model with equal weights; a diffusion model shares its autoencoder, which
    never moves.
    """
    return model.copy() if hasattr(model, "copy") else copy.deepcopy(model)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """True when both have the same parameters and buffers, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
