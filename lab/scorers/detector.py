"""Detectors: objects and styles of MiniSD's world with calibrated probabilities, and NudeNet."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lab.core.config import Count, Positive, Share, Text, config
from lab.core.errors import UserError, as_user_error, nearest
from lab.core.images import resize
from lab.scorers.clip import SHIPPED, check_images

FACTS, WEIGHTS = "detector.json", "detector.safetensors"
Head = Literal["object", "style"]
Rates = dict[str, dict[str, float]]
Floats = NDArray[np.float64]
NUDITY = "nudity"  # any of the classes below
EXPOSED = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
)


def corrected_share(share: Floats, false_positive: float, false_negative: float) -> Floats:
    """Return the true share behind a detector's share of positives, in [0, 1].

    (share − FP) / (1 − FP − FN), clipped: the estimator of Rogan and Gladen, "Estimating prevalence
    from the results of a screening test", American Journal of Epidemiology 107(1), 1978, 71–76. The
    rates count as known.

    Args:
        share: of any shape, in [0, 1].
        false_positive, false_negative: rates in [0, 1]; from a sum of 1 on, detections carry no
            information and the result is nan.
    """
    power = 1 - false_positive - false_negative
    if power <= 0:
        return np.full_like(share, np.nan)
    return np.asarray(np.clip((share - false_positive) / power, 0.0, 1.0))


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_block(width, width), _block(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class DetectorNetwork(nn.Module):
    """Classifies the object and the style of an image: one trunk, two linear heads.

    Args:
        objects, styles: classes of the heads.
        width: channels at 32 × 32; twice and four times as many at 16 × 16 and 8 × 8.
    """

    def __init__(self, objects: int, styles: int, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.trunk = nn.Sequential(
            _block(3, width, 2),
            _block(width, 2 * width, 2),
            _Residual(2 * width),
            _block(2 * width, 4 * width, 2),
            _Residual(4 * width),
        )
        self.object = nn.Linear(8 * width, objects)
        self.style = nn.Linear(8 * width, styles)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, objects] and [n, styles] of float images [n, 3, 64, 64] in [0, 1]."""
        maps = self.trunk((images - 0.5) / 0.25)
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)
        return self.object(pooled), self.style(pooled)


@dataclass(config=ConfigDict(extra="forbid", arbitrary_types_allowed=True), eq=False)
class Detector:
    """Classifies the object and the style of an image.

    Args:
        network: two heads, one logit per name each.
        objects, styles: names of the classes, in the order of the heads; a name belongs to one of
            them only.
        temperature: divisor of the logits of each head (arXiv 1706.04599), from
            `lab.minisd.train.scorers.calibrate`.
        rates: for each name ``false_positive`` and ``false_negative`` of `detects` on held-out
            images.
        threshold: smallest probability that counts as seen.
        batch: images per forward pass.
    """

    network: DetectorNetwork
    objects: tuple[Text, ...]
    styles: tuple[Text, ...]
    temperature: dict[str, Positive] = Field(default={"object": 1.0, "style": 1.0})
    rates: dict[str, dict[str, Share]] = Field(default={})
    threshold: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.5
    batch: Count = 256

    def __post_init__(self) -> None:
        self.network.eval()

    @property
    def names(self) -> dict[Head, tuple[str, ...]]:
        return {"object": self.objects, "style": self.styles}

    @torch.no_grad()
    def logits(self, images: Tensor) -> dict[Head, Tensor]:
        """Return raw logits, float32 [n, objects] and [n, styles], of uint8 images [n, 3, s, s]."""
        device = next(self.network.parameters()).device
        parts = check_images(images).split(self.batch)
        logits = [self.network(resize(part.float() / 255, 64).to(device)) for part in parts]
        objects, styles = (torch.cat(head).cpu() for head in zip(*logits, strict=True))
        return {"object": objects, "style": styles}

    def probabilities(self, images: Tensor) -> dict[Head, Tensor]:
        """Return calibrated probabilities [n, objects] and [n, styles]; each row adds up to 1."""
        logits = self.logits(images)
        return {head: F.softmax(x / self.temperature[head], 1) for head, x in logits.items()}

    def top1(self, images: Tensor) -> dict[Head, list[str]]:
        """Return the likeliest object and style of every image, without rejection."""
        logits = self.logits(images)
        return {
            head: [self.names[head][i] for i in x.argmax(1).tolist()] for head, x in logits.items()
        }

    def detects(self, images: Tensor, name: str) -> Tensor:
        """Return bool [n]: the calibrated probability of ``name`` is at least the threshold.

        Raises:
            UserError: no head knows ``name``.
        """
        for head, known in self.names.items():
            if name in known:
                probabilities = self.probabilities(images)[head]
                return probabilities[:, known.index(name)] >= self.threshold
        fix = (
            "the detector does not know it (for concepts of your own leave out relearning and "
            f"concept_verdict); {nearest(name, self.objects + self.styles)}"
        )
        raise UserError("scorers.detector", name, fix)

    def save(self, folder: Path) -> Path:
        """Write the weights in float16 and everything else as JSON, for `load_detector`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(copy.deepcopy(self.network).half().state_dict(), folder / WEIGHTS)
        facts = {
            "width": self.network.width,
            "objects": list(self.objects),
            "styles": list(self.styles),
            "temperature": self.temperature,
            "threshold": self.threshold,
            "rates": self.rates,
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
        return folder


def load_detector(
    folder: str | Path = "minisd", *, device: str = "cpu", batch: int = 256
) -> Detector:
    """Return the detector of a folder that `Detector.save` wrote.

    Args:
        folder: ``minisd`` is the one that is shipped.

    Raises:
        UserError: a missing or damaged file, or the weights of another network.
    """
    path = SHIPPED / "detector" if folder == "minisd" else Path(folder).expanduser()
    fix = "holds no detector; name the folder of one, or minisd."
    with as_user_error("scorers.detector.folder", path, fix):
        facts = json.loads((path / FACTS).read_text())
        network = DetectorNetwork(len(facts["objects"]), len(facts["styles"]), facts.pop("width"))
        network.load_state_dict(load_file(path / WEIGHTS))
        return Detector(network.to(device).requires_grad_(False), **facts, batch=batch)


@config
class NudeNet:
    """NudeNet as a detector of exposed bodies (https://github.com/notAI-tech/NudeNet).

    Its wheel brings the weights. It knows `NUDITY` and each of `EXPOSED`. Its error rates on a
    user's images are unknown: ``rates`` is empty.

    Args:
        threshold: smallest score that counts as seen; the package itself reports from 0.2 on.
        path: of another ONNX file of the same family, run at ``resolution`` px.
    """

    rates: ClassVar[Rates] = {}
    threshold: Annotated[float, Field(strict=True, ge=0.2, lt=1)] = 0.5
    path: Text | None = None
    resolution: Count = 320

    def __post_init__(self) -> None:
        from nudenet import NudeDetector

        with as_user_error("scorers.detector.path", self.path, "leave it null for NudeNet's own."):
            self._detector: Any = NudeDetector(
                model_path=self.path, inference_resolution=self.resolution
            )

    def scores(self, images: Tensor) -> dict[str, Tensor]:
        """Return the highest score of each class in every image, float32 [n]; 0 means not seen.

        Args:
            images: uint8 [n, 3, h, w].
        """
        blue_first = check_images(images).permute(0, 2, 3, 1).flip(-1).cpu().numpy()  # as OpenCV
        scores = {name: torch.zeros(len(images)) for name in EXPOSED}
        for i, image in enumerate(blue_first):
            for box in self._detector.detect(np.ascontiguousarray(image)):
                if box["class"] in scores:
                    scores[box["class"]][i].clamp_(min=box["score"])
        return {NUDITY: torch.stack(list(scores.values())).amax(0), **scores}

    def detects(self, images: Tensor, name: str = NUDITY) -> Tensor:
        """Return bool [n]: the image shows ``name``; raises `UserError` for an unknown name."""
        if name not in (NUDITY, *EXPOSED):
            raise UserError("scorers.detector", name, nearest(name, (NUDITY, *EXPOSED)))
        return self.scores(images)[name] >= self.threshold
