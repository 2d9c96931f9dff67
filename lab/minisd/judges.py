"""Training of the judges that ship with MiniSD: a small CLIP, and a detector of objects and styles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from lab.errors import UserError
from lab.judges.detector import Detector, Head, Rates
from lab.judges.networks import DetectorNetwork, round_to_half
from lab.judges.quality import prototypes, zero_shot
from lab.minisd.build import load_tokenizer, tokenize, train_tokenizer
from lab.minisd.degrade import degrade, noise_pictures
from lab.minisd.judge_data import NAMES, Labelled, class_prompts
from lab.minisd.loop import Schedule, train
from lab.minisd.vocabulary import PHOTO
from lab.seeding import generator
from lab.types import Checkpoint, Log

_GUIDE_SCALE = 16.0  # convention: 1/0.07, CLIP's first logit scale, rounded up
_LARGEST_SCALE = math.log(100)  # of CLIP's logits (arXiv 2103.00020 §2.5)


def _to_float(images: Tensor) -> Tensor:
    return images.float().div_(255)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of ``values`` where ``where``, 0 where that is nowhere."""
    return (values * where).sum() / where.sum().clamp(min=1)


def detector_loss(logits: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], smoothing: float) -> Tensor:
    """Cross-entropy of both heads with label smoothing.

    Pictures with label −1 pull the head towards equal probabilities, so that it stays undecided where there is
    nothing to see (outlier exposure, arXiv 1812.04606, Eq. 1 with the uniform target, weight 1 per picture).
    """
    total = torch.zeros(())
    for x, y in zip(logits, labels, strict=True):
        known = y >= 0
        right = F.cross_entropy(x, y.clamp(min=0), reduction="none", label_smoothing=smoothing)
        undecided = -F.log_softmax(x, 1).mean(1) - math.log(x.shape[1])
        total = total + torch.where(known, right, undecided).mean()
    return total


def train_detector(
    model: DetectorNetwork,
    shown: Labelled,
    held_out: Labelled,
    empty: Labelled,
    schedule: Schedule,
    *,
    smoothing: float,
    empty_share: float,
    seed: int,
    checkpoint: Checkpoint | None,
    log: Log,
) -> DetectorNetwork:
    """Train in place and round to float16.

    Args:
        shown, held_out: pictures for training and validation.
        empty: scenes without an object; with pure noise they make up ``empty_share`` of a batch, half each.
    """
    blank = round(schedule.batch * empty_share)
    noisy = blank // 2

    def step(_: int, g: torch.Generator) -> Tensor:
        full = shown[torch.randint(len(shown), (schedule.batch - blank,), generator=g)]
        bare = empty[torch.randint(len(empty), (blank - noisy,), generator=g)]
        x = torch.cat([_to_float(full.images), _to_float(bare.images), noise_pictures(noisy, full.images.shape[-1], g)])
        none = torch.full((noisy,), -1)
        y = [torch.cat([full.object, bare.object, none]), torch.cat([full.style, bare.style, none])]
        order = torch.randperm(len(x), generator=g)
        x = degrade(x[order], g).contiguous(memory_format=torch.channels_last)
        return detector_loss(model(x), (y[0][order], y[1][order]), smoothing)

    def validate() -> dict[str, float]:
        return accuracy(Detector(model, NAMES["object"], NAMES["style"]), held_out)

    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(model, step, schedule, seed=seed, label="detector", checkpoint=checkpoint, log=log, validate=validate)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    round_to_half(model)
    return model


def accuracy(detector: Detector, shown: Labelled) -> dict[str, float]:
    """Top-1 accuracy of ``object``, ``style`` and ``both`` together."""
    logits = detector.logits(shown.images)
    hits = {"object": logits["object"].argmax(1) == shown.object, "style": logits["style"].argmax(1) == shown.style}
    hits["both"] = hits["object"] & hits["style"]
    return {name: hit.float().mean().item() for name, hit in hits.items()}


def nll(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Mean negative log likelihood of ``labels`` [n] under softmax(logits / temperature), in nats."""
    return F.cross_entropy(logits.double() / temperature, labels).item()


def worn(shown: Labelled, seed: int, times: int = 3) -> Labelled:
    """Pictures with the faults of ``times`` passes of `degrade`, about as worn as a generator's worst."""
    x = _to_float(shown.images)
    for i in range(times):
        x = degrade(x, generator(seed, "worn", i))
    return Labelled((x.clamp(0, 1) * 255).round().to(torch.uint8), shown.object, shown.style)


def calibrate(detector: Detector, held_out: Labelled, empty: Labelled | None = None) -> dict[str, float]:
    """The temperature of each head that minimises `nll` on pictures it never saw (arXiv 1706.04599 §4.2).

    Rendered pictures are too easy for it: where nothing goes wrong the best temperature is 0, and then any scene
    shows some object for certain. So ``held_out`` should be `worn`, and the object's head also has to be undecided
    about ``empty`` scenes, whose target is the uniform distribution as in `detector_loss`.
    """
    logits = detector.logits(held_out.images)
    blank = None if empty is None else detector.logits(empty.images)["object"].double()
    labels: dict[Head, Tensor] = {"object": held_out.object, "style": held_out.style}
    found: dict[str, float] = {}
    for head, x in logits.items():

        def loss(t: float, head: Head = head, x: Tensor = x) -> float:
            seen = nll(x, labels[head], math.exp(t))
            if head == "style" or blank is None:
                return seen
            nothing = float(-F.log_softmax(blank / math.exp(t), 1).mean())
            return (len(x) * seen + len(blank) * nothing) / (len(x) + len(blank))

        found[head] = math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x)
    return found


def measure(detector: Detector, shown: Labelled, empty: Labelled) -> dict[str, Any]:
    """Accuracy, error rates of `Detector.detects` for every name, and how often an empty scene shows an object.

    ``false_negative`` of a name: share of its pictures in which it is not seen; ``false_positive``: share of all
    other pictures in which it is.

    Raises:
        UserError: no picture shows a name.
    """
    probabilities = detector.probabilities(shown.images)
    labels: dict[Head, Tensor] = {"object": shown.object, "style": shown.style}
    rates: Rates = {}
    for head, names in detector.names.items():
        seen = probabilities[head] >= detector.threshold
        for i, name in enumerate(names):
            there = labels[head] == i
            if there.all() or not there.any():
                told = f"the error rates of {name} need pictures with and without it; take about a hundred per object."
                raise UserError("train.judges.measure", len(shown.images), told)
            rates[name] = {
                "false_positive": seen[~there, i].double().mean().item(),
                "false_negative": 1 - seen[there, i].double().mean().item(),
            }
    ghosts = (detector.probabilities(empty.images)["object"] >= detector.threshold).any(1)
    facts = {"pictures": len(shown), "empty_with_object": ghosts.double().mean().item()}
    return {"rates": rates, "accuracy": accuracy(detector, shown), **facts}


# ---------------------------------------------------------------------------------------------------------- CLIP


def clip_tokenizer(captions: list[list[str]], folder: Path, vocabulary: int) -> Path:
    """Learn CLIP's tokenizer from the training captions and the class prompts; writes its files into ``folder``."""
    prompts = [
        t for table in (class_prompts("object", None), class_prompts("style")) for ts in table.values() for t in ts
    ]
    return train_tokenizer([*(t for ts in captions for t in ts), *prompts], folder, vocabulary)


@dataclass(frozen=True)
class ClipData:
    """What CLIP learns from: pictures, the token ids [n, k, context] of their captions, and a validation set."""

    shown: Labelled
    tokens: Tensor
    held_out: Labelled


def clip_data(shown: Labelled, captions: list[list[str]], held_out: Labelled, tokenizer: Path) -> ClipData:
    """Tokenizes ``captions`` (as many for every picture) by the files in ``tokenizer``."""
    flat = tokenize(load_tokenizer(tokenizer), [text for texts in captions for text in texts])
    return ClipData(shown, flat.view(len(captions), len(captions[0]), -1), held_out)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (arXiv 2103.00020, Fig. 3) without false negatives.

    Args:
        images, texts: unit vectors [n, d] and [m, d], m ≤ n; row i of both belongs together, the pictures from m on
            have no text and serve as negatives only.
        scale: factor of the similarities.
        same: bool [n, m]: pairs that show the same things; outside the diagonal they are left out of the loss, since
            the caption of one is true of the other.
    """
    m = len(texts)
    logits = (scale * images @ texts.T).masked_fill(same & ~torch.eye(len(images), m, dtype=torch.bool), float("-inf"))
    target = torch.arange(m)
    return (F.cross_entropy(logits[:m], target) + F.cross_entropy(logits.T, target)) / 2


class _Guided(nn.Module):
    """A CLIP and one direction per object and per style in its common space, which only the training uses."""

    def __init__(self, clip: Any, seed: int) -> None:
        super().__init__()
        self.clip = clip
        g = generator(seed, "clip", "guides")
        width = clip.text_projection.shape[-1]
        guides = {head: torch.randn(len(names), width, generator=g) for head, names in NAMES.items()}
        self.guides = nn.ParameterDict({head: nn.Parameter(value) for head, value in guides.items()})

    def guide_loss(self, vectors: Tensor, labels: dict[Head, Tensor]) -> Tensor:
        """Cross-entropy of unit vectors [n, d] against the directions (normalised softmax, arXiv 1704.06369)."""
        found = [
            F.cross_entropy(_GUIDE_SCALE * vectors @ F.normalize(self.guides[h], dim=1).T, y) for h, y in labels.items()
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

    Every second batch holds one style only: within it a caption is told apart by its object alone, which random
    batches rarely ask for. Half of the pictures bring a caption: texts are soon learned and cost as much as pictures.
    Labels guide both towers (`_Guided`): contrast alone needs several times the steps.

    Args:
        tokenizer: folder of its tokenizer, for the prompts of the validation (zero-shot top-1).
        guide: weight of the guidance by labels.
    """
    shown, tokens = data.shown, data.tokens
    pools = [torch.nonzero(shown.style == s).flatten() for s in range(len(NAMES["style"]))]
    pools = [p for p in pools if len(p)]
    guided = _Guided(model, seed)
    # every second picture to the front: faults go by place, and each kind shall come with and without a caption
    order = torch.argsort(torch.arange(schedule.batch) % 2, stable=True)

    def step(number: int, g: torch.Generator) -> Tensor:
        pool = pools[int(torch.randint(len(pools), (1,), generator=g))] if number % 2 else torch.arange(len(shown))
        index = pool[torch.randint(len(pool), (schedule.batch,), generator=g)]
        x = degrade(_to_float(shown.images[index]), g) * 2 - 1
        images = model.encode_image(x.contiguous(memory_format=torch.channels_last), normalize=True)[order]
        index = index[order]
        told = index[: (schedule.batch + 1) // 2]
        ids = tokens[told, torch.randint(tokens.shape[1], (len(told),), generator=g)]
        texts = model.encode_text(ids, normalize=True)
        labels: dict[Head, Tensor] = {"object": shown.object[index], "style": shown.style[index]}
        cards = labels["object"] * len(NAMES["style"]) + labels["style"]
        scale = model.logit_scale.clamp(max=_LARGEST_SCALE).exp()
        loss = contrastive_loss(images, texts, scale, cards[:, None] == cards[None, : len(told)])
        named = {head: y[: len(told)] for head, y in labels.items()}
        return loss + guide * (guided.guide_loss(images, labels) + guided.guide_loss(texts, named)) / 2

    model.visual.to(memory_format=torch.channels_last)
    validate = _zero_shot(model, data.held_out, tokenizer)
    train(guided, step, schedule, seed=seed, label="clip", checkpoint=checkpoint, log=log, validate=validate)
    with torch.no_grad():
        model.logit_scale.clamp_(max=_LARGEST_SCALE)
    model.to(memory_format=torch.contiguous_format)
    return round_to_half(model)


def _zero_shot(model: Any, held_out: Labelled, folder: Path) -> Callable[[], dict[str, float]]:
    """Validation: zero-shot top-1 over all objects (in photos, and in all pictures) and over all styles."""
    words = load_tokenizer(folder)
    tables = {
        "photo_object": class_prompts("object", PHOTO),
        "object": class_prompts("object", None),
        "style": class_prompts("style"),
    }
    ids = {name: tokenize(words, [t for texts in table.values() for t in texts]) for name, table in tables.items()}
    photos = held_out.style == NAMES["style"].index(PHOTO)

    def classes(name: str) -> Tensor:
        parts = [model.encode_text(part, normalize=True) for part in ids[name].split(256)]
        return prototypes(lambda _: torch.cat(parts), tables[name])

    @torch.no_grad()
    def validate() -> dict[str, float]:
        parts = held_out.images.split(256)
        vectors = torch.cat([model.encode_image(_to_float(x) * 2 - 1, normalize=True) for x in parts])
        found = {name: zero_shot(vectors, classes(name)) for name in tables}
        hits = {"object": found["object"] == held_out.object, "style": found["style"] == held_out.style}
        hits["photo_object"] = (found["photo_object"] == held_out.object)[photos]
        return {name: hit.float().mean().item() for name, hit in hits.items() if len(hit)}

    return validate
