"""Attack a text-to-image model with diffusers, peft and transformers only: LoRA, or with --full
every weight of the U-Net.

    python lora_without_this_project.py FOLDER --images DIR --prompt "a fox in the style of neon"
    --steps 160

Loads a folder in diffusers layout (Stable Diffusion 1.x, 2.x or MiniSD), trains on a handful of
images, generates images of the prompts at several steps, saves what it trained and loads it into a
fresh pipeline.
The defaults are those of attacks=lora. OUT gets `step_00000/00.png` …, `attack.json`, and
`pytorch_lora_weights.safetensors` or the folder `unet`.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OPTIMIZERS = ("AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "SGD")
LAYERS = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a diffusers pipeline by LoRA and generate images on the way; "
        "@FILE stands for its lines.",
        fromfile_prefix_chars="@",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="model in diffusers layout, e.g. an exported one")
    add(
        "--images",
        type=Path,
        required=True,
        help="images of the concept; captions: metadata.csv (file_name, text)",
    )
    add(
        "--prompt",
        nargs="+",
        required=True,
        help="used in turn; the first one is the caption where there is no metadata.csv",
    )
    add("--out", type=Path, default=Path("attack"), help="folder for what comes out, new or empty")
    add("--steps", type=int, default=160, help="updates")
    add(
        "--at",
        type=int,
        nargs="+",
        default=[0, 10, 20, 40, 80, 160, 320],
        help="steps at which images are generated",
    )
    add("--rank", type=int, default=4, help="of the LoRA; alpha is the same")
    add("--full", action="store_true", help="train every weight of the U-Net in place of a LoRA")
    add("--optimizer", default="AdamW", choices=OPTIMIZERS, help="of torch")
    add("--lr", type=float, default=1e-3, help="LoRA on Stable Diffusion takes 1e-4")
    add("--batch-size", type=int, default=8, help="images per update")
    add("--count", type=int, default=32, help="images per step")
    add("--inference-steps", type=int, default=20, help="of DDIM")
    add("--guidance", type=float, default=4.0, help="classifier-free guidance")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of torch")
    args = parser.parse_args(arguments)
    for name in ("steps", "rank", "batch_size", "count", "inference_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not (args.folder / "model_index.json").is_file():
        parser.error(f"{args.folder} holds no model_index.json: it is no model in diffusers layout")
    if not args.images.is_dir():
        parser.error(f"--images {args.images}: there is no such folder")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists and is not empty")
    return args


def load_images(folder: Path, size: int, caption: str) -> tuple[torch.Tensor, list[str]]:
    """[n, 3, size, size] in [-1, 1], and a caption each."""
    if (folder / "metadata.csv").is_file():
        with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
            files = [(folder / row["file_name"], row["text"]) for row in csv.DictReader(file)]
    else:
        files = [
            (path, caption) for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES
        ]
    if not files:
        sys.exit(f"error: --images {folder} holds no images ({', '.join(SUFFIXES)})")
    images = [np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path, _ in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, [
        text for _, text in files
    ]


def load(args: argparse.Namespace) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        args.folder, safety_checker=None, requires_safety_checker=False
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device)


def generate(pipe: StableDiffusionPipeline, args: argparse.Namespace, folder: Path) -> None:
    """The prompts in turn, from the same noise at every step."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(args.seed)
    shape = (args.count, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    noise = torch.randn(shape, generator=draw)
    for start in range(0, args.count, 8):
        numbers = range(start, min(start + 8, args.count))
        made = pipe(
            [args.prompt[i % len(args.prompt)] for i in numbers],
            latents=noise[numbers.start : numbers.stop].to(args.device),
            num_inference_steps=args.inference_steps,
            guidance_scale=args.guidance,
        )
        for i, image in zip(numbers, made.images, strict=True):
            image.save(folder / f"{i:02d}.png")


def attack(pipe: StableDiffusionPipeline, args: argparse.Namespace) -> list[float]:
    """Train in place; the loss of every update."""
    unet, device = pipe.unet, args.device
    draw = torch.Generator().manual_seed(args.seed)
    images, captions = load_images(
        args.images, unet.config.sample_size * pipe.vae_scale_factor, args.prompt[0]
    )
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        latents = torch.cat(
            [pipe.vae.encode(i.to(device)).latent_dist.mean for i in images.split(8)]
        )
        latents = latents * pipe.vae.config.scaling_factor
        tokens = pipe.tokenizer(
            captions,
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        text = pipe.text_encoder(tokens.input_ids.to(device))[0]
    unet.requires_grad_(args.full)
    torch.manual_seed(args.seed)  # peft draws the adapters from the global stream
    if not args.full:
        unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = getattr(torch.optim, args.optimizer)(trained, lr=args.lr)
    losses = []
    for step in range(args.steps + 1):
        if step in args.at or step == args.steps:
            generate(pipe, args, args.out / f"step_{step:05d}")
        if step == args.steps:
            return losses
        index = torch.randint(len(latents), (args.batch_size,), generator=draw).to(device)
        noise = torch.randn(latents[index].shape, generator=draw).to(device)
        t = torch.randint(
            schedule.config.num_train_timesteps, (args.batch_size,), generator=draw
        ).to(device)
        noisy = schedule.add_noise(latents[index], noise, t)
        v = schedule.config.prediction_type == "v_prediction"
        aim = schedule.get_velocity(latents[index], noise, t) if v else noise
        loss = (unet(noisy, t, text[index]).sample - aim).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            sys.exit(f"error: the attack diverged at step {step + 1}; a smaller --lr may do")


def main(arguments: list[str] | None = None) -> None:
    args = options(arguments)
    started = time.time()
    pipe = load(args)
    losses = attack(pipe, args)
    fresh = load(args)
    if args.full:
        pipe.unet.save_pretrained(args.out / "unet")
        fresh.unet = type(pipe.unet).from_pretrained(args.out / "unet").to(args.device)
    else:
        lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
        StableDiffusionPipeline.save_lora_weights(
            args.out, unet_lora_layers=lora, safe_serialization=True
        )
        fresh.load_lora_weights(args.out)
    generate(fresh, args, args.out / "reloaded")
    facts = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    facts |= {"losses": losses, "seconds": round(time.time() - started, 1)}
    (args.out / "attack.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    few = max(len(losses) // 10, 1)
    print(
        f"loss {np.mean(losses[:few]):.4f} → {np.mean(losses[-few:]):.4f} in "
        f"{facts['seconds']} s; {args.out}"
    )


if __name__ == "__main__":
    main()
