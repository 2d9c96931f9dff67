"""`python run.py experiment=train_minisd`: from a seed to a folder in diffusers layout with its training record.

Every network is one stage of the cache (`lab.store`), so that a killed training continues at its last checkpoint
and a finished one is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab.minisd import build, captions
from lab.minisd.dice import Dice
from lab.minisd.loop import Schedule
from lab.minisd.training import Denoiser, encode, train_denoiser, train_vae
from lab.minisd.world import TRAINING, Sample, sample
from lab.options import count, number
from lab.sources import source_hash
from lab.store import Artifact, StageCheckpoint, Store, stage_key
from lab.types import Log

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines MiniSD's weights.

    Attributes:
        seed: of the data, the initial weights and every step.
        pictures: training pictures; ``held_out`` more, never trained on, for validation.
        captions: captions drawn per picture.
        vocabulary: tokens of the tokenizer at most.
        kl, gamma, drop: see `lab.minisd.training`.
    """

    seed: int
    pictures: int
    held_out: int
    captions: int
    vocabulary: int
    kl: float
    gamma: float
    drop: float
    vae: Schedule
    denoiser: Schedule
    widths: build.Widths = field(default_factory=build.Widths)
    workers: int = 1

    def __post_init__(self) -> None:
        for key in ("pictures", "held_out", "captions", "workers"):
            count(f"train.{key}", getattr(self, key))
        count("train.vocabulary", self.vocabulary, 515)  # 2 × 256 bytes, start, end, and at least one merge
        number("train.kl", self.kl, 0)
        number("train.gamma", self.gamma, above=0)
        number("train.drop", self.drop, 0, below=1)

    def identity(self, *parts: str) -> dict[str, Any]:
        """The options that determine the stage that trains ``parts``."""
        values = dataclasses.asdict(self)
        shared = ("seed", "pictures", "held_out", "widths", "kl", "vae")
        more = ("captions", "vocabulary", "gamma", "drop", "denoiser") if "denoiser" in parts else ()
        found = {key: values[key] for key in (*shared, *more)}
        for key in ("vae", "denoiser"):
            if key in found:
                found[key] = {k: v for k, v in found[key].items() if k != "save_every"}
        return found


class Training:
    """The stages of one recipe. ``curves`` fills as they are computed or read from the cache."""

    def __init__(self, recipe: Recipe, store: Store, on_log: Callable[[str, int, dict[str, float]], None]) -> None:
        self.recipe, self.store, self.on_log = recipe, store, on_log
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.seconds: dict[str, float] = {}
        self._samples: dict[str, Sample] = {}

    def pictures(self, part: str) -> Sample:
        """``train`` or ``held_out`` pictures: the same series, different stretches."""
        if part not in self._samples:
            r = self.recipe
            start, size = (0, r.pictures) if part == "train" else (r.pictures, r.held_out)
            self._samples[part] = sample(TRAINING, r.seed, size, start=start, workers=r.workers)
        return self._samples[part]

    def texts(self) -> list[list[str]]:
        """Several captions for every training picture; the first is the picture's own."""
        found = []
        for shown in self.pictures("train").pictures:
            draw = lambda k: captions.draw(shown.objects, shown.style, shown.background, Dice(shown.stream, "again", k))  # noqa: B023, E731
            found.append([shown.text, *(draw(k) for k in range(1, self.recipe.captions))])
        return found

    def tokenizer(self, folder: Path) -> Any:
        texts = [text for texts in self.texts() for text in texts]
        return build.load_tokenizer(build.train_tokenizer(texts, folder, self.recipe.vocabulary))

    def _stage(self, name: str, model: nn.Module, fit: Callable[[StageCheckpoint, Log], None]) -> nn.Module:
        key = stage_key(
            name=name,
            recipe=self.recipe.identity(name),
            sources=source_hash("lab.minisd.training"),
            torch=torch.__version__,
        )

        def compute(checkpoint: StageCheckpoint) -> Artifact:
            rows: list[tuple[int, dict[str, float]]] = []
            started = time.monotonic()

            def note(step: int, **values: float) -> None:
                rows.append((step, values))
                log.info("%s step %d %s", name, step, " ".join(f"{k} {v:.4f}" for k, v in values.items()))
                self.on_log(name, step, values)

            fit(checkpoint, note)
            return Artifact({"log": rows, "seconds": time.monotonic() - started}, dict(model.state_dict()))

        artifact, _ = self.store.get("train", key, compute)
        model.load_state_dict(artifact.tensors)
        self.seconds[name] = artifact.values["seconds"]
        names = dict.fromkeys(k for _, values in artifact.values["log"] for k in values)
        self.curves[name] = {}
        for key_ in names:
            points = [(step, values[key_]) for step, values in artifact.values["log"] if key_ in values]
            self.curves[name][key_] = [value for _, value in points]
            self.curves[name][f"{key_}_step"] = [float(step) for step, _ in points]
        return model.eval()

    def vae(self) -> nn.Module:
        r = self.recipe
        model = build.vae(r.widths, r.seed).to(memory_format=torch.channels_last)

        def fit(checkpoint: StageCheckpoint, note: Log) -> None:
            train, held_out = self.pictures("train").images, self.pictures("held_out").images
            train_vae(model, train, held_out, r.vae, kl=r.kl, seed=r.seed, checkpoint=checkpoint, log=note)

        return self._stage("vae", model, fit)

    def denoiser(self, vae: Any, tokenizer: Any) -> tuple[nn.Module, float]:
        """The trained U-Net with its text encoder, and the factor that brings latents to unit variance."""
        r = self.recipe
        unet = build.unet(r.widths, r.seed).to(memory_format=torch.channels_last)
        model = Denoiser(unet, build.text_encoder(r.widths, len(tokenizer), r.seed))
        model.register_buffer("scale", torch.zeros(()))

        def fit(checkpoint: StageCheckpoint, note: Log) -> None:
            latents = encode(vae, self.pictures("train").images)
            second = latents[0].float().square().mean() + latents[1].float().square().mean()
            model.scale.fill_(1 / (second - latents[0].float().mean() ** 2).sqrt())  # type: ignore[operator, union-attr]
            held_out = self.pictures("held_out")
            train_denoiser(
                model, tokenizer, build.scheduler(), latents, self.texts(),
                (encode(vae, held_out.images), held_out.texts), r.denoiser,
                scale=float(model.scale), gamma=r.gamma, drop=r.drop, seed=r.seed, checkpoint=checkpoint, log=note,
            )  # fmt: skip

        found = self._stage("denoiser", model, fit)
        return found, float(found.scale)  # type: ignore[arg-type]

    def pipeline(self) -> Any:
        """The whole model as a `StableDiffusionPipeline` in float32."""
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = self.tokenizer(Path(folder))
        vae = self.vae()
        model, scale = self.denoiser(vae, tokenizer)
        vae.register_to_config(scaling_factor=scale)  # type: ignore[operator]
        return build.pipeline(vae, model.unet, model.text_encoder, tokenizer, build.scheduler())


def save(pipeline: Any, folder: Path, training: dict[str, Any]) -> Path:
    """Write ``pipeline`` as float16 safetensors in diffusers layout with ``training.json``, all at once."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(str(partial), safe_serialization=True)
    (partial / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def run(cfg: Any) -> Path:
    """Train what ``cfg.train`` describes and write it to ``paths.outputs/minisd``."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from lab.errors import UserError
    from lab.experiment import relative
    from lab.provenance import provenance

    if cfg.get("train") is None:
        raise UserError("train", None, "nothing to train is described: `python run.py experiment=train_minisd`.")
    started, clock = time.time(), time.monotonic()
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    recipe = instantiate(cfg.train)
    training = Training(recipe, Store(cfg.paths.cache, force=cfg.force), lambda *_: None)
    pipeline = training.pipeline()
    facts = {
        "recipe": OmegaConf.to_container(cfg.train, resolve=True),
        "curves": training.curves,
        "seconds": training.seconds,
        "provenance": provenance(started, time.monotonic() - clock),
    }
    folder = save(pipeline, Path(cfg.paths.outputs) / "minisd", facts)
    print(f"model: {relative(folder)}")
    return folder
