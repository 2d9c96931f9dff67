"""Tiny pipelines with random weights in the layouts of Stable Diffusion 1.x, 2.x (v-prediction) and
XL.
"""

import tempfile
from functools import cache
from typing import Any, Literal

import torch
from tiny_diffusion import tokenizer

from lab.minisd.train.networks import CONTEXT

Layout = Literal["sd1", "sd2", "xl"]
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


@cache
def bang_tokenizer() -> Any:
    """Pads with "!", as SD 2.x and the second tokenizer of XL do."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer().save_pretrained(folder)
        return CLIPTokenizer.from_pretrained(folder, pad_token="!")


def text_config(width: int, **options: Any) -> Any:
    from transformers import CLIPTextConfig

    size = len(tokenizer())
    return CLIPTextConfig(
        **{
            "vocab_size": size,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": size - 2,
            "eos_token_id": size - 1,
            "pad_token_id": size - 1,
            **options,
        }
    )


def unet(layout: Layout) -> Any:
    from diffusers import UNet2DConditionModel

    shared: dict[str, Any] = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4}
    if layout == "xl":
        return UNet2DConditionModel(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", DOWN, DOWN),
            up_block_types=(UP, UP, "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
            cross_attention_dim=16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 20,
            **shared,
        )
    return UNet2DConditionModel(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=(DOWN, DOWN, DOWN, "DownBlock2D"),
        up_block_types=("UpBlock2D", UP, UP, UP),
        attention_head_dim=2 if layout == "sd1" else (2, 2, 4, 4),
        use_linear_projection=layout == "sd2",
        cross_attention_dim=16,
        **shared,
    )


def vae(layout: Layout) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025 if layout == "xl" else 0.18215,
    )


def tiny_pipeline(layout: Layout, seed: int = 0) -> Any:
    """Images of 64 × 64 pixels, latents of 4 × 8 × 8."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {"unet": unet(layout), "vae": vae(layout)}
        if layout == "xl":
            second = text_config(24, projection_dim=20, hidden_act="gelu")
            return diffusers.StableDiffusionXLPipeline(
                text_encoder=CLIPTextModel(text_config(16)),
                text_encoder_2=CLIPTextModelWithProjection(second),
                tokenizer=tokenizer(),
                tokenizer_2=bang_tokenizer(),
                scheduler=diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
                add_watermarker=False,
                **parts,
            )
        config = (
            text_config(16)
            if layout == "sd1"
            else text_config(16, hidden_act="gelu", projection_dim=12)
        )
        plain = diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True)
        v = diffusers.DDIMScheduler(
            **NOISE, prediction_type="v_prediction", set_alpha_to_one=False, clip_sample=False
        )
        return diffusers.StableDiffusionPipeline(
            text_encoder=CLIPTextModel(config),
            tokenizer=tokenizer() if layout == "sd1" else bang_tokenizer(),
            scheduler=plain if layout == "sd1" else v,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
