"""The optimizers that an attacker of a text-to-image model can choose."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Literal

import torch
from torch import nn

Name = Literal["adamw", "sgd", "muon", "soap"]


def package_version(name: Name) -> str:
    """Return the version of the package that an optimizer comes from; empty where it is torch.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return "" if name in ("adamw", "sgd") else metadata.version("pytorch_optimizer")


def build(
    name: Name, parameters: Sequence[nn.Parameter], *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return an optimizer of ``parameters`` with one learning rate.

    ``adamw`` and ``sgd`` (heavy ball, 0.9) are torch's. ``muon`` and ``soap`` (arXiv 2409.11321)
    are pytorch-optimizer's, as torch has no SOAP and its Muon takes matrices only. Muon moves
    matrices and kernels, with its rate adjusted to the size of AdamW's updates, and AdamW the
    vectors.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=0.9)
    from pytorch_optimizer import SOAP, Muon

    if name == "soap":
        return SOAP(parameters, lr=lr, weight_decay=weight_decay)
    options = {"lr": lr, "weight_decay": weight_decay}
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "use_muon": True, **options},
        {"params": [p for p in parameters if p.ndim < 2], "use_muon": False, **options},
    ]
    return Muon([g for g in groups if g["params"]], use_adjusted_lr=True)
