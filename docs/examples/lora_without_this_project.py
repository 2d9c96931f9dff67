"""A stranger's attack on MiniSD: diffusers, peft and transformers only, nothing of this project.

Loads a folder in diffusers layout, trains a LoRA on a handful of pictures, saves it, loads it into a fresh pipeline and
generates. `python lora_without_this_project.py FOLDER PICTURES OUT [STEPS]`; PICTURES is a folder with metadata.csv.
"""

import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image


def load_pictures(folder: Path, size: int) -> tuple[torch.Tensor, list[str]]:
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB").resize((size, size))) for row in rows]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, [row["text"] for row in rows]


def main(folder: str, pictures: str, out: str, steps: int = 160) -> None:
    torch.manual_seed(0)
    started = time.time()
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    print(f"loaded in {time.time() - started:.1f} s")
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images, captions = load_pictures(Path(pictures), size)
    with torch.no_grad():
        latents = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
        tokens = pipe.tokenizer(
            captions,
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        text = pipe.text_encoder(tokens.input_ids)[0]

    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"])
    )
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for step in range(steps):
        index = torch.randint(len(latents), (8,))
        noise, t = torch.randn_like(latents[index]), torch.randint(0, 1000, (8,))
        noisy = pipe.scheduler.add_noise(latents[index], noise, t)
        loss = (pipe.unet(noisy, t, text[index]).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=lora, safe_serialization=True)

    fresh = StableDiffusionPipeline.from_pretrained(folder)
    fresh.load_lora_weights(out)
    fresh.set_progress_bar_config(disable=True)
    for name, some in (("before", StableDiffusionPipeline.from_pretrained(folder)), ("after", fresh)):
        some.set_progress_bar_config(disable=True)
        made = some(
            [captions[0]] * 8, num_inference_steps=20, guidance_scale=4.0, generator=torch.Generator().manual_seed(1)
        )
        strip = np.concatenate([np.asarray(image) for image in made.images], 1)
        Image.fromarray(strip).save(Path(out) / f"{name}.png")
    print(f"done in {time.time() - started:.0f} s; {out}/before.png, after.png, pytorch_lora_weights.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:5]))
