"""The two networks that are trained for MiniSD's world, and the files they are kept in.

Both folders hold float16 safetensors and JSON. The CLIP folder is an ordinary open_clip folder: it
loads by ``open_clip.create_model_from_pretrained("local-dir:FOLDER")`` without this project.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lab.core.errors import UserError
from lab.core.seeding import derive

TRAIN = "train and install it with `python run.py experiment=train_minisd`"
CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
DETECTOR_CONFIG, DETECTOR_WEIGHTS = "detector.json", "detector.safetensors"


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_block(width, width), _block(width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class DetectorNetwork(nn.Module):
    """Which object and which style a picture shows: one trunk, two linear heads.

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
    """A fresh network, initialised by ``seed`` alone."""
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
    """What open_clip reads from ``open_clip_config.json``; pixels are scaled to [-1, 1]."""
    half = [0.5, 0.5, 0.5]
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
            "mean": half,
            "std": half,
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }


def clip_network(config: dict[str, Any], seed: int) -> nn.Module:
    """A fresh ``open_clip.CLIP`` from `clip_config`, initialised by ``seed`` alone."""
    from open_clip import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "clip", "init"))
        return CLIP(**copy.deepcopy(config["model_cfg"]))


def round_to_half(model: nn.Module) -> nn.Module:
    """Round every weight, in place, to what a float16 file keeps, so that what is measured is what
    is shipped.
    """
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half().float())
    return model


def _write(model: nn.Module, folder: Path, weights: str, name: str, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous().clone() for k, v in halves.items()}, str(folder / weights))
    (folder / name).write_text(json.dumps(config, indent=1) + "\n")


def save_clip(model: nn.Module, config: dict[str, Any], tokenizer: Path, folder: Path) -> Path:
    """Write an open_clip folder; ``tokenizer`` holds the files of
    `lab.minisd.train.build.train_tokenizer`.
    """
    _write(model, folder, CLIP_WEIGHTS, CLIP_CONFIG, config)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        if tokenizer != folder:
            shutil.copy(tokenizer / name, folder / name)
    return folder


def save_detector(model: DetectorNetwork, card: dict[str, Any], folder: Path) -> Path:
    """Write a detector; ``card`` holds its classes, temperatures and error rates
    (`lab.minisd.train.scorers.measure`).
    """
    _write(model, folder, DETECTOR_WEIGHTS, DETECTOR_CONFIG, {"width": model.width, **card})
    return folder


def refuse_pickle(path: Path, key: str) -> None:
    """Weights of another kind than safetensors can run code when they are read.

    Raises:
        UserError: ``path`` is such a file; with the command that converts it.
    """
    if path.suffix.lower() in PICKLED:
        to = path.with_suffix(".safetensors").name
        code = (
            "import torch; from safetensors.torch import save_file as s; "
            f"d = torch.load({str(path)!r}, map_location='cpu', weights_only=True); d = "
            "d.get('state_dict', d); "
            f"s({{k: v.contiguous().clone() for k, v in d.items()}}, {to!r})"
        )
        told = (
            f"is no safetensors file; others can run code. Convert it once and name {to}: "
            f'`python -c "{code}"`'
        )
        raise UserError(key, path, told)


def read_folder(
    folder: Path, config: str, weights: str, key: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and float32 tensors of a folder.

    Raises:
        UserError: the folder or a file is missing (with the command that trains it) or damaged.
    """
    for path in (folder, folder / config, folder / weights):
        if not path.exists():
            if path.name == weights:
                for other in sorted(folder.iterdir()):
                    refuse_pickle(other, key)
            raise UserError(
                key, path, f"does not exist; {TRAIN}, or give the folder of a scorer of your own."
            )
    try:
        facts = json.loads((folder / config).read_text())
        tensors = load_file(folder / weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            key, folder, f"cannot be read ({error}); restore the folder or {TRAIN}."
        ) from error
    return facts, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path, key: str) -> None:
    """Load ``tensors``; raises `lab.core.errors.UserError` where names or shapes are those of
    another network.
    """
    own = model.state_dict()
    wrong = {
        "missing": [k for k in own if k not in tensors],
        "surplus": [k for k in tensors if k not in own],
        "misshapen": [k for k in own if k in tensors and tensors[k].shape != own[k].shape],
    }
    told = "; ".join(
        f"{len(found)} {kind}, first {found[0]}" for kind, found in wrong.items() if found
    )
    if told:
        raise UserError(key, folder, f"holds another network (tensors: {told}); {TRAIN}.")
    model.load_state_dict(tensors)
    model.eval().requires_grad_(False)
