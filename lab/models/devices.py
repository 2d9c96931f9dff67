"""Which device a configuration means."""

from __future__ import annotations

import logging
from functools import cache

import torch

from lab.core.errors import UserError

_log = logging.getLogger(__name__)


def pick(key: str, name: object) -> torch.device:
    """``auto`` (a CUDA GPU where there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:NUMBER`` or
    ``mps``.

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
        raise UserError(
            key, name, f"torch sees {torch.cuda.device_count()} CUDA devices here; use auto or cpu."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(key, name, "torch sees no Apple GPU here; use auto or cpu.")
    return device


def computes_bfloat16(kind: str) -> bool:
    """Whether the device of this type has bfloat16 instructions. Processors before AVX-512 and GPUs
    before Ampere emulate them.
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return torch.backends.mkldnn.is_available() and bool(
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    return True


@cache
def tell_of_emulation(kind: str, key: str, instead: str) -> None:
    """Says once in a process that bfloat16, asked for by the config key, costs time here in place
    of saving it: MiniSD paints 25 times as long on a processor with AVX2 alone.
    """
    if not computes_bfloat16(kind):
        _log.warning(
            "this device emulates bfloat16, far slower than float32; %s=%s saves the time",
            key,
            instead,
        )
