"""Write what was trained: diffusers layout, scorers, training record, model card. `action=train`
ends here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from lab.core.cache import StageCache
from lab.core.config import user_error
from lab.core.errors import UserError
from lab.core.provenance import provenance
from lab.core.seeding import derive
from lab.minisd.train.quality import measure, showcase
from lab.minisd.train.recipe import Recipe, Training
from lab.minisd.world.openmoji import CREDIT
from lab.minisd.world.vocabulary import (
    HELD_OUT_OBJECTS,
    HELD_OUT_PAIRS,
    HELD_OUT_STYLES,
    OBJECTS,
    STYLE_NAMES,
)
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import DiffusionBackbone
from lab.scorers.clip import OpenClip
from lab.scorers.detector import load_detector
from lab.scorers.features import FeatureScorer
from lab.scorers.load import Scorers
from lab.scorers.networks import save_clip, save_detector

SHIPPED = Path(__file__).resolve().parents[1] / "weights"


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below ``folder``, by its path there."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def save(model: DiffusionModel, folder: Path) -> Path:
    """Write float16 safetensors in diffusers layout, which load as float32 where nobody asks for
    another type.
    """
    backend = getattr(model.tokenizers[0], "backend_tokenizer", None)
    if backend is not None:  # transformers 5; it would write its last call's
        backend.no_padding()
        backend.no_truncation()
    model.half().save(folder)
    # transformers loads what it says here, diffusers float32
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    return folder


def make_card(record: Mapping[str, Any], quality: Mapping[str, Any]) -> str:
    """Return the model card beside the weights, from the training record and the measured
    quality.
    """
    data = ModelCardData(
        license="cc-by-sa-4.0", library_name="diffusers", pipeline_tag="text-to-image"
    )
    worn = record["detector"]["worn"]["rates"]
    values = {
        "record": record,
        "quality": quality,
        "objects": OBJECTS,
        "styles": STYLE_NAMES,
        "held_out_objects": HELD_OUT_OBJECTS,
        "held_out_styles": HELD_OUT_STYLES,
        "held_out_pairs": HELD_OUT_PAIRS,
        "most_missed": max(worn, key=lambda name: worn[name]["false_negative"]),
        "credit": CREDIT,
    }
    template = str(Path(__file__).with_name("card.md"))
    return f"{ModelCard.from_template(data, template, **values)}\n"


def scorers_of(folder: Path) -> Scorers:
    """Return the scorers in ``folder``, for MiniSD's own quality: those that were just trained
    beside it.
    """
    return Scorers(
        name="minisd",
        clip=OpenClip(name=f"local-dir:{folder / 'clip'}"),
        detector=load_detector(folder / "detector"),
        features=FeatureScorer(image_size=128),  # as conf/scorers/minisd.yaml
    )


def assess(folder: Path, seed: int, scale: int) -> None:
    """Measure the model in ``folder``; writes ``quality.json``, ``samples.png`` and the model card
    ``README.md``.
    """
    model = DiffusionBackbone(path=str(folder / "model")).build(None, seed)
    scorers = scorers_of(folder / "scorers")
    quality = measure(model, scorers, seed=derive(seed, "quality"), scale=scale)
    (folder / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    showcase(model, seed=derive(seed, "showcase")).save(folder / "samples.png")
    record = json.loads((folder / "training.json").read_text())
    (folder / "README.md").write_text(make_card(record, quality))


def run(cfg: DictConfig) -> Path:
    """Train what ``cfg.train`` describes, measure it, and write all of it to
    ``paths.outputs/minisd``.
    """
    from lab.runner.experiment import relative

    if cfg.get("train") is None:
        fix = "nothing to train is described: `python run.py experiment=train_minisd`."
        raise UserError("train", None, fix)
    started, clock = time.time(), time.monotonic()
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    plain: Any = OmegaConf.to_container(cfg.train, resolve=True)
    try:
        recipe = Recipe(**{key: value for key, value in plain.items() if key != "_target_"})
    except ValidationError as error:
        raise user_error(error, "train", Recipe) from None
    training = Training(recipe, StageCache(cfg.paths.cache, force=cfg.force))
    folder = Path(cfg.paths.outputs) / "minisd"
    fresh = folder.with_name(".minisd.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    detector, facts = training.detector()
    save_detector(detector.network, detector.card(), fresh / "scorers" / "detector")
    clip, config = training.clip(fresh / "scorers" / "clip")
    save_clip(clip, config, fresh / "scorers" / "clip")
    save(training.model(), fresh / "model")
    record = {
        "recipe": plain,
        "curves": training.curves,
        "seconds": training.seconds,
        "detector": facts,
        "provenance": provenance(started, time.monotonic() - clock),
        "sha256": hashes(fresh),
    }
    (fresh / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    assess(fresh, recipe.seed, recipe.measured)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    target = relative(folder)
    print(f"model: {target} (to ship it: `cp -r {target}/. {relative(SHIPPED)}/`)")
    return folder
