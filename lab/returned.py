"""What an attacker returns, checked before anything is computed from it: an own attacker may return anything."""

from __future__ import annotations

import torch

from lab.errors import UserError
from lab.types import Trajectory


def check_trajectory(found: Trajectory, attack: str) -> None:
    """Whether ``found`` is what `lab.types.Trajectory` says; its first point would be taken for step 0 otherwise.

    Raises:
        UserError: steps that do not increase from 0, quantities or pictures that are missing or too few.
    """
    key, points = f"attacks.{attack}", len(found.steps)
    if found.steps[:1] != [0] or sorted(set(found.steps)) != found.steps:
        told = "these steps of its trajectory must increase from 0, the model before any update (lab.types.Trajectory)."
        raise UserError(key, found.steps, told)
    for name in ("train_loss", "test_loss"):
        if name not in found.values:
            raise UserError(key, sorted(found.values), f"values of its trajectory lack {name} (lab.types.Trajectory).")
    for name, values in found.values.items():
        if len(values) != points:
            raise UserError(key, name, f"has {len(values)} values at {points} steps of its trajectory.")
    for family, pictures in found.samples.items():
        if pictures.dtype != torch.uint8 or pictures.ndim != 5 or len(pictures) != points:
            told = f"has samples of {pictures.dtype} {list(pictures.shape)} by {family}, not of torch.uint8"
            raise UserError(key, attack, f"{told} [{points} steps, pictures, 3, side, side].")
