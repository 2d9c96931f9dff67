"""Which device a configuration means."""

from __future__ import annotations

import torch

from lab.errors import UserError


def pick(key: str, name: object) -> torch.device:
    """``auto`` (a CUDA GPU where there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:NUMBER`` or ``mps``.

    Raises:
        UserError: another name, or a device that torch does not see here; ``key`` is named.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fix = "must be auto, cpu, cuda, cuda:NUMBER or mps."
    try:
        device = torch.device(name)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise UserError(key, name, fix) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(key, name, fix)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(key, name, f"torch sees {torch.cuda.device_count()} CUDA devices here; use auto or cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(key, name, "torch sees no Apple GPU here; use auto or cpu.")
    return device
