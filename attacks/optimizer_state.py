"""Parameters and optimizer state as named tensors, for checkpoints that continue bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def state_tensors(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and, per parameter that has been updated, the optimizer's tensors."""
    state = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
    for i, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"optimizer.{i}.{name}"] = value
    return state


@torch.no_grad()
def restore_state(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `state_tensors`, in place."""
    for key, value in tensors.items():
        group, index, *name = key.split(".")
        parameter = parameters[int(index)]
        if group == "parameter":
            parameter.copy_(value)
        else:
            device = parameter.device if value.dim() else value.device  # step counters stay where they are
            optimizer.state[parameter][name[0]] = value.to(device, copy=True)
