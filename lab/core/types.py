"""The contracts: base classes of immunizers, attackers, metrics, scenarios, backbones and erasers,
and the data that they exchange.

An own method is a subclass of the base class of its kind: it sets ``name`` and ``accepts``
and implements ``__call__``. The other methods are hooks with a default. Nothing here computes.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeAlias

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn
from typing_extensions import Self, TypeVar

from lab.core.config import SETTINGS, Count, Index
from lab.core.data import Case, Concept, ConceptCase, Kind, ScenarioData, Task
from lab.core.errors import UserError

BASELINE, IMMUNIZED = "baseline", "immunized"  # the two models of a run


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

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    def copy(self) -> Self:
        """Return an independent model with equal weights."""
        return copy.deepcopy(self)

    def inputs(self, x: Tensor) -> Tensor:
        """Return what the first block takes; deep models scale and normalise images."""
        return x

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Apply blocks ``start`` to ``stop``; the first takes ``inputs(x)``."""
        for block in list(self.blocks)[start:stop]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inputs(x))


class TextToImageModel(nn.Module):
    """What the project reads of a text-to-image model, `lab.models.diffusion.DiffusionModel`."""

    kind: ClassVar[Kind] = "diffusion"
    unet: Any  # UNet2DConditionModel, which mypy sees without the methods of nn.Module
    vae: Any  # AutoencoderKL, as unet
    text_encoders: Any  # as unet, in an nn.ModuleList
    tokenizers: list[Any]
    scheduler: Any
    pipeline_class: str
    zero_negative: bool

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of a generated image in pixels."""

    @abstractmethod
    def copy(self) -> Self:
        """Return an independent model with equal weights. It shares the autoencoder, which never
        moves, until other weights are loaded.
        """


# `FeatureModel` goes with `Case` and `Task`, `TextToImageModel` with `ConceptCase` and `Concept`.
# Each part says in ``accepts`` which kinds it takes; `lab.runner.assemble.check_fit` compares them.
Model: TypeAlias = FeatureModel | TextToImageModel
AnyCase: TypeAlias = Case | ConceptCase
AnyTask: TypeAlias = Task | Concept
# A part that takes one kind of model says so, e.g. ``Attacker[FeatureModel, Task]``.
ModelT = TypeVar("ModelT", default=Any)
CaseT = TypeVar("CaseT", default=Any)
TaskT = TypeVar("TaskT", default=Any)
ModelT_co = TypeVar("ModelT_co", covariant=True, default=Any)
CaseT_contra = TypeVar("CaseT_contra", contravariant=True, default=Any)
TaskT_contra = TypeVar("TaskT_contra", contravariant=True, default=Any)


class Scenario(ABC):
    """Loads data. The same seed gives the same bytes."""

    name: str
    provides: ClassVar[frozenset[Kind]]  # the kinds of backbone that its inputs suit

    @abstractmethod
    def load(self, seed: int) -> ScenarioData:
        """Return all cases of ``seed``.

        Raises:
            UserError: data that are missing or cannot be used.
        """

    def asks_erasure(self) -> str | None:
        """Return the config key of what must be erased before a case starts, if anything.

        ``erase=none`` is then refused, unless a metric is of ``released`` weights.
        """
        return None


class Backbone(ABC, Generic[ModelT_co, CaseT_contra]):
    """Builds the original model θ_0 of a case; called again, an equal, independent model."""

    name: str
    kind: ClassVar[Kind]

    @abstractmethod
    def build(self, case: CaseT_contra, seed: int) -> ModelT_co:
        """Return θ_0.

        Raises:
            UserError: weights that are missing or of another model.
        """

    def tokenizers(self) -> Sequence[Any]:
        """Return the tokenizers that read prompts; texts with their special tokens are refused."""
        return ()


class Method(ABC):
    """What erasers, immunizers, attackers and metrics share."""

    name: str
    accepts: ClassVar[frozenset[Kind]]

    def check(self, cases: tuple[Any, ...]) -> None:
        """Check the cases of a seed before anything runs.

        Raises:
            UserError: data that this method cannot work on.
        """
        del cases

    def texts(self) -> dict[str, str]:
        """Return config key → text that a text-to-image model will read."""
        return {}

    def fingerprint(self) -> str:
        """Return a hash of what it reads besides its options, such as weights that an option names
        by path; empty if nothing. Asked before anything runs.

        Raises:
            UserError: there is nothing to read.
        """
        return ""


class Eraser(Method, Generic[ModelT, CaseT]):
    """Takes ``case.erased`` out of a model before the experiment starts."""

    @abstractmethod
    def __call__(self, model: ModelT, case: CaseT, *, seed: int) -> ModelT:
        """Return a model without ``case.erased``; ``model`` is left untouched."""


class Checkpoint(Protocol):
    """Where a long stage keeps its state, so that a killed job continues at its last step."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the state saved last (tensors and JSON-able values), or None."""

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Keep this state in place of the last one; ``values["step"]`` says how far it went."""


class Log(Protocol):
    """Called by an immunizer: ``log(step, kappa_harmful=…, loss=…)``; float values, inf and nan
    allowed.
    """

    def __call__(self, step: int, **values: float) -> None: ...


class Immunizer(Method, Generic[ModelT, CaseT]):
    """Changes the weights of a model so that fine-tuning on the harmful tasks is hard.

    ``before_erasure``: it takes the model before the scenario erases anything; the erasure follows.
    """

    before_erasure: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, model: ModelT, case: CaseT, *, seed: int, checkpoint: Checkpoint | None, log: Log
    ) -> ModelT:
        """Return a model with new weights; ``model`` is left untouched.

        Args:
            checkpoint: None in tests and tiny runs.

        Raises:
            Diverged: numbers left the finite range.
            UserError: options that cannot work.
        """

    def may_change(self, parameter: str) -> bool:
        """Return whether it may change a parameter of the model. An autoencoder is no protection:
        an attacker puts back the published one.
        """
        return not parameter.startswith("vae.")

    def shards(self, case: CaseT) -> int:
        """Return into how many parts one immunization can be split over processes."""
        return 1


@checked(config=SETTINGS, frozen=True)
class Budget:
    """What an attacker may spend, equal for every model.

    Attributes:
        horizon: the number of steps that a metric compares models at.
        multiple: a trajectory runs to ``horizon * multiple`` steps.
        points: snapshots along the trajectory, step 0 and the last step included.
        at: the steps of the snapshots, in place of ``points``.
        unit: ``images``: every "step" above is one training image that the attacker sees, so that
            attackers with different batch sizes are compared by what they see; text-to-image only.
    """

    horizon: Count
    multiple: Count = 5
    points: Annotated[int, Field(strict=True, ge=2)] = 20
    at: tuple[Index, ...] | None = None
    unit: Literal["steps", "images"] = "steps"

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if any(step > self.steps for step in self.at or ()):
            raise ValueError(f"at: steps end at horizon × multiple = {self.steps}")
        return self

    @property
    def steps(self) -> int:
        return self.horizon * self.multiple

    def in_updates(self, batch_size: int) -> Budget:
        """Return the same budget in optimizer updates of ``batch_size`` images, without the
        snapshots that lie within an update.

        Raises:
            UserError: the horizon is no multiple of the batch size.
        """
        if self.unit == "steps":
            return self
        if self.horizon % batch_size:
            reason = f"must be a multiple of every attack's batch_size, and one has {batch_size}."
            raise UserError("budget.horizon", self.horizon, reason)
        at = tuple(p // batch_size for p in self.snapshots() if p % batch_size == 0)
        return Budget(self.horizon // batch_size, self.multiple, at=at)

    def snapshots(self) -> tuple[int, ...]:
        """Return the steps to measure at: geometric, with 0, ``horizon`` and the last step."""
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
        """Return the value at the last recorded step that is ≤ ``step``."""
        index = max(i for i, s in enumerate(self.steps) if s <= step)
        return self.values[name][index]


class Attacker(Method, Generic[ModelT, TaskT]):
    """Fine-tunes a copy of a model on a task, harmful and benign tasks alike."""

    @abstractmethod
    def __call__(
        self,
        model: ModelT,
        task: TaskT,
        *,
        seed: int,
        budget: Budget,
        checkpoint: Checkpoint | None,
    ) -> Trajectory:
        """Return what fine-tuning does, at ``budget.snapshots()``; ``model`` is left untouched."""

    def check_budget(self, budget: Budget) -> None:
        """Check that the attack can count in the unit of ``budget``.

        Raises:
            UserError: it cannot.
        """
        if budget.unit == "images":
            fix = "counts training images of attacks on text-to-image models; take steps."
            raise UserError("budget.unit", "images", fix)

    def variants(self) -> Mapping[str, tuple[Self, dict[str, Any]]]:
        """Return name → attack and its options, for the attacks that take the place of this one;
        empty where it stands for itself.
        """
        return {}

    def dry_open(self, model: ModelT, task: TaskT) -> None:
        """Prepare an attack on a text-to-image model as `__call__` would, before anything runs.

        Raises:
            UserError: options that do not fit the model.
        """


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
    per_seed: tuple[float, ...] = ()  # ascending by seed, where known, so that runs can be paired


@dataclass(frozen=True)
class ImageGrid:
    """Images uint8 [rows, columns, 3, s, s] with a label for every row and column."""

    images: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    caption: str = ""


@dataclass
class Scores:
    """What a metric returns.

    ``curves``: name → {"step": [...], model: [...], "x": label, "y": label, "log": "x" | "y" | "xy"
        | ""};
    ``tables``: name → list of flat rows (JSON-able); ``images``: name → a grid of images.
    """

    metrics: dict[str, Score] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    images: dict[str, ImageGrid] = field(default_factory=dict)


class RunView(Protocol[ModelT_co, CaseT, TaskT_contra]):
    """Read access to everything that a run produced; loads lazily from the stage cache."""

    scenario: str
    model_names: tuple[str, ...]  # (BASELINE,) where nothing is immunized, or (BASELINE, IMMUNIZED)
    attacks: tuple[str, ...]
    budget: Budget
    diverged: dict[tuple[str, int], Any]  # (case, seed) → error of an immunization that diverged

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds with at least one case whose immunization did not diverge."""

    def cases(self, seed: int) -> tuple[CaseT, ...]:
        """Return the cases of ``seed`` whose immunization did not diverge."""

    def model(self, model_name: str, case: CaseT, seed: int) -> ModelT_co:
        """Return θ_I for the immunizer's model, θ_0 for the baseline model."""

    def history(self, case: CaseT, seed: int) -> dict[str, list[float]]:
        """Return what the immunizer logged: ``step`` and one equally long list per quantity."""

    def trajectory(
        self, model_name: str, attack: str, case: CaseT, task: TaskT_contra, seed: int
    ) -> Trajectory:
        """Return what ``attack`` did to a model on ``task``, at the snapshots of the budget."""

    def cached(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors of a metric that other runs share, from the stage cache.

        ``key`` names all that determines them.
        """


class RunMetric(Method):
    """A family of metrics over a run.

    Attributes:
        needs_models: 2 compares with the baseline model.
        needs_attack: reads trajectories.
        released: the backbone is what somebody released, so that nothing is erased any more.
    """

    needs_models: ClassVar[int] = 1
    needs_attack: ClassVar[bool] = False
    released: ClassVar[bool] = False

    def settled_tasks(self, run: RunView) -> frozenset[str]:
        """Return the names of tasks that need no attack, as their result is known before."""
        return frozenset()

    @abstractmethod
    def __call__(self, run: RunView) -> Scores:
        """Return the metrics, curves, tables and images of the family."""


def changed_tensors(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of ``after`` that differ from those of ``before``."""
    old = before.state_dict()
    return {k: v for k, v in after.state_dict().items() if not v.equal(old[k].to(v.device))}
