"""How a gradient with respect to features moves a model.

`LinearEngine` and `DeepEngine` have the same methods. In every step `view` evaluates features of
some rows of each task, `add` takes gradients with respect to them, and `finish` leaves the sum in
``.grad`` of ``parameters``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from immunize.kappa.spectral import preconditioned_step, right_solve
from lab.core.data import Case
from lab.core.errors import UserError, nearest
from lab.core.types import FeatureModel
from lab.models.activations import prefix

CHUNK = 64  # rows per forward pass of a deep model where no gradient is needed


class LinearEngine:
    """θ with thin updates; columns that are zero in every task are left out, which changes nothing.

    A row of θ that belongs to a zero column never gets a gradient. Where θ_0 also sends no active
    input to a feature of that set (identity does not), such features stay zero and are left out
    too.
    """

    def __init__(self, model: FeatureModel, case: Case, layers: Sequence[str] | int | None) -> None:
        resolve_layers(model, layers)
        self._model = copy.deepcopy(model)
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
        model = copy.deepcopy(self._model)
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
        self._model = copy.deepcopy(model).requires_grad_(False)
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
        return copy.deepcopy(self._model).requires_grad_(True)


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
