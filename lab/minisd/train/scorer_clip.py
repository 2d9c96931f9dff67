"""Training of the small CLIP that ships with MiniSD as a scorer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.core.seeding import generator
from lab.core.types import Checkpoint, Log
from lab.minisd.train.build import load_tokenizer, tokenize, train_tokenizer
from lab.minisd.train.degrade import degrade
from lab.minisd.train.loop import Schedule, device_of, train
from lab.minisd.train.scorer_data import NAMES, Labelled, class_prompts
from lab.minisd.train.scorers import to_unit
from lab.minisd.world.vocabulary import PHOTO
from lab.scorers.detector import Head
from lab.scorers.networks import round_to_half
from lab.scorers.quality import prototypes, zero_shot

_GUIDE_SCALE = 16.0  # convention: 1/0.07, CLIP's first logit scale, rounded up
_LARGEST_SCALE = math.log(100)  # of CLIP's logits (arXiv 2103.00020 §2.5)


def clip_tokenizer(captions: list[list[str]], folder: Path, vocabulary: int) -> Path:
    """Learn CLIP's tokenizer from the training captions and the class prompts; writes its files
    into ``folder``.
    """
    prompts = [
        t
        for table in (class_prompts("object", None), class_prompts("style"))
        for ts in table.values()
        for t in ts
    ]
    return train_tokenizer([*(t for ts in captions for t in ts), *prompts], folder, vocabulary)


@dataclass(frozen=True)
class ClipData:
    """What CLIP learns from: pictures, the token ids [n, k, context] of their captions, and a
    validation set.
    """

    shown: Labelled
    tokens: Tensor
    held_out: Labelled


def clip_data(
    shown: Labelled, captions: list[list[str]], held_out: Labelled, tokenizer: Path
) -> ClipData:
    """Tokenizes ``captions`` (as many for every picture) by the files in ``tokenizer``."""
    flat = tokenize(load_tokenizer(tokenizer), [text for texts in captions for text in texts])
    return ClipData(shown, flat.view(len(captions), len(captions[0]), -1), held_out)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (arXiv 2103.00020, Fig. 3) without false negatives.

    Args:
        images, texts: unit vectors [n, d] and [m, d], m ≤ n; row i of both belongs together, the
            pictures from m on have no text and serve as negatives only.
        scale: factor of the similarities.
        same: bool [n, m]: pairs that show the same things; outside the diagonal they are left out
            of the loss, since the caption of one is true of the other.
    """
    m, device = len(texts), texts.device
    own = torch.eye(len(images), m, dtype=torch.bool, device=device)
    logits = (scale * images @ texts.T).masked_fill(same & ~own, float("-inf"))
    target = torch.arange(m, device=device)
    return (F.cross_entropy(logits[:m], target) + F.cross_entropy(logits.T, target)) / 2


class _Guided(nn.Module):
    """A CLIP and one direction per object and per style in its common space, which only the
    training uses.
    """

    def __init__(self, clip: Any, seed: int) -> None:
        super().__init__()
        self.clip = clip
        g = generator(seed, "clip", "guides")
        width = clip.text_projection.shape[-1]
        guides = {
            head: torch.randn(len(names), width, generator=g) for head, names in NAMES.items()
        }
        self.guides = nn.ParameterDict(
            {head: nn.Parameter(value) for head, value in guides.items()}
        )

    def guide_loss(self, vectors: Tensor, labels: dict[Head, Tensor]) -> Tensor:
        """Cross-entropy of unit vectors [n, d] against the directions (normalised softmax, arXiv
        1704.06369).
        """
        found = [
            F.cross_entropy(_GUIDE_SCALE * vectors @ F.normalize(self.guides[h], dim=1).T, y)
            for h, y in labels.items()
        ]
        return torch.stack(found).mean()


def train_clip(
    model: Any,
    data: ClipData,
    tokenizer: Path,
    schedule: Schedule,
    *,
    guide: float = 1.0,
    seed: int,
    checkpoint: Checkpoint | None,
    log: Log,
) -> nn.Module:
    """Train an ``open_clip.CLIP`` in place and round it to float16.

    Every second batch holds one style only: within it a caption is told apart by its object alone,
    which random batches rarely ask for. Half of the pictures bring a caption: texts are soon
    learned and cost as much as pictures. Labels guide both towers (`_Guided`): contrast alone needs
    several times the steps.

    Args:
        tokenizer: folder of its tokenizer, for the prompts of the validation (zero-shot top-1).
        guide: weight of the guidance by labels.
    """
    shown, tokens, device = data.shown, data.tokens, device_of(model)
    pools = [torch.nonzero(shown.style == s).flatten() for s in range(len(NAMES["style"]))]
    pools = [p for p in pools if len(p)]
    guided = _Guided(model, seed).to(device)
    # every second picture to the front: faults go by place, and each kind shall come with and
    # without a caption
    order = torch.argsort(torch.arange(schedule.batch) % 2, stable=True)

    def step(number: int, g: torch.Generator) -> Tensor:
        pool = (
            pools[int(torch.randint(len(pools), (1,), generator=g))]
            if number % 2
            else torch.arange(len(shown))
        )
        index = pool[torch.randint(len(pool), (schedule.batch,), generator=g)]
        x = (degrade(to_unit(shown.images[index]), g) * 2 - 1).to(device)
        images = model.encode_image(
            x.contiguous(memory_format=torch.channels_last), normalize=True
        )[order]
        index = index[order]
        told = index[: (schedule.batch + 1) // 2]
        ids = tokens[told, torch.randint(tokens.shape[1], (len(told),), generator=g)]
        texts = model.encode_text(ids.to(device), normalize=True)
        labels: dict[Head, Tensor] = {h: y[index].to(device) for h, y in shown.labels.items()}
        cards = labels["object"] * len(NAMES["style"]) + labels["style"]
        scale = model.logit_scale.clamp(max=_LARGEST_SCALE).exp()
        loss = contrastive_loss(images, texts, scale, cards[:, None] == cards[None, : len(told)])
        named = {head: y[: len(told)] for head, y in labels.items()}
        return (
            loss + guide * (guided.guide_loss(images, labels) + guided.guide_loss(texts, named)) / 2
        )

    model.visual.to(memory_format=torch.channels_last)
    validate = _zero_shot(model, data.held_out, tokenizer)
    train(
        guided,
        step,
        schedule,
        seed=seed,
        label="clip",
        checkpoint=checkpoint,
        log=log,
        validate=validate,
    )
    with torch.no_grad():
        model.logit_scale.clamp_(max=_LARGEST_SCALE)
    model.to(memory_format=torch.contiguous_format)
    return round_to_half(model)


def _zero_shot(model: Any, held_out: Labelled, folder: Path) -> Callable[[], dict[str, float]]:
    """Validation: zero-shot top-1 over all objects (in photos, and in all pictures) and over all
    styles.
    """
    words = load_tokenizer(folder)
    tables = {
        "photo_object": class_prompts("object", PHOTO),
        "object": class_prompts("object", None),
        "style": class_prompts("style"),
    }
    device = device_of(model)
    ids = {
        name: tokenize(words, [t for texts in table.values() for t in texts]).to(device)
        for name, table in tables.items()
    }
    photos = held_out.style == NAMES["style"].index(PHOTO)

    def classes(name: str) -> Tensor:
        parts = [model.encode_text(part, normalize=True) for part in ids[name].split(256)]
        return prototypes(lambda _: torch.cat(parts).cpu(), tables[name])

    @torch.no_grad()
    def validate() -> dict[str, float]:
        parts = held_out.images.split(256)
        found_in = [
            model.encode_image(to_unit(x.to(device)) * 2 - 1, normalize=True) for x in parts
        ]
        vectors = torch.cat(found_in).cpu()
        found = {name: zero_shot(vectors, classes(name)) for name in tables}
        hits = {
            "object": found["object"] == held_out.object,
            "style": found["style"] == held_out.style,
        }
        hits["photo_object"] = (found["photo_object"] == held_out.object)[photos]
        return {name: hit.float().mean().item() for name, hit in hits.items() if len(hit)}

    return validate
