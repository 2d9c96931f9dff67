"""What all gradient immunizers share: the options, the loop, the head of a task, and the engines.

An engine says how a gradient with respect to features moves a model. `LinearEngine` and
`DeepEngine` have the same methods. In every step `view` evaluates features of some rows of each
task, `add` takes gradients with respect to them, and `finish` leaves the sum in ``.grad`` of
``parameters``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from immunize.kappa.spectral import preconditioned_step, right_solve
from lab.core.condition import (
    condition_number,
    numerical_rank,
    relative_immunization_ratio,
    rir_bound,
    row_groups,
    singular_values,
)
from lab.core.config import AsList, Count, Positive, Text, config
from lab.core.data import Case, Kind, Task
from lab.core.errors import Diverged, UserError, nearest
from lab.core.seeding import batch_rows, derive
from lab.core.training import Row, restore_state, schedule_factor, state_tensors, train
from lab.core.types import Budget, Checkpoint, FeatureModel, Immunizer, Log
from lab.models.activations import features, prefix

TINY = 1e-300
HEAD_STEP = 0.5  # heads move by this share of their stable step 1/L, so that they cannot diverge
FIT_STEPS = 50  # L-BFGS iterations of the first fit; the head goes on moving afterwards
# relative to σ_1 of the Gram matrix: keeps the first head small along noise directions
FIT_RIDGE = 1e-3
CHUNK = 64  # rows per forward pass of a deep model where no gradient is needed

Layers = Annotated[tuple[Text, ...], AsList, Field(min_length=1)]
"""Names of blocks; a single one is a list of one."""


@config
class GradientImmunizer(Immunizer[FeatureModel, Case]):
    """Moves the weights step by step.

    Args:
        lr: step size η.
        epochs: passes over the benign task's rows.
        steps: number of updates instead, if set.
        batch_size: rows of each task per step.
        lr_schedule: ``constant`` or ``cosine`` to 0.
        optimizer: ``plain`` θ ← θ − η·gradient (Alg. 1) or ``adam`` (the release).
        layers: blocks that move, by name or as a count; all if None.
        layer_choice: which blocks a count takes: the ``last`` ones, or those whose ``gradient`` of
            the harmful loss is largest relative to that of the benign loss
            (`blocks_by_gradient`). Only a count of ``layers`` takes ``gradient``.
        log_points: about how many times κ of the whole training data is measured.
        checkpoint_every: steps between saved states.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep"})

    name: Text
    lr: Positive = 5e-3
    epochs: Count = 30
    steps: Count | None = None
    batch_size: Annotated[int, Field(strict=True, ge=2)] = 64
    lr_schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["plain", "adam"] = "plain"
    layers: Count | Layers | None = None
    layer_choice: Literal["last", "gradient"] = "last"
    log_points: Annotated[int, Field(strict=True, ge=2)] = 25
    checkpoint_every: Count = 200

    def __post_init__(self) -> None:
        if self.layer_choice == "gradient" and not isinstance(self.layers, int):
            fix = "chooses a number of blocks; set immunize.layers to that number."
            raise UserError("immunize.layer_choice", self.layer_choice, fix)

    @abstractmethod
    def trainer(self, model: FeatureModel, case: Case, seed: int) -> KappaTrainer:
        """Return what trains a copy of ``model``."""

    def __call__(
        self, model: FeatureModel, case: Case, *, seed: int, checkpoint: Checkpoint | None, log: Log
    ) -> FeatureModel:
        """Return immunized weights; see `lab.core.types.Immunizer`.

        Raises:
            Diverged: features, gradients or weights left the finite numbers.
        """
        trainer = self.trainer(model, case, seed)
        train(
            trainer,
            trainer.steps + 1,
            label=self.name,
            checkpoint=checkpoint,
            log=log,
            save_every=self.checkpoint_every,
        )
        return trainer.engine.export()


class Head:
    """w [d, c] with its loss on features y [n, d]: squared for regression, cross-entropy else. No
    intercept: the Hessian of the probe is YᵀY.
    """

    def __init__(self, task: Task, dim: int) -> None:
        self.regression = task.kind == "regression"
        self.targets = task.train.y
        self.classes = 1 if self.regression else max(task.classes, 2)
        self.w = torch.zeros(dim, self.classes, dtype=torch.float64)

    def loss(self, y: Tensor, rows: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the mean loss, its gradient with respect to features [n, d] and to w [d, c]."""
        with torch.enable_grad():
            y, w = y.detach().requires_grad_(), self.w.detach().requires_grad_()
            value = self.value(y, rows, w)
        by_y, by_w = torch.autograd.grad(value, (y, w))
        return float(value.detach()), by_y, by_w

    def value(self, y: Tensor, rows: Tensor | slice, w: Tensor) -> Tensor:
        """Return the mean loss of a head ``w`` on features, for automatic differentiation."""
        targets = self.targets[rows]
        if self.regression:
            return (y @ w - targets.to(torch.float64)[:, None]).square().mean() / 2
        return F.cross_entropy(y @ w, targets)

    @staticmethod
    def lipschitz(y: Tensor) -> float:
        """Return the largest curvature of the squared loss in w: σ_1(YᵀY)/n (at least that of
        cross-entropy).
        """
        gram = y @ y.T if y.shape[0] < y.shape[1] else y.T @ y
        return float(torch.linalg.matrix_norm(gram, 2)) / y.shape[0]

    def descend(self, y: Tensor, gradient: Tensor, share: float) -> None:
        """Move w by ``share`` of the stable step 1/L on features ``y``."""
        self.w = self.w - share / max(self.lipschitz(y), TINY) * gradient

    def fit(self, y: Tensor) -> None:
        """Take the head that the original features have: ridge solution, or logistic regression by
        L-BFGS.
        """
        y = y.to(torch.float64)
        ridge = FIT_RIDGE * self.lipschitz(y) * len(y)
        if self.regression:
            self.w = preconditioned_step(y, self.targets.to(torch.float64)[:, None], ridge)
            return
        w = self.w.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([w], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = self.value(y, slice(None), w) + ridge / len(y) / 2 * w.square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        self.w = w.detach()


class LinearEngine:
    """θ with thin updates; columns that are zero in every task are left out, which changes nothing.

    A row of θ that belongs to a zero column never gets a gradient. Where θ_0 also sends no active
    input to a feature of that set (identity does not), such features stay zero and are left out
    too.
    """

    def __init__(self, model: FeatureModel, case: Case, layers: Sequence[str] | int | None) -> None:
        resolve_layers(model, layers)
        self._model = model.copy()
        inputs = [self._model.inputs(task.train.x) for task in case.tasks]
        theta = next(self._model.parameters()).detach()
        self._active = torch.stack([(x != 0).any(0) for x in inputs]).any(0)
        self._columns = torch.ones(theta.shape[1], dtype=torch.bool)
        if len(theta) == theta.shape[1] and not theta[self._active][:, ~self._active].any():
            self._columns = self._active
        theta = theta[self._active][:, self._columns]
        self.theta = theta.clone().requires_grad_(True)
        self.inputs = [x[:, self._active].contiguous() for x in inputs]
        self.parameters = [self.theta]
        self._x: dict[int, Tensor] = {}

    @torch.no_grad()
    def view(self, task: int, rows: Tensor, gradient: bool = True) -> Tensor:
        """Return features Y [n, d] float64 of ``rows`` of a task.

        Args:
            gradient: whether `add` may follow.
        """
        self._x[task] = self.inputs[task][rows]
        return self._x[task] @ self.theta

    def add(
        self,
        task: int,
        gradient: Tensor,
        scale: Tensor | float = 1.0,
        ridge: float | None = None,
        side: str = "left",
    ) -> None:
        """Add the gradient of the parameters for ∂f/∂(``scale``·Y), Y the last view of ``task``.

        Args:
            gradient: [n, d].
            scale: [n, 1] or a number.
            ridge: precondition with (K + ridge·I)⁻¹; None does not.
            side: of the preconditioner; ``right`` acts on the index of features, as the released
                code's solve does on the gradient of the transposed weight.
        """
        x = self._x[task] * scale
        if ridge is None:
            update = x.T @ gradient
        elif side == "left":
            update = preconditioned_step(x, gradient, ridge)
        else:
            inputs = x
            if x.shape[1] < gradient.shape[1]:  # zero columns included
                inputs = x.new_zeros(len(x), len(self._active))
                inputs[:, self._active] = x
            update = x.T @ right_solve(inputs, gradient, ridge)
        self.theta.grad = update if self.theta.grad is None else self.theta.grad + update

    def finish(self) -> None:
        """Leave the sum of what was added in ``.grad`` of the parameters."""

    @torch.no_grad()
    def features(self, task: int) -> Tensor:
        """Return features [n, d] of all training rows."""
        return self.inputs[task] @ self.theta

    @torch.no_grad()
    def export(self) -> FeatureModel:
        """Return an independent model with the parameters as they are now."""
        model = self._model.copy()
        weight = next(model.parameters())
        rows = weight[self._active]
        rows[:, self._columns] = self.theta
        weight[self._active] = rows
        return model


class DeepEngine:
    """Moves the parameters of some blocks; the frozen prefix is evaluated once.

    The preconditioner of Alg. 1 for non-linear extractors: a linear layer that is the identity in
    the forward pass follows the features and multiplies the gradient on its way back by (X̃ᵀX̃ +
    ρI)⁻¹, X̃ the features (the dummy layer of arXiv 2505.23760 §4). Evaluated in the thin factor of
    X̃.
    """

    def __init__(self, model: FeatureModel, case: Case, layers: Sequence[str] | int | None) -> None:
        self._model = model.copy().requires_grad_(False)
        moving = resolve_layers(model, layers)
        self._start = moving[0]
        self.parameters = [p for i in moving for p in self._model.blocks[i].parameters()]
        if not self.parameters:
            fix = "these blocks have no parameters; choose others."
            raise UserError("immunize.layers", layers, fix)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self._inputs = [prefix(self._model, task.train.x, self._start) for task in case.tasks]
        self._graphs: dict[int, Tensor] = {}  # features of the last view, with their graph
        self._gradients: dict[int, Tensor] = {}

    def _run(self, z: Tensor) -> Tensor:
        return self._model.run(z if self._start else self._model.inputs(z), self._start)

    def view(self, task: int, rows: Tensor, gradient: bool = True) -> Tensor:
        with torch.set_grad_enabled(gradient):
            self._graphs[task] = self._run(self._inputs[task][rows])
        return self._graphs[task].detach().to(torch.float64)

    def add(
        self,
        task: int,
        gradient: Tensor,
        scale: Tensor | float = 1.0,
        ridge: float | None = None,
        side: str = "left",
    ) -> None:
        if ridge is not None:
            y = self._graphs[task].detach().to(torch.float64)
            gradient = right_solve(y * scale, gradient, ridge)
        by_feature = (gradient * scale).to(self._graphs[task].dtype)
        self._gradients[task] = self._gradients.get(task, 0) + by_feature

    def finish(self) -> None:
        if self._gradients:
            graphs = [self._graphs[task] for task in self._gradients]
            torch.autograd.backward(graphs, list(self._gradients.values()))
        self._gradients = {}

    @torch.no_grad()
    def features(self, task: int) -> Tensor:
        return torch.cat([self._run(part) for part in self._inputs[task].split(CHUNK)])

    def export(self) -> FeatureModel:
        return self._model.copy().requires_grad_(True)


def resolve_layers(model: FeatureModel, layers: Sequence[str] | int | None) -> list[int]:
    """Return block numbers, ascending: all for None, the last n for a count, else by name.

    Raises:
        UserError: a name that the model has not, or a larger count than it has blocks.
    """
    names = model.block_names
    count = len(names) if layers is None else layers
    if isinstance(count, int):
        if count > len(names):
            raise UserError("immunize.layers", layers, f"the model has {len(names)} blocks.")
        return list(range(len(names) - count, len(names)))
    for name in count:
        if name not in names:
            raise UserError("immunize.layers", name, nearest(name, names))
    return sorted(map(names.index, count))


def blocks_by_gradient(model: FeatureModel, case: Case) -> list[str]:
    """Return the names of the blocks with weights, those that a harmful attack moves most first.

    The measure is ‖∂L_H/∂θ_b‖ ÷ ‖∂L_P/∂θ_b‖ over all weights θ_b of a block, at θ_0, with heads
    fitted to its features; L are mean losses over all training rows, and of several harmful tasks
    the largest norm counts.
    """
    net = model.copy().requires_grad_(True)
    blocks = dict(zip(net.block_names, net.blocks, strict=True))
    squares: dict[str, list[float]] = {name: [] for name in blocks}
    for task in case.tasks:
        y = features(model, task.train.x)
        head = Head(task, y.shape[1])
        head.fit(y)
        net.zero_grad()
        for rows in torch.arange(len(y)).split(CHUNK):
            loss = head.value(net(task.train.x[rows]).double(), rows, head.w)
            (loss * len(rows) / len(y)).backward()
        for name, block in blocks.items():
            slopes = [p.grad for p in block.parameters() if p.grad is not None]
            squares[name].append(sum(float(slope.square().sum()) for slope in slopes))
    ratios = {name: max(harm) / max(benign, TINY) for name, (benign, *harm) in squares.items()}
    return sorted(filter(ratios.get, ratios), key=ratios.__getitem__, reverse=True)


class KappaTrainer(ABC):
    """Descends an objective on a copy of ``model`` (a `Trainee`).

    Logs condition numbers of the whole training data. Task 0 is the benign one.
    """

    heads: dict[int, Head]  # by number of the task
    values: dict[str, Any]  # what else a step reads of the step before, JSON-able

    def __init__(
        self, options: GradientImmunizer, model: FeatureModel, case: Case, seed: int
    ) -> None:
        self.options, self.case, self.seed = options, case, seed
        kind = LinearEngine if model.kind == "linear" else DeepEngine
        layers: Sequence[str] | int | None = options.layers
        if options.layer_choice == "gradient":
            count = len(resolve_layers(model, layers))
            layers = blocks_by_gradient(model, case)[:count]
            if len(layers) < count:
                fix = f"the harmful loss has a gradient in {len(layers)} blocks only."
                raise UserError("immunize.layers", count, fix)
        self.engine: LinearEngine | DeepEngine = kind(model, case, layers)
        rows = len(case.benign.train)
        self.steps = options.steps or options.epochs * (rows // min(options.batch_size, rows))
        optimizer = torch.optim.Adam if options.optimizer == "adam" else torch.optim.SGD
        self.optimizer = optimizer(self.engine.parameters, lr=options.lr)
        self.points = Budget(self.steps, 1, options.log_points).snapshots()
        self.ranks: dict[int, int] = {}
        self.before = [self._kappa(task) for task in range(len(case.tasks))]
        self.bounds: list[float | None] = [None] * len(case.harmful)
        if isinstance(self.engine, LinearEngine):
            x, theta = self.engine.inputs, self.engine.theta.detach()
            if numerical_rank(singular_values(x[0]), x[0].shape) == x[0].shape[1] == theta.shape[1]:
                self.bounds = [rir_bound(x[0], x_h, theta).value for x_h in x[1:]]

    @abstractmethod
    def descend(self, step: int) -> Row:
        """Add the gradients of ``step`` to the engine and return what is logged.

        Raises:
            FloatingPointError: numbers that are not finite.
        """

    def fit_heads(self, tasks: Sequence[Task]) -> dict[int, Head]:
        """Return a head for each of ``tasks``; that of the benign one is fitted to θ_0."""
        y = self.engine.features(0)
        heads = {i: Head(task, y.shape[1]) for i, task in enumerate(tasks)}
        heads[0].fit(y)
        return heads

    def batch(self, task: int, step: int) -> Tensor:
        """Return the row numbers of mini-batch ``step`` of a task."""
        rows = self.case.tasks[task].train
        label = f"{task}/{self.case.tasks[task].name}"
        size = min(self.options.batch_size, len(rows))
        return batch_rows(step, len(rows), size, self.seed, "rows", label)

    def supervise(self, y: Tensor, rows: Tensor, weight: float) -> float:
        """Step jointly on the benign loss: a gradient for the features, and the head moves."""
        value, by_feature, by_head = self.heads[0].loss(y, rows)
        self.engine.add(0, weight * by_feature)
        self.heads[0].descend(y, by_head, HEAD_STEP)
        return value

    def _kappa(self, task: int) -> float:
        """Return κ of all training rows, ``rank`` definition; for deep models the mean over groups
        (docs/reference/methods.md §2).

        Raises:
            FloatingPointError: a numerical rank below that of θ_0. An invertible θ keeps the rank,
                so κ has left what float64 can resolve, and a κ over the directions that remain
                would look small.
        """
        y = self.engine.features(task)
        check_finite(y, "features are not finite")
        if isinstance(self.engine, DeepEngine):
            if not bool(y.any(dim=1).all()):
                raise FloatingPointError("all features of some row are zero")
            groups = row_groups(len(y), seed=derive(self.seed, "groups", task))
            values = [condition_number(y[rows]) for rows in groups]
            return sum(values) / len(values)
        s = singular_values(y)
        rank = numerical_rank(s, y.shape)
        first = self.ranks.setdefault(task, rank)
        if rank < first:
            raise FloatingPointError(
                f"κ of task {task} is beyond float64: numerical rank {rank}, {first} at the start"
            )
        return float((s[0] / s[rank - 1]) ** 2)

    def step(self, step: int) -> Row | None:
        """Measure and update, or measure alone after the last update.

        Raises:
            Diverged: numbers left the finite range; carries the last good step.
        """
        try:
            row = self.descend(step)
            if step in self.points:
                after = [self._kappa(task) for task in range(len(self.before))]
                row = immunization_row(after, self.before, self.bounds) | dict(row)
            if step < self.steps:
                self.engine.finish()
                factor = schedule_factor(self.options.lr_schedule, step, self.steps)
                self.optimizer.param_groups[0]["lr"] = self.options.lr * factor
                self.optimizer.step()
                self.optimizer.zero_grad()
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            reason = f"{self.options.name} left the finite numbers at step {step}: {error}"
            raise Diverged(reason, max(step - 1, 0)) from error
        return row if step in self.points else None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        heads = {f"head.{task}": head.w for task, head in self.heads.items()}
        return heads | state_tensors(self.engine.parameters, self.optimizer), self.values

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        restore_state(self.engine.parameters, self.optimizer, tensors)
        self.values = values
        for task, head in self.heads.items():
            head.w = tensors[f"head.{task}"].clone()


class TaskTrainer(KappaTrainer):
    """Has a head for every task, and reads nothing else of the step before."""

    def __init__(
        self, options: GradientImmunizer, model: FeatureModel, case: Case, seed: int
    ) -> None:
        super().__init__(options, model, case, seed)
        self.values = {}
        self.heads = self.fit_heads(case.tasks)


def check_finite(values: Tensor | Iterable[float], reason: str) -> None:
    """Raise a `FloatingPointError` that gives ``reason`` unless all ``values`` are finite."""
    tensor = values if isinstance(values, Tensor) else torch.tensor([*values], dtype=torch.float64)
    if not bool(torch.isfinite(tensor).all()):
        raise FloatingPointError(reason)


def immunization_row(
    after: Sequence[float], before: Sequence[float], bounds: Sequence[float | None]
) -> dict[str, float]:
    """Return κ, RIR and its share of the bound, for the least immunized harmful task.

    Args:
        after: κ of every task, the benign one first.
        before: the same of θ_0.
        bounds: RIR* of every harmful task, where it is known.
    """
    rirs = [
        relative_immunization_ratio(kappa, first, after[0], before[0])
        for kappa, first in zip(after[1:], before[1:], strict=True)
    ]
    worst = rirs.index(min(rirs))
    row = {"rir": rirs[worst], "kappa_harmful": after[1 + worst], "kappa_benign": after[0]}
    bound = bounds[worst]
    return row if bound is None else row | {"rir_bound_ratio": rirs[worst] / bound}
