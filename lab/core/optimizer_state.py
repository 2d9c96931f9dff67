"""Parameters and optimizer state as named tensors, for checkpoints that continue bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def slots(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, by number of the parameter and name; none for a parameter that was
    never updated.
    """
    found = enumerate(optimizer.state.get(parameter, {}) for parameter in _parameters(optimizer))
    return {
        f"{i}.{name}": value
        for i, state in found
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, named without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def restore_slots(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `slots`, for an optimizer of the same parameters."""
    parameters = _parameters(optimizer)
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        # torch keeps step counters on the CPU, but those of its fused and capturable kernels beside
        # the parameter
        beside = value.dim() > 0 or any(
            (group.get("fused") or group.get("capturable"))
            and any(p is parameter for p in group["params"])
            for group in optimizer.param_groups
        )
        copy = value.to(parameter.device if beside else value.device, copy=True)
        if (
            value.shape == parameter.shape
        ):  # fused kernels walk memory: channels last, as parameters
            copy = torch.empty_like(parameter, dtype=value.dtype).copy_(copy)
        optimizer.state[parameter][name] = copy


def state_tensors(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """``parameters``, which are the optimizer's, and its `slots`."""
    state = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
    return state | {f"optimizer.{key}": value for key, value in slots(optimizer).items()}


@torch.no_grad()
def restore_state(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `state_tensors`, in place."""
    for i, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"parameter.{i}"])
    restore_slots(optimizer, part_of(tensors, "optimizer."))
