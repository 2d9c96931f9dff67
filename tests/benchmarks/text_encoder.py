"""MiniSD's text encoder, trained with the U-Net or contrastively: ``python
tests/benchmarks/text_encoder.py``.

``joint`` is the recipe: U-Net and text encoder minimise the diffusion loss together.
``contrastive`` is Stable Diffusion's way: the text encoder learns as the text tower of a CLIP
(`lab.minisd.train.scorers.train_clip`, on MiniSD's own objects and styles) and stays fixed
while the U-Net learns. Autoencoder (the shipped one), pictures, captions, seed, steps and schedule
of the U-Net are the same for both. Prints what share of pictures shows what was asked for, by the
shipped detector and by the shipped CLIP, and writes ``text_encoder.json``.

The cache continues a killed run. About 55 minutes of one core with the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lab.core.cache import Artifact, StageCache
from lab.core.hashing import stage_key
from lab.minisd.train import networks, scorers
from lab.minisd.train.networks import TextToImageNetwork, encode, train_denoiser
from lab.minisd.train.quality import measure
from lab.minisd.train.recipe import SHIPPED, Recipe, Training, save
from lab.minisd.train.scorers import ClipWidths, clip_config, clip_network
from lab.minisd.world.world import TRAINING, sample
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import DiffusionBackbone

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("joint", "contrastive")


def recipe(steps: int, seed: int) -> Recipe:
    """The shipped recipe with ``steps`` of the U-Net."""
    OmegaConf.register_new_resolver("project_root", lambda: str(ROOT), replace=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "config",
            ["experiment=train_minisd", f"train.denoiser.steps={steps}", f"train.seed={seed}"],
        )
    found: Recipe = instantiate(cfg.train, _convert_="all")
    return dataclasses.replace(found, workers=1)


def as_transformers(clip: Any) -> dict[str, Tensor]:
    """Weights of open_clip's text tower under the names of transformers' `CLIPTextModel`."""
    own = clip.state_dict()
    out = {
        "text_model.embeddings.token_embedding.weight": own["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": own["positional_embedding"],
    }
    out |= {
        f"text_model.final_layer_norm.{kind}": own[f"ln_final.{kind}"]
        for kind in ("weight", "bias")
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    names["attn.out_proj"] = "self_attn.out_proj"
    for i in range(len(clip.transformer.resblocks)):
        there, here = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            out |= {
                f"{there}.{new}.{kind}": own[f"{here}.{old}.{kind}"] for old, new in names.items()
            }
            parts = own[f"{here}.attn.in_proj_{kind}"].chunk(3)
            out |= {
                f"{there}.self_attn.{n}_proj.{kind}": v for n, v in zip("qkv", parts, strict=True)
            }
    return out


def contrastive(training: Training, tokenizer: Any, store: StageCache) -> Any:
    """A `CLIPTextModel` with the text tower of a CLIP that saw MiniSD's training objects and styles
    only.
    """
    r = training.recipe
    shown = sample(
        dataclasses.replace(TRAINING, two_share=0.0), r.seed, r.scorers.pictures
    )  # two have no label
    held_out = scorers.labelled(
        sample(dataclasses.replace(TRAINING, two_share=0.0), r.seed, 512, start=20_000)
    )
    widths = dataclasses.replace(r.scorers.clip_widths, text=r.widths.text, layers=r.widths.layers)
    model = clip_of(widths, len(tokenizer), r.seed)
    schedule = r.scorers.clip

    def compute(checkpoint: Any) -> Artifact:
        texts = [p.captions(r.captions) for p in shown.pictures]
        data = scorers.labelled(shown), texts, held_out, tokenizer
        scorers.train_clip(model, *data, schedule, seed=r.seed, checkpoint=checkpoint)
        return Artifact({}, dict(model.state_dict()))

    key = stage_key(benchmark="text_encoder", recipe=dataclasses.asdict(r.scorers), seed=r.seed)
    model.load_state_dict(store.get("train", key, compute)[0].tensors)
    text = networks.build_text_encoder(r.widths, len(tokenizer), r.seed)
    found = {n: v for n, v in as_transformers(model).items() if n in text.state_dict()}
    if not found:  # transformers 5 names them without the prefix
        found = {n.removeprefix("text_model."): v for n, v in as_transformers(model).items()}
    missing = text.load_state_dict(found, strict=False).missing_keys
    assert not [n for n in missing if "position_ids" not in n], missing
    ids = networks.tokenize(tokenizer, ["a photo of a fox", "a rocket by mosaic"])
    with torch.no_grad():
        difference = (
            (text(ids).pooler_output @ model.text_projection - model.encode_text(ids))
            .abs()
            .max()
            .item()
        )
    assert difference < 1e-4, difference
    return text.requires_grad_(False).eval()


def clip_of(widths: ClipWidths, vocabulary: int, seed: int) -> Any:
    config = clip_config(widths, vocabulary)
    config["model_cfg"]["quick_gelu"] = True  # what CLIPTextModel computes
    return clip_network(config, seed)


def denoiser(
    kind: str, training: Training, vae: Any, tokenizer: Any, text: Any, store: StageCache
) -> tuple[TextToImageNetwork, Any]:
    """The U-Net of ``kind`` with its text encoder, and its last validation losses."""
    r = training.recipe
    unet = networks.build_unet(r.widths, r.seed).to(memory_format=torch.channels_last)
    model = TextToImageNetwork(unet, text)

    def compute(checkpoint: Any) -> Artifact:
        rows = train_denoiser(
            model,
            tokenizer,
            networks.build_scheduler(),
            encode(vae, training.images.images),
            training.texts(),
            (encode(vae, training.held_out.images), training.held_out.texts),
            r.denoiser,
            gamma=r.gamma,
            drop=r.drop,
            seed=r.seed,
            checkpoint=checkpoint,
        )
        last = {name: value for row in rows for name, value in row.items() if name != "step"}
        return Artifact(last, dict(model.state_dict()))

    key = stage_key(benchmark="text_encoder", kind=kind, recipe=r.identity("denoiser"))
    artifact, _ = store.get("train", key, compute)
    model.load_state_dict(artifact.tensors)
    return model.eval(), artifact.values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=2000, help="of the U-Net; the recipe has 9,000"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scale",
        type=int,
        default=8,
        help="images, see lab.minisd.train.quality.suites; the card has 32",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--outputs", type=Path, default=ROOT / "outputs" / "benchmarks" / "text_encoder"
    )
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(given.threads)
    store = StageCache(given.outputs / "cache")
    training = Training(recipe(given.steps, given.seed), store)
    shipped = DiffusionBackbone(path=str(SHIPPED / "model")).build(None, 0)
    vae, tokenizer = shipped.vae, shipped.tokenizers[0]
    found: dict[str, Any] = {"steps": given.steps, "seed": given.seed}
    for kind in KINDS:
        text = networks.build_text_encoder(training.recipe.widths, len(tokenizer), given.seed)
        if kind == "contrastive":
            text = contrastive(training, tokenizer, store)
        model, losses = denoiser(kind, training, vae, tokenizer, text, store)
        vae.register_to_config(scaling_factor=float(model.scale))
        parts = model.unet, vae, [model.text_encoder], [tokenizer], networks.build_scheduler()
        folder = save(DiffusionModel(*parts), given.outputs / kind)
        found[kind] = {"losses": losses} | measure(
            DiffusionBackbone(path=str(folder)).build(None, 0),
            SHIPPED / "scorers",
            seed=1,
            scale=given.scale,
        )
        vae.float()
    (given.outputs / "text_encoder.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'share of pictures':24}{'joint':>20}{'contrastive':>20}   (detector / CLIP)")
    for suite, scored in found["joint"]["shares"].items():
        for what in scored["detector"]:
            cells = [
                "{:.1%} / {:.1%}".format(
                    *(found[k]["shares"][suite][j][what] for j in ("detector", "clip"))
                )
                for k in KINDS
            ]
            print(f"{suite + ', ' + what:24}{cells[0]:>20}{cells[1]:>20}")
    for key in found["joint"]["losses"]:
        print(f"{key:24}" + "".join(f"{found[k]['losses'][key]:>20.4f}" for k in KINDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
