"""Condition-number immunization of the keys and values of cross-attention (ours, after arXiv
2505.23760): does an ill-conditioned Hessian slow adapters of a text-to-image model?

Every key and value matrix W is a linear extractor θ = Wᵀ of rows of the text encoder. X_H are the
rows of prompts that name a target, X_P those of unrelated captions; `immunize.kappa.method.Kappa`
makes H_H = θᵀX_HᵀX_Hθ ill-conditioned and keeps H_P well-conditioned, without a supervised term.
Queries that an adapter trains on keys Xθ, and output matrices that it trains on values Xθ, meet
these Hessians; adapters of W itself do not. The change of W is then projected off the directions
that hold most of the energy of X_P, so that unrelated prompts keep their keys and values.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from immunize.kappa.method import Kappa
from immunize.merge.build import concept_rows, regularizer_rows, scope_names
from immunize.mima.outer_loop import leading_directions, naming_prompts
from lab.core.condition import condition_number
from lab.core.config import Count, NonNegative, Positive, PositiveShare, Text, config
from lab.core.data import Case, ConceptCase, Kind, Role, Split, Task
from lab.core.types import Checkpoint, Immunizer, Log
from lab.models.diffusion import DiffusionModel
from lab.models.linear import LinearExtractor


@config
class KappaAttention(Immunizer[DiffusionModel, ConceptCase]):
    """`Kappa` on each key and value matrix of cross-attention.

    Logs ``kappa_harmful_ratio`` and ``kappa_benign_ratio``: κ after ÷ before, geometric means over
    the matrices, after the projection.

    Args:
        lambda_p, lambda_h, lr, steps: see `Kappa`; H is divided by its largest eigenvalue
            (``scale=current``) and taken of all rows.
        null_space: share of the energy of X_P whose directions stay as they are.
        prompts: prompts per target that give X_H.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: Text = "kappa_attention"
    lambda_p: NonNegative
    lambda_h: NonNegative
    lr: Positive
    steps: Count
    null_space: PositiveShare
    prompts: Count

    def __call__(
        self,
        model: DiffusionModel,
        case: ConceptCase,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        log: Log,
    ) -> DiffusionModel:
        """See `lab.core.types.Immunizer`.

        Raises:
            Diverged: features or weights left the finite numbers.
        """
        kappa = Kappa(
            lambda_p=self.lambda_p,
            lambda_h=self.lambda_h,
            lr=self.lr,
            steps=self.steps,
            scale="current",
            spectrum="full",
            supervised=0.0,
            log_points=2,
        )
        benign = regularizer_rows(model, case.regularizers).double().cpu()
        named = [(naming_prompts(model, c, self.prompts), c.words) for c in case.targets]
        harmful = [concept_rows(model, *pair)[0].double().cpu() for pair in named]
        tasks = [_task("benign", "unrelated", benign)]
        tasks += [_task("harmful", c.name, x) for c, x in zip(case.targets, harmful, strict=True)]
        pair = Case(case.name, tasks[0], tuple(tasks[1:]))
        kept = leading_directions(benign, self.null_space)
        immunized = model.copy()
        weights = dict(immunized.unet.named_parameters())
        growth: dict[str, list[float]] = {"benign": [], "harmful": []}
        for name in scope_names(model.unet, "kv"):
            theta = weights[name].detach().double().cpu().T
            trained = kappa(
                LinearExtractor(theta.clone()), pair, seed=seed, checkpoint=None, log=_ignore
            )
            change = next(trained.parameters()).detach() - theta
            moved = theta + change - kept @ (kept.T @ change)
            for task in tasks:
                x = task.train.x
                ratio = condition_number(x @ moved) / condition_number(x @ theta)
                growth[task.role].append(math.log(ratio))
            with torch.no_grad():
                weights[name].copy_(moved.T)
        means = {f"kappa_{k}_ratio": math.exp(sum(v) / len(v)) for k, v in growth.items()}
        log(self.steps, **means)
        return immunized


def _task(role: Role, name: str, x: Tensor) -> Task:
    """Return a task of at most d rows with the Gram matrix of ``x`` [n, d]; its targets are not
    used.
    """
    x = torch.linalg.qr(x).R if len(x) > x.shape[1] else x  # the same Gram matrix
    split = Split(x, torch.zeros(len(x), dtype=torch.float64))
    return Task(name, role, "regression", split, split)


def _ignore(step: int, **values: float) -> None:
    """Drop what the immunization of one matrix logs."""
