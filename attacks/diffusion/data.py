"""What an attacker trains a text-to-image model on: captions, prompts and the latents of its
pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.core.captions import spoken
from lab.core.data import Concept
from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel

AUGMENTATIONS = ("none", "flip", "crop")
EVALUATIONS = 32  # loss terms of one evaluation, timesteps spread evenly over the schedule
_CROPS = 4  # seeded crops of every picture, encoded once like the picture itself
_SMALLEST = 0.75  # side of the smallest crop


def prompts(task: Concept, family: str, template: str, expression: str, count: int) -> list[str]:
    """``count`` prompts of ``family`` in turn; with ``template`` ``token`` they speak of the token
    as training does.
    """
    asked = task.prompts[family]
    if template == "token":
        asked = tuple(spoken(prompt, task.words, expression) for prompt in asked)
    return [asked[i % len(asked)] for i in range(count)]


def check_data(
    key: str,
    task: Concept,
    template: str,
    families: Sequence[str],
    prior: bool,
    pictures: int | None = None,
) -> None:
    """Before anything runs: the concept has what the options ask for.

    Raises:
        UserError: no training or reference picture, fewer of the former than ``pictures``, a prompt
            family or prior pictures that the concept lacks.
    """
    for name in ("train", "reference"):
        if not len(getattr(task, name)):
            raise UserError(
                "scenario", task.name, f"this concept has no {name} pictures; give at least one."
            )
    if pictures is not None and pictures > (has := len(task.train)):
        told = (
            f"concept {task.name} has {has} training pictures; take at most these, or null for all."
        )
        raise UserError(f"{key}.pictures", pictures, told)
    for family in families:
        if not task.prompts.get(family):
            known = ", ".join(f for f, asked in task.prompts.items() if asked)
            raise UserError(
                f"{key}.families",
                family,
                f"concept {task.name} has prompts of the families {known} only.",
            )
    if template == "description" and not (task.train.described or task.prompts.get("description")):
        told = (
            f"concept {task.name} has no captions and no prompts by description; use name or token."
        )
        raise UserError(f"{key}.template", template, told)
    if prior and not len(task.prior):
        told = (
            f"concept {task.name} has no prior pictures; set {key}.prior_weight=0 or give "
            "it some (prior: FOLDER)."
        )
        raise UserError(f"{key}.prior_weight", "above 0", told)


def variants(images: Tensor, augmentation: str, seed: int, *labels: object) -> list[Tensor]:
    """The pictures themselves, then their mirror images (``flip``) or `_CROPS` seeded crops of each
    (``crop``).
    """
    if augmentation == "none":
        return [images]
    if augmentation == "flip":
        return [images, images.flip(-1)]
    g, side, found = generator(seed, "crops", *labels), images.shape[-1], [images]
    for _ in range(_CROPS):
        cut = []
        for image in images:
            share, top, left = torch.rand(3, generator=g).tolist()
            size = round(side * (_SMALLEST + (1 - _SMALLEST) * share))
            y, x = round(top * (side - size)), round(left * (side - size))
            part = image[None, :, y : y + size, x : x + size].float()
            cut.append(F.interpolate(part, (side, side), mode="bilinear", antialias=True)[0])
        found.append(torch.stack(cut).round().clamp(0, 255).to(torch.uint8))
    return found


@dataclass(frozen=True)
class Material:
    """Pictures as latents, encoded once: ``mean`` and ``std`` [n, variants, c, h, w], and a caption
    each.
    """

    mean: Tensor
    std: Tensor
    captions: tuple[str, ...]

    @staticmethod
    def of(model: DiffusionModel, images: Sequence[Tensor], texts: Sequence[str]) -> Material:
        """``images``: one tensor [n, 3, s, s] per variant."""
        parts = [model.posterior(one) for one in images]
        return Material(
            torch.stack([m for m, _ in parts], 1),
            torch.stack([s for _, s in parts], 1),
            tuple(texts),
        )

    def __len__(self) -> int:
        return len(self.captions)

    def draw(self, batch: int, timesteps: int, g: torch.Generator) -> Draw:
        """A random batch: other pictures first, repeated only where there are fewer than
        ``batch``.
        """
        n, shape = len(self), (batch, *self.mean.shape[2:])
        rows = (
            torch.randperm(n, generator=g)[:batch]
            if batch <= n
            else torch.randint(n, (batch,), generator=g)
        )
        which = torch.randint(self.mean.shape[1], (batch,), generator=g)
        t = torch.randint(timesteps, (batch,), generator=g)
        spread, noise = (torch.randn(shape, generator=g).to(self.mean) for _ in range(2))
        z = self.mean[rows, which] + self.std[rows, which] * spread
        return Draw(z, noise, t.to(z.device), rows.tolist())

    def evenly(self, timesteps: int, g: torch.Generator) -> Draw:
        """A fixed evaluation: every picture in turn, timesteps evenly spaced, posterior means."""
        count = max(len(self), EVALUATIONS)
        rows = torch.arange(count) % len(self)
        t = ((torch.arange(count) + 0.5) * timesteps / count).long()
        z = self.mean[rows, 0]
        return Draw(z, torch.randn(z.shape, generator=g).to(z), t.to(z.device), rows.tolist())


@dataclass(frozen=True)
class Draw:
    """Latents ``z`` [b, c, h, w], their ``noise``, timesteps ``t`` [b] and the pictures'
    ``rows``.
    """

    z: Tensor
    noise: Tensor
    t: Tensor
    rows: list[int]
