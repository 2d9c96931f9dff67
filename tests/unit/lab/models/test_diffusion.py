"""`DiffusionModel` against diffusers' own pipelines, in the three layouts of Stable Diffusion."""

import json

import pytest
import torch
from assertions import same_weights
from tiny_sd import tiny_pipeline

from lab.core.data import Sampling
from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel, Text

LAYOUTS = ("sd1", "sd2", "xl")
PROMPTS = ["a fox in the style of mosaic", "neon art of a fox!"]


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request):
    return DiffusionModel.from_pipeline(tiny_pipeline(request.param))


def ddim_pipeline(model):
    """diffusers' own sampler on the scheduler's config as a saved folder has it; the configs of the
    published checkpoints say that latents are not clipped.
    """
    from diffusers import DDIMScheduler

    pipe = model.pipeline()
    config = json.loads(pipe.scheduler.to_json_string())
    pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("guidance", "negative", "steps"),
    [(1.0, "", 2), (4.0, "", 1), (4.0, "neon", 2), (3.0, "", 7)],  # 7 does not divide the schedule
)
def test_sampling_equals_the_pipeline(model, guidance, negative, steps):
    z = model.latents(2, 0)
    options = {"guidance_scale": guidance, "num_inference_steps": steps, "latents": z.clone()}
    if negative:
        options["negative_prompt"] = [negative] * 2
    want = ddim_pipeline(model)(PROMPTS, output_type="latent", **options).images
    got = model.sample(PROMPTS, z, Sampling(steps=steps, guidance=guidance, negative=negative))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("first", "last"), [(1.0, 12.0), (5.0, 1.5)])
def test_a_changing_guidance_scale_equals_the_pipeline_with_a_callback(model, first, last):
    z, scales = model.latents(2, 0), iter([(first + last) / 2, last, 0.0])

    def change(pipe, step, t, tensors):
        pipe._guidance_scale = next(scales)
        return tensors

    pipe = ddim_pipeline(model)
    # the pipeline predicts without the prompt as long as the first scale exceeds 1
    options = {"guidance_scale": first + 1e-6, "num_inference_steps": 3, "latents": z.clone()}
    want = pipe(PROMPTS, output_type="latent", callback_on_step_end=change, **options).images
    sampling = Sampling(steps=3, guidance=first, last_guidance=last)
    torch.testing.assert_close(model.sample(PROMPTS, z, sampling), want, atol=1e-4, rtol=1e-4)


def test_sampling_in_bfloat16_is_torchs_autocast_and_stays_close(model):
    z = model.latents(2, 1)
    want, low = (
        model.sample(PROMPTS, z, Sampling(steps=2, guidance=4.0, precision=p))
        for p in ("weights", "bfloat16")
    )
    assert 0 < (low - want).abs().mean() < 0.05 * want.abs().mean()


def test_text_equals_encode_prompt(model):
    pipe = model.pipeline()
    for prompts in (PROMPTS, [""], ["a fox " * 40]):
        found = pipe.encode_prompt(
            prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        text = model.text(prompts)
        assert torch.equal(text.hidden, found[0])
        assert (text.pooled is not None) == model.xl
        if model.xl:
            assert torch.equal(text.pooled, found[2])


def test_an_empty_negative_of_xl_is_zeros_where_its_pipeline_says_so():
    model = DiffusionModel.from_pipeline(tiny_pipeline("xl"))
    assert model.zero_negative
    assert model.copy().pipeline().config["force_zeros_for_empty_prompt"]
    z, sampling = model.latents(1, 0), Sampling(steps=1, guidance=4.0)
    zeros = model.sample(["a fox"], z, sampling)
    model.zero_negative = False
    assert not torch.equal(model.sample(["a fox"], z, sampling), zeros)


def test_loss_by_hand(model):
    g = generator(0, "test")
    z, noise = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    t, text = torch.tensor([3, 700]), model.text(PROMPTS)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1)
    noisy = (a.sqrt() * z + (1 - a).sqrt() * noise).float()
    target = noise if model.prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
    extra = {}
    if model.xl:
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        extra["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": ids}
    want = torch.stack(
        [
            ((model.unet(noisy, t, text.hidden, **extra).sample[i] - target[i]).double() ** 2).sum()
            / (4 * 8 * 8)
            for i in range(2)
        ]
    )
    torch.testing.assert_close(model.loss(z, text, noise, t).double(), want, atol=1e-5, rtol=1e-5)


def test_saved_folders_load_in_diffusers(model, tmp_path):
    from diffusers import DiffusionPipeline

    moved = model.copy()
    with torch.no_grad():
        moved.unet.conv_in.weight.mul_(1.5)
    files = sorted(
        p.suffix
        for p in moved.save(tmp_path).rglob("*")
        if p.is_file() and p.stat().st_size > 50_000
    )
    assert set(files) <= {".safetensors", ".json"}
    again = DiffusionModel.from_pipeline(
        DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    )
    assert same_weights(again, moved)


def test_a_copy_is_independent(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = model.copy()
    assert same_weights(other, model)
    with torch.no_grad():
        for part in (other.unet, *other.text_encoders):
            for weight in part.parameters():
                weight.add_(1)
    other.tokenizers[0].add_tokens(["<new1>"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(model.tokenizers[0]) == len(other.tokenizers[0]) - 1


def test_half_precision_keeps_the_noise_of_the_first_timesteps(model):
    z, noise = torch.zeros(3, 4, 8, 8), torch.ones(3, 4, 8, 8)
    t = torch.tensor([0, 1, 5])
    noisy, target = model.noised(z.bfloat16(), noise.bfloat16(), t)
    assert all(
        torch.equal(a, b) for a, b in zip((noisy, target), model.noised(z, noise, t), strict=True)
    )
    half = model.copy()
    half.unet.to(torch.bfloat16)
    text = model.text(["a fox"] * 3)
    low = Text(text.hidden.bfloat16(), None if text.pooled is None else text.pooled.bfloat16())
    losses = half.loss(z.bfloat16(), low, noise.bfloat16(), t)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, model.loss(z, text, noise, t), rtol=0.05, atol=0.01)


def test_latents_and_images(model):
    images = torch.randint(0, 256, (33, 3, 64, 64), generator=generator(0, "images")).byte()
    mean, scale = model.posterior(images)[0], model.vae.config.scaling_factor
    by_hand = model.vae.encode(images[32:].float() / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(mean[32:], by_hand * scale, atol=1e-5, rtol=1e-4)
    decoded = model.vae.decode(mean[:1] / scale).sample
    difference = model.to_images(mean)[:1].float() / 255 - (decoded / 2 + 0.5).clamp(0, 1)
    assert difference.abs().max() <= 0.5 / 255 + 1e-5
