"""One exact step at the size of SD v1-4: ``python tests/benchmarks/sd_size.py``.

Random weights in the full layout (U-Net 860 M, CLIP ViT-L/14 text encoder), two concepts, attn2 on
both levels, K = 1, 16 × 16 latents, batch 1, float32; prints time and peak memory. Needs about 10
GB. ``--savings`` prints instead, a fresh process per row, what the options that save memory save
and cost, for one and three lower steps: ``--checkpoint`` (gradient checkpointing) and
``--recompute`` (`immunize.hypergradient.recompute`). ``--captions``: of C_reg; the paper has 200.
``--steps``: K, lower steps.
"""

import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from options import parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from immunize.gradients import checkpointed
from immunize.merge.build import scope_names
from immunize.merge.closed_form import Merge, factorize
from immunize.mima.hypergradient import HypergradientOptions, hypergradient
from immunize.mima.inner_loop import InnerLoop, InnerLoopOptions

UNET = {  # CompVis/stable-diffusion-v1-4, unet/config.json
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "up_block_types": (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    ),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TEXT = {  # openai/clip-vit-large-patch14, text_config
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}


def savings(threads):
    """Prints a row per way to save memory."""
    for steps in (1, 3):
        for way in ([], ["--checkpoint"], ["--recompute"], ["--checkpoint", "--recompute"]):
            words = ["--steps", str(steps), *way]
            command = [sys.executable, __file__, "--threads", str(threads), *words]
            lines = subprocess.run(
                command, check=True, capture_output=True, text=True
            ).stdout.splitlines()
            told = [line for line in lines if line.startswith(("one exact step", "peak memory"))]
            print(f"{' '.join(words):40s} {'; '.join(told)}", flush=True)
    return 0


def main():
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from torch.func import functional_call
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"concepts": 2, "latent": 16, "captions": 20, "steps": 1, "threads": 1}
    options = parse(__doc__, **sizes, checkpoint=False, recompute=False, savings=False)
    if options.savings:
        return savings(options.threads)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(**TEXT)).requires_grad_(False).eval()
    unet = UNet2DConditionModel(**UNET).requires_grad_(False).eval()
    millions = sum(p.numel() for p in unet.parameters()) / 1e6
    theta = {x: p.detach() for x, p in unet.named_parameters() if ".attn2." in x}
    with torch.no_grad():
        ids = torch.randint(0, 49406, (options.captions + options.concepts, 77))
        hidden = torch.cat([text(some)[0] for some in ids.split(8)])
    words, regular = hidden[: options.concepts], hidden[options.concepts :].flatten(0, 1)
    rows = tuple(w[5:9] for w in words)
    merge = Merge(
        len(rows),
        {"text": factorize(rows, regular, lam=0.01).to(regular)},
        {x: "text" for x in scope_names(unet, "kv")},
    )
    alphas = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    side = options.latent
    z, noise = (torch.randn(options.concepts, 2, 1, 4, side, side) for _ in range(2))
    t = torch.randint(0, 1000, (options.concepts, 2, 1))

    def loss(params, n, level):
        a = alphas[t[n, level]].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z[n, level] + (1 - a).sqrt() * noise[n, level]
        found = functional_call(unet, params, (noisy, t[n, level], words[n : n + 1])).sample
        return (found - noise[n, level]).square().mean()

    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start, cpu = time.perf_counter(), time.process_time()
    with checkpointed(unet) if options.checkpoint else nullcontext():
        settings, names = InnerLoopOptions(lr=1e-2, steps=options.steps), list(theta)
        inner = [
            InnerLoop(settings, theta, names, lambda p, k, n=n: loss(p, n, 0), n)
            for n in range(options.concepts)
        ]
        method = HypergradientOptions(recompute=options.recompute)
        found = hypergradient(theta, inner, lambda p, n: -loss(p, n, 1), merge, names, method)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"U-Net {millions:.0f} M parameters, "
        f"{sum(x.numel() for x in theta.values()) / 1e6:.0f} M of them in attn2"
    )
    print(
        f"one exact step, N = {options.concepts}: {time.perf_counter() - start:.0f} s, "
        f"{time.process_time() - cpu:.0f} s CPU"
    )
    print(f"peak memory {peak:.2f} GiB, {loaded:.2f} GiB before the step")
    print(
        f"inner-loop drop {found.inner_loop_drop}, cosine with first order {found.cosine:.4f}, "
        f"merge {found.info}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
