"""Choose the device and the threads that a configuration names."""

from __future__ import annotations

import logging
from functools import cache

import torch

from lab.core.errors import UserError

_log = logging.getLogger(__name__)


def limit_threads(threads: object) -> None:
    """Let torch use so many threads; None leaves its own choice.

    Raises:
        UserError: no whole number ≥ 1.
    """
    if threads is not None:
        if not isinstance(threads, int) or threads < 1:
            raise UserError("threads", threads, "must be a whole number ≥ 1, or null.")
        torch.set_num_threads(threads)


def pick(key: str, name: object) -> torch.device:
    """Return the device that ``name`` means.

    Args:
        key: config key, for the error.
        name: ``auto`` (a CUDA GPU where there is one, else the CPU), ``cpu``, ``cuda``,
            ``cuda:NUMBER`` or ``mps``.

    Raises:
        UserError: another name, or a device that torch does not see.
    """
    gpus = torch.cuda.device_count()
    known = ["cpu", *(["cuda", *(f"cuda:{i}" for i in range(gpus))] if gpus else [])]
    known += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name not in known:
        fix = f"must be auto, cpu, cuda, cuda:NUMBER or mps; torch sees {gpus} CUDA devices here."
        raise UserError(key, name, fix)
    return torch.device(str(name))


def computes_bfloat16(kind: str) -> bool:
    """Return True if devices of this type have bfloat16 instructions. Processors before AVX-512
    and GPUs before Ampere emulate them.
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return torch.backends.mkldnn.is_available() and bool(
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    return True


@cache
def warn_of_emulation(kind: str, key: str, instead: str) -> None:
    """Warn once in a process that bfloat16 costs time on this device: MiniSD takes 25 times as
    long on a processor with AVX2 alone. ``key=instead`` is the config that avoids it.
    """
    if not computes_bfloat16(kind):
        _log.warning(
            "this device emulates bfloat16, far slower than float32; %s=%s saves the time",
            key,
            instead,
        )
