"""Picture grids: what the attacked models paint, model by model, below the pictures they are
compared with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.generation.generations import FAMILY, Cell, EvaluatedRun, marks
from lab.core.data import ConceptCase
from lab.core.slugs import slug
from lab.core.types import ImageGrid, RunView


def grids(run: RunView, board: EvaluatedRun, columns: int, similarity: str) -> dict[str, ImageGrid]:
    """``generations_CONCEPT``: the first ``columns`` pictures of every concept, in the first seed
    and case that has it.

    Rows: reference pictures, then per model the pictures before the attack and at every mark, under
    the attack that is the model's best at 1× by ``similarity``. A column holds pictures made from
    the same latents and prompt.
    """
    out: dict[str, ImageGrid] = {}
    for cell in board.roles:
        name = f"generations_{slug(cell.concept)}"
        if name not in out and cell in board.cells(board.roles[cell], cell.concept):
            case = next(c for c in run.cases(cell.seed) if c.name == cell.case)
            out[name] = _grid(run, board, cell, case, columns, similarity)
    return out


def _grid(
    run: RunView, board: EvaluatedRun, cell: Cell, case: ConceptCase, columns: int, similarity: str
) -> ImageGrid:
    concept = case.task(cell.concept)
    first = marks(board.budget)[0][0]
    steps = [0, *(step for _, step, _ in marks(board.budget))]
    rows, labels, best = [], [], []
    for model_name in board.model_names:
        best.append(board.best_attack(cell, model_name, similarity, first))
        trajectory = run.trajectory(model_name, best[-1], case, concept, cell.seed)
        samples = trajectory.samples[FAMILY][:, :columns]
        for step in steps:
            index = max(i for i, s in enumerate(trajectory.steps) if s <= step)
            rows.append(samples[index])
            stopped = "" if trajectory.steps[index] == step else " (diverged)"
            labels.append(f"{model_name}, step {trajectory.steps[index]}{stopped}")
    width, side = rows[0].shape[0], rows[0].shape[-1]
    rows.insert(
        0, _resized(concept.reference.images[torch.arange(width) % len(concept.reference)], side)
    )
    told = (
        best[0]
        if len(set(best)) == 1
        else ", ".join(f"{b} ({a})" for a, b in zip(board.model_names, best, strict=True))
    )
    caption = (
        f"{concept.name}: reference pictures, and what models attacked with {told} "
        f"paint (seed {cell.seed})"
    )
    return ImageGrid(
        torch.stack(rows), ("reference", *labels), tuple(str(i + 1) for i in range(width)), caption
    )


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    small = F.interpolate(
        images.float(), (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    return small.round().clamp(0, 255).to(torch.uint8)
