"""How a gradient with respect to features moves a model: one engine for linear, one for deep
extractors.

Both have the same face: `view` evaluates features of some rows, `add` and `add_regularizer` take
gradients with respect to those features, `finish` leaves the sum in ``.grad`` of `parameters`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from immunize.kappa.spectral import Side, preconditioned_step, right_solve
from lab.core.data import Case
from lab.core.errors import UserError, nearest
from lab.core.types import FeatureModel
from lab.models.activations import prefix

CHUNK = 64  # rows per forward pass of a deep model where no gradient is needed


@dataclass
class View:
    """Features ``y`` [n, d] float64, detached, of rows ``rows`` of task number ``task``."""

    task: int
    rows: Tensor
    y: Tensor
    source: Tensor  # linear: the inputs X [n, d]; deep: the features with their graph


@dataclass(frozen=True)
class Preconditioner:
    """(K + ridge·I)⁻¹ on the regulariser's gradient; ``side`` as in
    `spectral.preconditioned_step`.
    """

    ridge: float
    side: Side = "left"


class Engine(Protocol):
    """What moves: its parameters, features of rows, and gradients that come in with respect to
    features.
    """

    parameters: list[Tensor]

    def view(self, task: int, rows: Tensor, gradient: bool = True) -> View:
        """Features of ``rows`` of task number ``task``; with ``gradient`` they can be given to
        `add`.
        """

    def add(self, view: View, gradient: Tensor) -> None:
        """Ordinary chain rule for ∂f/∂Y [n, d]."""

    def add_regularizer(
        self, view: View, scale: Tensor, gradient: Tensor, solve: Preconditioner | None
    ) -> None:
        """Gradient with respect to ``scale``·Y (``scale`` [n, 1]), preconditioned unless ``solve``
        is None.
        """

    def finish(self) -> None:
        """Leave the sum of what was added in ``.grad`` of the parameters, and forget it."""

    def features(self, task: int) -> Tensor:
        """Features [n, d] of all training rows, without gradient."""

    def state(self) -> dict[str, Tensor]:
        """The parameters by name, for a checkpoint."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""

    def export(self) -> FeatureModel:
        """An independent model with the parameters as they are now."""


class LinearEngine:
    """θ with thin updates; columns that are zero in every task are left out, which changes nothing.

    A row of θ that belongs to a zero column never gets a gradient. Where θ_0 also sends no active
    input to a feature of that set (identity does not), such features stay zero and are left out
    too.
    """

    def __init__(self, model: FeatureModel, case: Case) -> None:
        self._model = copy.deepcopy(model)
        inputs = [self._model.inputs(task.train.x) for task in case.tasks]
        theta = next(self._model.parameters()).detach()
        self._active = torch.stack([(x != 0).any(0) for x in inputs]).any(0)
        square = theta.shape[0] == theta.shape[1]
        self._reduce_right = square and not bool(theta[self._active][:, ~self._active].any())
        theta = theta[self._active]
        if self._reduce_right:
            theta = theta[:, self._active]
        self.theta = theta.clone().requires_grad_(True)
        self.inputs = [x[:, self._active].contiguous() for x in inputs]
        self.parameters: list[Tensor] = [self.theta]
        self._gradient: Tensor | None = None

    @torch.no_grad()
    def view(self, task: int, rows: Tensor, gradient: bool = True) -> View:
        x = self.inputs[task][rows]
        return View(task, rows, x @ self.theta, x)

    def _accumulate(self, update: Tensor) -> None:
        self._gradient = update if self._gradient is None else self._gradient.add_(update)

    def add(self, view: View, gradient: Tensor) -> None:
        self._accumulate(view.source.T @ gradient)

    def add_regularizer(
        self, view: View, scale: Tensor, gradient: Tensor, solve: Preconditioner | None
    ) -> None:
        x = view.source * scale
        if solve is None:
            self._accumulate(x.T @ gradient)
        elif solve.side == "right" and x.shape[1] < gradient.shape[1]:
            wide = x.new_zeros(len(x), len(self._active))
            wide[:, self._active] = (
                x  # this side acts on the index of features, zero columns included
            )
            self._accumulate(x.T @ right_solve(wide, gradient, solve.ridge))
        else:
            self._accumulate(preconditioned_step(x, gradient, solve.ridge, solve.side))

    def finish(self) -> None:
        self.theta.grad, self._gradient = self._gradient, None

    @torch.no_grad()
    def features(self, task: int) -> Tensor:
        return self.inputs[task] @ self.theta

    def state(self) -> dict[str, Tensor]:
        return {"theta": self.theta.detach()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        self.theta.copy_(tensors["theta"])

    @torch.no_grad()
    def export(self) -> FeatureModel:
        model = copy.deepcopy(self._model)
        weight = next(model.parameters())
        rows = weight[self._active]
        if self._reduce_right:
            rows[:, self._active] = self.theta
        else:
            rows = self.theta.detach().clone()
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
        self._model = copy.deepcopy(model)
        chosen = resolve_layers(self._model, layers)
        self._start = chosen[0]
        self._model.requires_grad_(False)
        names = {f"blocks.{i}." for i in chosen}
        self._named = {
            n: p for n, p in self._model.named_parameters() if any(n.startswith(k) for k in names)
        }
        if not self._named:
            raise UserError(
                "immunize.layers", layers, "these blocks have no parameters; choose others"
            )
        for parameter in self._named.values():
            parameter.requires_grad_(True)
        self.parameters: list[Tensor] = list(self._named.values())
        self._inputs = [prefix(self._model, task.train.x, self._start) for task in case.tasks]
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}

    def _run(self, z: Tensor) -> Tensor:
        return self._model.run(z if self._start else self._model.inputs(z), self._start)

    def view(self, task: int, rows: Tensor, gradient: bool = True) -> View:
        with torch.set_grad_enabled(gradient):
            features = self._run(self._inputs[task][rows])
        return View(task, rows, features.detach().to(torch.float64), features)

    def add(self, view: View, gradient: Tensor) -> None:
        key, gradient = id(view.source), gradient.to(view.source.dtype)
        earlier = self._pending.get(key)
        self._pending[key] = (view.source, gradient if earlier is None else earlier[1] + gradient)

    def add_regularizer(
        self, view: View, scale: Tensor, gradient: Tensor, solve: Preconditioner | None
    ) -> None:
        if solve is not None:
            gradient = right_solve(view.y * scale, gradient, solve.ridge)
        self.add(view, gradient * scale)

    def finish(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        if self._pending:
            sources, gradients = zip(*self._pending.values(), strict=True)
            torch.autograd.backward(sources, gradients)
        self._pending = {}

    @torch.no_grad()
    def features(self, task: int) -> Tensor:
        z = self._inputs[task]
        return torch.cat([self._run(z[i : i + CHUNK]) for i in range(0, len(z), CHUNK)])

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._named.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(tensors[name])

    def export(self) -> FeatureModel:
        for parameter in self.parameters:
            parameter.grad = None
        model = copy.deepcopy(self._model)
        model.requires_grad_(True)
        return model


def resolve_layers(model: FeatureModel, layers: Sequence[str] | int | None) -> list[int]:
    """Block numbers, ascending: all for None, the last n for a count, else by name.

    Raises:
        UserError: a name that the model has not, or a count outside 1 … number of blocks.
    """
    names = model.block_names
    if layers is None:
        return list(range(len(names)))
    if isinstance(layers, int):
        if not 1 <= layers <= len(names):
            raise UserError(
                "immunize.layers",
                layers,
                f"the model has {len(names)} blocks; count from 1 to that",
            )
        return list(range(len(names) - layers, len(names)))
    for name in layers:
        if name not in names:
            raise UserError("immunize.layers", name, nearest(name, names))
    if not layers:
        raise UserError("immunize.layers", "[]", "name at least one block")
    return sorted(names.index(name) for name in layers)


def build_engine(
    model: FeatureModel, case: Case, layers: Sequence[str] | int | None
) -> LinearEngine | DeepEngine:
    """The engine for the kind of ``model``."""
    if model.kind == "linear":
        resolve_layers(model, layers)
        return LinearEngine(model, case)
    return DeepEngine(model, case, layers)
