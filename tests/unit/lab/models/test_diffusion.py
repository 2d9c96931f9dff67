"""`DiffusionModel` against diffusers' own pipelines, in the three layouts of Stable Diffusion."""

import json
import logging

import pytest
import torch
from tiny_diffusion import tiny_diffusion
from tiny_sd import tiny_pipeline

from lab.core.data import Sampling
from lab.core.errors import UserError
from lab.core.prompts import warn_cut
from lab.core.seeding import generator
from lab.core.types import same_weights
from lab.models import devices
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


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("negative", ["", "neon"])
def test_sampling_equals_the_pipeline(model, guidance, negative):
    z = model.latents(2, 0)
    options = {"guidance_scale": guidance, "num_inference_steps": 2, "latents": z.clone()}
    if negative:
        options["negative_prompt"] = [negative] * 2
    want = ddim_pipeline(model)(PROMPTS, output_type="latent", **options).images
    got = model.sample(PROMPTS, z, Sampling(steps=2, guidance=guidance, negative=negative))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_one_step_and_steps_that_do_not_divide_the_schedule(model):
    z = model.latents(2, 3)
    for steps in (1, 7):
        options = {
            "guidance_scale": 3.0,
            "num_inference_steps": steps,
            "latents": z.clone(),
            "output_type": "latent",
        }
        want = ddim_pipeline(model)(PROMPTS, **options).images
        torch.testing.assert_close(
            model.sample(PROMPTS, z, Sampling(steps, 3.0)), want, atol=1e-4, rtol=1e-4
        )


def test_pictures_equal_the_pipeline(model):
    z = model.latents(2, 1)
    options = {"guidance_scale": 4.0, "num_inference_steps": 2, "latents": z.clone()}
    want = ddim_pipeline(model)(PROMPTS, output_type="pt", **options).images
    got = model.generate(PROMPTS, z, Sampling(steps=2, guidance=4.0), batch=1)
    assert got.dtype == torch.uint8
    assert got.shape == (2, 3, 64, 64)
    assert (
        got.float() / 255 - want
    ).abs().max() <= 0.5 / 255 + 1e-4  # nothing but the rounding to 8 bits


def test_sampling_in_bfloat16_is_torchs_autocast_and_stays_close(model):
    z = model.latents(2, 1)
    want, low = (
        model.sample(PROMPTS, z, Sampling(2, 4.0, precision=p)) for p in ("weights", "bfloat16")
    )
    assert low.dtype == z.dtype
    assert 0 < (low - want).abs().mean() < 0.05 * want.abs().mean()
    assert torch.equal(low, model.sample(PROMPTS, z, Sampling(2, 4.0, precision="bfloat16")))
    assert not torch.is_autocast_enabled("cpu")


def test_a_processor_that_emulates_bfloat16_is_told_of_once(monkeypatch, caplog):
    model = DiffusionModel.from_pipeline(tiny_pipeline("sd1"))
    for native, told in ((True, 0), (False, 1)):
        monkeypatch.setattr(devices, "computes_bfloat16", lambda kind, native=native: native)
        devices.warn_of_emulation.cache_clear()
        for _ in range(2):
            model.sample(PROMPTS[:1], model.latents(1, 0), Sampling(1, precision="bfloat16"))
        assert caplog.text.count("scenario.sampling.precision=weights saves the time") == told
    devices.warn_of_emulation.cache_clear()


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
    got = model.loss(z, text, noise, t)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    swapped = {name: 0.5 * weight for name, weight in model.unet.named_parameters()}
    halved = model.copy()
    halved.unet.load_state_dict({**halved.unet.state_dict(), **swapped})
    torch.testing.assert_close(
        model.loss(z, text, noise, t, swapped), halved.loss(z, text, noise, t)
    )


def test_other_predictions_are_refused(model):
    other = model.copy()
    other.scheduler = type(model.scheduler).from_config(
        model.scheduler.config, prediction_type="sample"
    )
    with pytest.raises(UserError, match="epsilon or v_prediction"):
        other.noised(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([1]))


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
    z, sampling = model.latents(1, 0), Sampling(steps=1, guidance=4.0)
    want = moved.sample(
        ["a fox!"], z, sampling
    )  # bits differ: weights of a mapped file are aligned otherwise
    torch.testing.assert_close(again.sample(["a fox!"], z, sampling), want, atol=1e-5, rtol=1e-5)
    assert (again.prediction, again.image_size, again.xl) == (
        model.prediction,
        model.image_size,
        model.xl,
    )


def test_a_copy_is_independent(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = model.copy()
    assert same_weights(other, model)
    assert other.vae is model.vae
    with torch.no_grad():
        for part in (other.unet, *other.text_encoders):
            for weight in part.parameters():
                weight.add_(1)
    other.tokenizers[0].add_tokens(["<new1>"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(model.tokenizers[0]) == len(other.tokenizers[0]) - 1
    assert not any(weight.requires_grad for weight in other.parameters())
    pipe = model.pipeline()
    pipe.scheduler.set_timesteps(3)
    assert pipe.scheduler is not model.scheduler


def test_half_precision_keeps_the_noise_of_the_first_timesteps(model):
    z, noise = torch.zeros(3, 4, 8, 8), torch.ones(3, 4, 8, 8)
    t = torch.tensor([0, 1, 5])
    noisy, target = model.noised(z.bfloat16(), noise.bfloat16(), t)
    assert all(
        torch.equal(a, b) for a, b in zip((noisy, target), model.noised(z, noise, t), strict=True)
    )
    assert (noisy > 0).all()
    half = model.copy()
    half.unet.to(torch.bfloat16)
    text = model.text(["a fox"] * 3)
    low = Text(text.hidden.bfloat16(), None if text.pooled is None else text.pooled.bfloat16())
    losses = half.loss(z.bfloat16(), low, noise.bfloat16(), t)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, model.loss(z, text, noise, t), rtol=0.05, atol=0.01)


def test_latents_and_pictures(model):
    images = torch.randint(0, 256, (33, 3, 64, 64), generator=generator(0, "images")).to(
        torch.uint8
    )
    mean = model.to_latents(images)
    assert mean.shape == (33, 4, 8, 8)
    by_hand = model.vae.encode(images[32:].float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(
        mean[32:], by_hand.mean * model.vae.config.scaling_factor, atol=1e-5, rtol=1e-4
    )
    pictures = model.to_images(mean)
    assert pictures.dtype == torch.uint8
    assert torch.equal(pictures[32:], model.to_images(mean[32:]))
    decoded = model.vae.decode(mean[:1] / model.vae.config.scaling_factor).sample
    assert (
        pictures[:1].float() / 255 - (decoded / 2 + 0.5).clamp(0, 1)
    ).abs().max() <= 0.5 / 255 + 1e-5


def test_start_latents_depend_on_seed_and_stream_only():
    model = tiny_diffusion()
    assert torch.equal(model.latents(2, 0, "a"), model.latents(2, 0, "a"))
    assert not torch.equal(model.latents(2, 0, "a"), model.latents(2, 0, "b"))
    assert not torch.equal(model.latents(2, 0, "a"), model.latents(2, 1, "a"))
    assert torch.equal(model.latents(4, 0, "a")[:2], model.latents(2, 0, "a"))


def test_a_half_precision_autoencoder_may_stay_in_float32():
    model = tiny_diffusion(dtype=torch.bfloat16)
    model.vae.to(torch.float32)
    z = model.to_latents(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert z.dtype == torch.bfloat16
    assert model.generate(["a fox"], model.latents(1, 0), Sampling(steps=1)).shape == (1, 3, 32, 32)


# ---- prompts


def test_a_long_prompt_is_cut_and_told_once(caplog):
    model, long = tiny_diffusion(), "a fox " * 40
    warn_cut.cache_clear()
    context = model.tokenizers[0].model_max_length
    with caplog.at_level(logging.WARNING):
        ids = model.tokens([long, "a fox"])
        model.tokens([long])
    assert ids.shape == (2, context)
    assert [r for r in caplog.records if "cut to the context" in r.message] == caplog.records
    assert len(caplog.records) == 1
    lost = len(model.tokenizers[0](long).input_ids) - context
    assert f"last {lost} tokens" in caplog.text
