"""The real thing in size: random weights in the layout of Stable Diffusion v1-4, 16 × 16 latents,
on a CPU.

    python tests/benchmarks/sd_layout.py [--folder DIR]

Every phase runs in a fresh process and prints its time and peak memory: ``write`` a folder as a
user has it, ``load`` it through ``backbone=sd``, one ``lora`` step (peft, rank 4, batch 1), one
``sample`` step with guidance, two steps of ``undo`` (batch 2). Needs 4.3 GB of disk for DIR (a
temporary folder by default). The tokenizer is MiniSD's kind with CLIP's context, since CLIP's own
vocabulary cannot be made from a config.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARAMETERS = {
    "unet": 859_520_964,
    "vae": 83_653_863,
    "text_encoder": 123_060_480,
}  # of the published weights
PROMPT = "a fox in the style of mosaic"


def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        projection_dim=768,
    )
    return CLIPTextModel(config)


def write(folder):
    """One part at a time, so that this phase needs the memory of the largest only."""
    import torch
    from diffusers import PNDMScheduler

    from lab.minisd.train.networks import train_tokenizer

    torch.manual_seed(0)
    for name, make in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        part = make()
        count = sum(p.numel() for p in part.parameters())
        assert count == PARAMETERS[name], (
            f"{name} has {count} parameters, Stable Diffusion v1-4 {PARAMETERS[name]}"
        )
        part.save_pretrained(folder / name)
        del part
    tokenizer = train_tokenizer([PROMPT, "a photo of a fox"], folder / "tokenizer", 560)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    noise = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    PNDMScheduler(**noise, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def load(folder):
    from lab.models.diffusion_backbone import DiffusionBackbone

    model = DiffusionBackbone(path=str(folder), resolution=128, device="cpu").build(None, 0)
    assert (model.latent_size, model.image_size) == (16, 128)
    return model


def lora(folder):
    import torch
    from peft import LoraConfig

    model = load(folder)
    with torch.no_grad():
        z, _ = model.posterior(torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8))
        text = model.text([PROMPT])
    model.unet.add_adapter(
        LoraConfig(r=4, target_modules=["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"])
    )
    factors = [p for p in model.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4)
    loss = model.loss(z, text, model.latents(1, 0), torch.tensor([500])).mean()
    start = time.perf_counter()
    loss.backward()
    optimizer.step()
    moved = sum(p.numel() for p in factors if p.grad is not None and p.grad.abs().sum() > 0)
    print(
        f"  loss {loss.item():.4f}; {sum(p.numel() for p in factors):,} trainable "
        f"numbers, {moved:,} with a gradient"
    )
    print(f"  backward and update {time.perf_counter() - start:.1f} s")


def sample(folder):
    from lab.core.data import Sampling

    model = load(folder)
    start = time.perf_counter()
    images = model.generate([PROMPT], model.latents(1, 0), Sampling(steps=1, guidance=7.5))
    print(f"  image {tuple(images.shape)} {images.dtype} in {time.perf_counter() - start:.1f} s")


def undo(folder):
    from types import SimpleNamespace

    from immunize.undo import Undo, _Captions, _Distillation
    from lab.core.data import Sampling

    model = load(folder)
    options = Undo(keep_samples=1, target_samples=1, batch_size=2, steps=2, sampling_steps=1)
    captions = _Captions(student=(PROMPT, PROMPT), teacher=("a photo of a fox", PROMPT), same=1)
    case = SimpleNamespace(sampling=Sampling(steps=1, guidance=7.5))
    training = _Distillation(options, model, captions, case, 0)
    for step in range(options.steps):  # the first one also draws the teacher's two images
        start = time.perf_counter()
        print(f"  {training.step(step)} in {time.perf_counter() - start:.1f} s")


def memory():
    """Peak resident memory of this process and what of the present one is mapped from files
    (Linux).
    """
    lines = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    peak, mapped = (int(lines[name].split()[0]) / 2**20 for name in ("VmHWM", "RssFile"))
    return f"peak memory {peak:.2f} GiB (at the end {mapped:.2f} GiB of it mapped from files)"


PHASES = {"write": write, "load": load, "lora": lora, "sample": sample, "undo": undo}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument(
        "--phase", choices=PHASES, help="run this one here instead of all in processes of their own"
    )
    given = parser.parse_args()
    if given.phase:
        start = time.perf_counter()
        kept = PHASES[given.phase](given.folder)
        print(f"{given.phase}: {time.perf_counter() - start:.1f} s, {memory()}", flush=True)
        del kept
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for phase in PHASES:
            if phase == "write" and (folder / "model_index.json").is_file():
                continue
            command = [sys.executable, __file__, "--phase", phase, "--folder", str(folder)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
