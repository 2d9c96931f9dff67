"""The two networks that are trained for MiniSD's world, and the files that hold them.

Both folders hold float16 safetensors and JSON. The CLIP folder is an ordinary open_clip folder: it
loads by ``open_clip.create_model_from_pretrained("local-dir:FOLDER")`` without this project.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lab.core.seeding import derive

SHIPPED = Path(__file__).resolve().parent.parent / "minisd" / "weights" / "scorers"
"""MiniSD's scorers in the repository: the folders ``clip`` and ``detector``."""
TRAIN = "train and install MiniSD's with `python run.py experiment=train_minisd`"
CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
DETECTOR_CONFIG, DETECTOR_WEIGHTS = "detector.json", "detector.safetensors"


def resized(images: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Return uint8 images [n, 3, h, w] as float [n, 3, side, side] in [0, 1], with antialiasing."""
    x = images.float() / 255
    if x.shape[-2:] != (side, side):
        size = (side, side)
        x = F.interpolate(x, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    return x


def check_images(images: Tensor) -> Tensor:
    """Return ``images`` if they are uint8 [n, 3, h, w], n ≥ 1; floats would be taken for black."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            f"scorers take uint8 images [n, 3, h, w], not {images.dtype} {list(images.shape)}"
        )
    return images


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


def detector_network(objects: int, styles: int, width: int, seed: int) -> DetectorNetwork:
    """Return a fresh network, initialised by ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "detector", "init"))
        return DetectorNetwork(objects, styles, width)


@dataclass(frozen=True)
class ClipWidths:
    """Sizes of the small CLIP; ``image`` is a multiple of 2, ``text`` one of 32.

    Attributes:
        embed: width of the common space.
        image: width of open_clip's ModifiedResNet, with ``blocks`` bottlenecks in its four stages.
        text, layers: width and depth of the text transformer.
        context: tokens of a text.
    """

    embed: int = 128
    image: int = 20
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    text: int = 128
    layers: int = 3
    context: int = 32


def clip_config(widths: ClipWidths, vocabulary: int) -> dict[str, Any]:
    """Return the contents of ``open_clip_config.json``; pixels are scaled to [-1, 1]."""
    return {
        "model_cfg": {
            "embed_dim": widths.embed,
            "vision_cfg": {
                "image_size": 64,
                "layers": list(widths.blocks),
                "width": widths.image,
                "head_width": 4 * widths.image,  # eight heads
            },
            "text_cfg": {
                "context_length": widths.context,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": ".",  # open_clip looks into the folder itself
                "width": widths.text,
                "heads": widths.text // 32,
                "layers": widths.layers,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }


def clip_network(config: dict[str, Any], seed: int) -> nn.Module:
    """Return a fresh ``open_clip.CLIP`` from `clip_config`, initialised by ``seed`` alone."""
    from open_clip import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "clip", "init"))
        return CLIP(**copy.deepcopy(config["model_cfg"]))


def round_to_half(model: nn.Module) -> nn.Module:
    """Round every weight, in place, to what a float16 file keeps: the measured network is the
    shipped one.
    """
    return model.half().float()


def _write(model: nn.Module, folder: Path, weights: str, name: str, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous().clone() for k, v in halves.items()}, str(folder / weights))
    (folder / name).write_text(json.dumps(config, indent=1) + "\n")


def save_clip(model: nn.Module, config: dict[str, Any], folder: Path) -> Path:
    """Write an open_clip folder beside the files of `lab.minisd.train.build.train_tokenizer`."""
    _write(model, folder, CLIP_WEIGHTS, CLIP_CONFIG, config)
    return folder


def save_detector(model: DetectorNetwork, card: dict[str, Any], folder: Path) -> Path:
    """Write a detector; ``card`` holds its classes, temperatures and error rates
    (`lab.minisd.train.scorers.measure`).
    """
    _write(model, folder, DETECTOR_WEIGHTS, DETECTOR_CONFIG, {"width": model.width, **card})
    return folder
