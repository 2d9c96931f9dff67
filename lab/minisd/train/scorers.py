"""Training, calibration and error rates of the detector of objects and styles that ships with
MiniSD.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.core.types import Checkpoint, Log
from lab.minisd.train.degrade import degrade, noise_pictures
from lab.minisd.train.loop import Schedule, device_of, train
from lab.minisd.train.scorer_data import NAMES, Labelled
from lab.scorers.detector import Detector, Head, Rates
from lab.scorers.networks import DetectorNetwork, round_to_half


def to_unit(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float [0, 1], what scorers take."""
    return images.float().div_(255)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of ``values`` where ``where``, 0 where that is nowhere."""
    return (values * where).sum() / where.sum().clamp(min=1)


def detector_loss(
    logits: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], smoothing: float
) -> Tensor:
    """Cross-entropy of both heads with label smoothing.

    Pictures with label −1 pull the head towards equal probabilities, so that it stays undecided
    where there is nothing to see (outlier exposure, arXiv 1812.04606, Eq. 1 with the uniform
    target, weight 1 per picture).
    """
    total = torch.zeros((), device=logits[0].device)
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
        empty: scenes without an object; with pure noise they make up ``empty_share`` of a batch,
            half each.
    """
    device = device_of(model)
    blank = round(schedule.batch * empty_share)
    noisy = blank // 2

    def step(_: int, g: torch.Generator) -> Tensor:
        full = shown[torch.randint(len(shown), (schedule.batch - blank,), generator=g)]
        bare = empty[torch.randint(len(empty), (blank - noisy,), generator=g)]
        x = torch.cat(
            [
                to_unit(full.images),
                to_unit(bare.images),
                noise_pictures(noisy, full.images.shape[-1], g),
            ]
        )
        none = torch.full((noisy,), -1)
        y = [torch.cat([full.object, bare.object, none]), torch.cat([full.style, bare.style, none])]
        order = torch.randperm(len(x), generator=g)
        x = degrade(x[order], g).to(device).contiguous(memory_format=torch.channels_last)
        return detector_loss(model(x), (y[0][order].to(device), y[1][order].to(device)), smoothing)

    def validate() -> dict[str, float]:
        return accuracy(Detector(model, NAMES["object"], NAMES["style"]), held_out)

    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(
        model,
        step,
        schedule,
        seed=seed,
        label="detector",
        checkpoint=checkpoint,
        log=log,
        validate=validate,
    )
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    round_to_half(model)
    return model


def accuracy(detector: Detector, shown: Labelled) -> dict[str, float]:
    """Top-1 accuracy of ``object``, ``style`` and ``both`` together."""
    logits = detector.logits(shown.images)
    hits = {
        "object": logits["object"].argmax(1) == shown.object,
        "style": logits["style"].argmax(1) == shown.style,
    }
    hits["both"] = hits["object"] & hits["style"]
    return {name: hit.float().mean().item() for name, hit in hits.items()}


def nll(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Mean negative log likelihood of ``labels`` [n] under softmax(logits / temperature), in
    nats.
    """
    return F.cross_entropy(logits.double() / temperature, labels).item()


def worn(shown: Labelled, seed: int, times: int = 3) -> Labelled:
    """Pictures with the faults of ``times`` passes of `degrade`, about as worn as a generator's
    worst.
    """
    x = to_unit(shown.images)
    for i in range(times):
        x = degrade(x, generator(seed, "worn", i))
    return Labelled((x.clamp(0, 1) * 255).round().to(torch.uint8), shown.object, shown.style)


def calibrate(
    detector: Detector, held_out: Labelled, empty: Labelled | None = None
) -> dict[str, float]:
    """The temperature of each head that minimises `nll` on pictures it never saw (arXiv 1706.04599
    §4.2).

    Rendered pictures are too easy for it: where nothing goes wrong the best temperature is 0, and
    then any scene shows some object for certain. So ``held_out`` should be `worn`, and the object's
    head also has to be undecided about ``empty`` scenes, whose target is the uniform distribution
    as in `detector_loss`.
    """
    logits = detector.logits(held_out.images)
    blank = None if empty is None else detector.logits(empty.images)["object"].double()
    found: dict[str, float] = {}
    for head, x in logits.items():

        def loss(t: float, head: Head = head, x: Tensor = x) -> float:
            seen = nll(x, held_out.labels[head], math.exp(t))
            if head == "style" or blank is None:
                return seen
            nothing = float(-F.log_softmax(blank / math.exp(t), 1).mean())
            return (len(x) * seen + len(blank) * nothing) / (len(x) + len(blank))

        found[head] = math.exp(
            minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x
        )
    return found


def covers(shown: Labelled) -> None:
    """Raises `lab.core.errors.UserError` where no picture shows a name, or all do: its error rates
    could not be measured.
    """
    for head, names in NAMES.items():
        for i, name in enumerate(names):
            there = shown.labels[head] == i
            if there.all() or not there.any():
                told = (
                    f"the error rates of {name} need pictures with and without it; take "
                    "about a hundred per object."
                )
                raise UserError("train.scorers.measure", len(shown), told)


def calibration_error(detector: Detector, shown: Labelled) -> dict[str, float]:
    """Expected calibration error of each head's likeliest class, 15 bins (arXiv 1706.04599,
    Eq. 5).
    """
    from torchmetrics.functional.classification import (
        multiclass_calibration_error,
    )  # here: it takes seconds

    found = detector.probabilities(shown.images)
    return {
        head: multiclass_calibration_error(p, shown.labels[head], p.shape[1], n_bins=15).item()
        for head, p in found.items()
    }


def measure(detector: Detector, shown: Labelled, empty: Labelled) -> dict[str, Any]:
    """Accuracy, error rates of `Detector.detects` for every name, and how often an empty scene
    shows an object.

    ``false_negative`` of a name: share of its pictures in which it is not seen; ``false_positive``:
    share of all other pictures in which it is.

    ``calibration_error``: see `calibration_error`. Raises as `covers` does.
    """
    covers(shown)
    probabilities = detector.probabilities(shown.images)
    rates: Rates = {}
    for head, names in detector.names.items():
        seen = probabilities[head] >= detector.threshold
        for i, name in enumerate(names):
            there = shown.labels[head] == i
            rates[name] = {
                "false_positive": seen[~there, i].double().mean().item(),
                "false_negative": 1 - seen[there, i].double().mean().item(),
            }
    ghosts = (detector.probabilities(empty.images)["object"] >= detector.threshold).any(1)
    return {
        "rates": rates,
        "accuracy": accuracy(detector, shown),
        "calibration_error": calibration_error(detector, shown),
        "pictures": len(shown),
        "empty_with_object": ghosts.double().mean().item(),
    }
