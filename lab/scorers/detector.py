"""The detector of objects and styles: calibrated probabilities, and the true share behind a share
of detections.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lab.core.errors import UserError, nearest
from lab.core.options import count, local, names, number
from lab.scorers.images import check, resized
from lab.scorers.networks import (
    DETECTOR_CONFIG,
    DETECTOR_WEIGHTS,
    DetectorNetwork,
    fill,
    read_folder,
)

KEY = "scorers.detector.folder"
Rates = dict[str, dict[str, float]]
Head = Literal["object", "style"]
Floats = NDArray[np.float64]


def corrected_share(share: Floats, false_positive: float, false_negative: float) -> Floats:
    """The true share behind a detector's share of positives, in [0, 1]; nan for a detector without
    power.

    (share − FP) / (1 − FP − FN), clipped: the estimator of Rogan and Gladen, "Estimating prevalence
    from the results of a screening test", American Journal of Epidemiology 107(1), 1978, 71–76. The
    rates count as known.

    Args:
        share: of any shape, in [0, 1].
        false_positive, false_negative: rates in [0, 1]; from a sum of 1 on, detections say nothing.

    Raises:
        UserError: a rate outside [0, 1].
    """
    number("scorers.detector.rates.false_positive", false_positive, 0, 1)
    number("scorers.detector.rates.false_negative", false_negative, 0, 1)
    power = 1 - false_positive - false_negative
    if power <= 0:
        return np.full_like(share, np.nan)
    return np.asarray(np.clip((share - false_positive) / power, 0.0, 1.0))


class Detector:
    """Which object and which style a picture shows.

    Args:
        network: two heads, one logit per name each.
        objects, styles: names of the classes, in the order of the heads; a name belongs to one of
            them only.
        temperature: divisor of the logits of each head (arXiv 1706.04599), from
            `lab.minisd.train.scorers.calibrate`.
        rates: for each name ``false_positive`` and ``false_negative`` of `detects` on held-out
            pictures.
        threshold: smallest probability that counts as seen.
        batch: pictures per forward pass.
    """

    def __init__(
        self,
        network: DetectorNetwork,
        objects: tuple[str, ...],
        styles: tuple[str, ...],
        *,
        temperature: dict[str, float] | None = None,
        rates: Rates | None = None,
        threshold: float = 0.5,
        batch: int = 256,
    ) -> None:
        self.network = network.eval()
        self.objects, self.styles = tuple(objects), tuple(styles)
        self.temperature = temperature or {"object": 1.0, "style": 1.0}
        self.rates = rates or {}
        self.threshold = number("scorers.detector.threshold", threshold, above=0, below=1)
        self.batch = batch

    @property
    def names(self) -> dict[Head, tuple[str, ...]]:
        return {"object": self.objects, "style": self.styles}

    @torch.no_grad()
    def logits(self, images: Tensor) -> dict[Head, Tensor]:
        """Raw logits, float32 [n, objects] and [n, styles], of uint8 images [n, 3, s, s] (resized
        to 64).
        """
        check(images)
        device = next(self.network.parameters()).device
        parts = [self.network(resized(part, 64).to(device)) for part in images.split(self.batch)]
        objects, styles = (torch.cat(found).cpu() for found in zip(*parts, strict=True))
        return {"object": objects, "style": styles}

    def probabilities(self, images: Tensor) -> dict[Head, Tensor]:
        """Calibrated probabilities [n, objects] and [n, styles]; each row adds up to 1."""
        return {
            head: F.softmax(x / self.temperature[head], 1)
            for head, x in self.logits(images).items()
        }

    def top1(self, images: Tensor) -> dict[Head, list[str]]:
        """The likeliest object and the likeliest style of every picture, without rejection."""
        logits = self.logits(images)
        return {
            head: [self.names[head][i] for i in x.argmax(1).tolist()] for head, x in logits.items()
        }

    def head(self, name: str) -> Head:
        """Which head knows ``name``; raises `lab.core.errors.UserError` with the nearest names
        where none does.
        """
        for head, known in self.names.items():
            if name in known:
                return head
        told = (
            "concepts of your own need an eval without relearning and concept_verdict, "
            "which ask what it sees"
        )
        fix = f"the detector does not know it ({told}); {nearest(name, self.objects + self.styles)}"
        raise UserError("scorers.detector", name, fix)

    def detects(self, images: Tensor, name: str, threshold: float | None = None) -> Tensor:
        """Whether each picture shows ``name``: bool [n], calibrated probability ≥ ``threshold``
        (default: its own).
        """
        head = self.head(name)
        least = (
            self.threshold
            if threshold is None
            else number("scorers.detector.threshold", threshold, above=0, below=1)
        )
        return self.probabilities(images)[head][:, self.names[head].index(name)] >= least

    def card(self) -> dict[str, Any]:
        """Everything but the weights, for `lab.scorers.networks.save_detector`."""
        return {
            "objects": list(self.objects),
            "styles": list(self.styles),
            "temperature": self.temperature,
            "threshold": self.threshold,
            "rates": self.rates,
        }


def load_detector(folder: str | Path, *, device: str = "cpu", batch: int = 256) -> Detector:
    """The detector of a folder that `lab.scorers.networks.save_detector` wrote.

    Raises:
        UserError: a missing or damaged file, or the weights of another network.
    """
    path = local(KEY, folder)
    facts, tensors = read_folder(path, DETECTOR_CONFIG, DETECTOR_WEIGHTS, KEY)
    try:
        objects, styles = (names(KEY, [*facts[head]]) for head in ("objects", "styles"))
        network = DetectorNetwork(len(objects), len(styles), count(KEY, facts["width"]))
        temperature = {
            head: number(KEY, facts["temperature"][head], above=0) for head in ("object", "style")
        }
        sides = ("false_positive", "false_negative")
        rates = {
            name: {side: number(KEY, facts["rates"][name][side], 0, 1) for side in sides}
            for name in facts["rates"]
        }
        threshold = facts["threshold"]
    except KeyError as error:
        raise UserError(KEY, path / DETECTOR_CONFIG, f"lacks {error}; restore the file.") from error
    except (TypeError, UserError) as error:
        raise UserError(
            KEY, path / DETECTOR_CONFIG, f"is damaged ({error}); restore the file."
        ) from error
    fill(network, tensors, path, KEY)
    return Detector(
        network.to(device),
        objects,
        styles,
        temperature=temperature,
        rates=rates,
        threshold=threshold,
        batch=batch,
    )
