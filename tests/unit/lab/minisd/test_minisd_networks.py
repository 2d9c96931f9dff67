"""MiniSD's networks: the training loop against hand-written AdamW and averages, resumed and whole,
the losses by hand, and the tokenizer against CLIP's format.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from assertions import same_weights
from attack_examples import Interrupted
from tiny_diffusion import TINY
from torch import nn
from torch.distributions import Normal, kl_divergence

from lab.core.cache import StageCheckpoint
from lab.core.errors import Diverged
from lab.core.seeding import generator
from lab.minisd.train import networks
from lab.minisd.train.networks import (
    Schedule,
    encode,
    min_snr,
    to_float,
    train,
    train_denoiser,
    train_vae,
)
from lab.minisd.train.text import TextImageNetwork, train_text
from lab.minisd.world import captions as world_captions
from lab.minisd.world.vocabulary import PHOTO, STYLE, THING
from lab.minisd.world.world import TRAINING, Subset, sample

SHORT = Schedule(steps=12, batch=1, lr=0.1, warmup=3, weight_decay=0.5, ema=0.9, clip=1.0)


class Disk(StageCheckpoint):
    """The checkpoint of the stage cache; raises right after the state of step ``kill`` was
    written.
    """

    def __init__(self, path, kill=None):
        super().__init__(path)
        self.kill = kill

    def save(self, tensors, values):
        super().save(tensors, values)
        if values["step"] == self.kill:
            raise Interrupted


class Two(nn.Module):
    """One parameter that decays (a matrix) and one that does not (a scalar)."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def loss(self):
        return 3 * (self.matrix.sum() - 1).square() + (self.scalar - 2).square()


def by_hand(schedule):
    """Live and averaged weights after every step, in plain floats (AdamW: arXiv 1711.05101,
    Algorithm 2).
    """
    w, average = [2.0, -1.0], [2.0, -1.0]
    m, v = [0.0, 0.0], [0.0, 0.0]
    live, averaged = [], []
    for t in range(schedule.steps):
        g = [6 * (w[0] - 1), 2 * (w[1] - 2)]
        g = [x * min(1.0, schedule.clip / (math.hypot(*g) + 1e-6)) for x in g]
        for i, decay in enumerate((schedule.weight_decay, 0.0)):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g[i], 0.999 * v[i] + 0.001 * g[i] ** 2
            rise, fall = m[i] / (1 - 0.9 ** (t + 1)), v[i] / (1 - 0.999 ** (t + 1))
            w[i] -= schedule.rate(t) * (decay * w[i] + rise / (math.sqrt(fall) + 1e-8))
        keep = min(schedule.ema, (1 + t) / (10 + t))
        average = [keep * a + (1 - keep) * x for a, x in zip(average, w, strict=True)]
        live.append(list(w))
        averaged.append(average)
    return live, averaged


def weights(model):
    return [model.matrix.item(), model.scalar.item()]


@pytest.mark.parametrize("ema", [0.0, 0.3, 0.9])
def test_weights_and_average_by_hand(ema):
    """Live weights at every step, and the average that the model ends with; without EMA these are
    the last ones.
    """
    schedule = replace(SHORT, ema=ema)
    live, averaged = by_hand(schedule)
    model, seen = Two(), []

    def step(number, g):
        seen.append(weights(model))
        return model.loss()

    train(model, step, schedule, seed=0, label="two")
    for here, expected in zip(seen[1:], live[:-1], strict=True):
        assert here == pytest.approx(expected, rel=1e-6)
    assert weights(model) == pytest.approx(averaged[-1], rel=1e-6)
    assert not model.training
    if ema == 0:
        assert averaged[-1] == live[-1]


@pytest.fixture
def often(monkeypatch):
    """Validate every five steps and save every step."""
    monkeypatch.setattr(networks, "_VALIDATE_EVERY", 5)
    monkeypatch.setattr(networks, "_SAVE_SECONDS", 0.0)


def test_validation_sees_the_average(often):
    model, averaged = Two(), by_hand(SHORT)[1]

    def validate(average):
        assert not average.training
        assert not torch.is_grad_enabled()
        return {"matrix": average.matrix.item()}

    loss = model.loss
    rows = train(model, lambda n, g: loss(), SHORT, seed=0, label="two", validate=validate)
    by_step = {row["step"]: row["matrix"] for row in rows}
    assert by_step == pytest.approx({n: averaged[n - 1][0] for n in (5, 10, 12)}, rel=1e-6)


def image_model():
    """Channels last, as the trained networks are, with buffers of both types (batch norm)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 3))
    model.idle = nn.Parameter(torch.ones(2))  # never gets a gradient
    return model.to(memory_format=torch.channels_last)


def fit(checkpoint=None):
    model, drawn = image_model(), []
    schedule = Schedule(steps=60, batch=2, lr=1e-2, warmup=5, ema=0.9)

    def step(number, g):
        x = torch.randn(2, 3, 8, 8, generator=g)
        drawn.append(x.sum().item())
        return (model(x) - 1).square().mean()

    rows = train(
        model,
        step,
        schedule,
        seed=3,
        label="fit",
        checkpoint=checkpoint,
        validate=lambda average: {"bias": average[0].bias.mean().item()},
    )
    return model, drawn, rows


@pytest.mark.parametrize("kill", [1, 20, 51])
def test_killed_training_is_the_unbroken_one(tmp_path, often, kill):
    """Weights, buffers, drawn data and every row of the log, through the files of the stage
    cache.
    """
    unbroken, drawn, rows = fit()
    path = tmp_path / "state.ckpt"
    with pytest.raises(Interrupted):
        fit(Disk(path, kill))
    resumed, rest, resumed_rows = fit(Disk(path))
    assert rest == drawn[kill:]
    assert same_weights(resumed, unbroken)
    assert resumed[1].num_batches_tracked.item() == 60
    assert resumed_rows == rows


def test_rate():
    """Linear over the warm-up, then half a cosine to 0."""
    schedule = Schedule(steps=110, batch=1, lr=2.0, warmup=10)
    assert [schedule.rate(i) for i in range(10)] == pytest.approx(
        [0.2 * (i + 1) for i in range(10)]
    )
    assert (schedule.rate(60), schedule.rate(110)) == (pytest.approx(1.0), pytest.approx(0.0))


def test_diverged():
    model = Two()
    with pytest.raises(Diverged, match="two: the loss is") as caught:
        train(
            model,
            lambda n, g: model.loss() * (math.nan if n == 3 else 1),
            SHORT,
            seed=0,
            label="two",
        )
    assert caught.value.step == 2


# ---- networks and their losses


@pytest.fixture(scope="module")
def shown():
    return sample(TRAINING, 0, 24)


# parts


def test_parts_are_stable_diffusions_and_follow_the_seed():
    vae, unet, text = (
        networks.build_vae(TINY, 0),
        networks.build_unet(TINY, 0),
        networks.build_text_encoder(TINY, 600, 0),
    )
    z = vae.encode(torch.zeros(2, 3, 64, 64)).latent_dist.mean
    assert z.shape == (2, 4, 16, 16)
    assert vae.decode(z).sample.shape == (2, 3, 64, 64)
    hidden = text(torch.full((2, 32), 599))[0]
    assert hidden.shape == (2, 32, TINY.text)
    assert unet(z, torch.tensor([0, 999]), hidden).sample.shape == z.shape
    for make in (
        networks.build_vae,
        networks.build_unet,
        lambda w, s: networks.build_text_encoder(w, 600, s),
    ):
        assert same_weights(make(TINY, 1), make(TINY, 1))
        assert not same_weights(make(TINY, 1), make(TINY, 2))


def test_scheduler_is_stable_diffusions():
    """Scaled linear: √β runs evenly from √0.00085 to √0.012."""
    alphas = networks.build_scheduler().alphas_cumprod
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert torch.allclose(alphas.double(), (1 - betas).cumprod(0), atol=1e-5)


# losses


def test_min_snr_by_hand():
    """SNR = ᾱ / (1 − ᾱ): 1, 9 and 1/3; clipped at 5 and at 1/2."""
    alphas = torch.tensor([0.5, 0.9, 0.25])
    assert min_snr(alphas, 5.0).tolist() == pytest.approx([1, 5 / 9, 1], rel=1e-5)
    assert min_snr(alphas, 0.5).tolist() == pytest.approx([0.5, 0.5 / 9, 1], rel=1e-5)


def test_vae_loss_and_validation_by_hand(shown):
    """Absolute error plus kl × divergence per pixel value (against torch's own KL); PSNR of [0, 1]
    images.
    """
    model, kl, seed = networks.build_vae(TINY, 0), 2.5, 7
    g = generator(seed, "vae", 0)
    x = shown.images[torch.randint(24, (3,), generator=g)].float() / 127.5 - 1
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
        unit = Normal(torch.zeros_like(z), torch.ones_like(z))
        divergence = (
            kl_divergence(Normal(posterior.mean, posterior.std), unit).sum() / 3 / (3 * 64 * 64)
        )
        expected = (model.decode(z).sample - x).abs().mean() + kl * divergence
    tiny = Schedule(steps=1, batch=3, lr=1e-12)
    (row,) = train_vae(model, shown.images, shown.images[:5], tiny, kl=kl, seed=seed)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-4)
    with torch.no_grad():
        y = model.decode(model.encode(to_float(shown.images[:5])).latent_dist.mean).sample.clamp(
            -1, 1
        )
    wrong = (y / 2 + 0.5 - shown.images[:5] / 255).double()
    psnr = sum(-10 * math.log10(w.square().mean().item()) for w in wrong) / 5
    assert row["psnr"] == pytest.approx(psnr, rel=1e-3)


def test_encode_gives_the_posterior(shown):
    model = networks.build_vae(TINY, 0)
    mean, deviation = encode(model, shown.images)
    with torch.no_grad():
        posterior = model.encode(to_float(shown.images)).latent_dist
    assert torch.allclose(mean.float(), posterior.mean, atol=2e-3, rtol=2e-3)
    assert torch.allclose(deviation.float(), posterior.std, atol=2e-3, rtol=2e-3)


def test_folded_scale_changes_latents_and_nothing_else(shown):
    plain = networks.build_vae(TINY, 0)
    folded = networks.build_vae(TINY, 0)
    networks.fold_scale(folded, 0.2)
    x = to_float(shown.images[:4])
    with torch.no_grad():
        before, after = (vae.encode(x).latent_dist for vae in (plain, folded))
        assert torch.allclose(after.mean, 0.2 * before.mean, atol=1e-5)
        assert torch.allclose(after.std, 0.2 * before.std, rtol=1e-4)
        images = [vae.decode(z).sample for vae, z in ((plain, before.mean), (folded, after.mean))]
    assert torch.allclose(*images, atol=1e-4)
    assert folded.config.scaling_factor == 1


@pytest.mark.slow  # a training
def test_text_encoder_learns_what_images_show(tokenizer):
    """Texts are found by their images after a few steps, and by chance before."""
    data = sample(Subset(("fox", "banana"), (PHOTO, "neon"), two_share=0.0), 0, 64)
    model = TextImageNetwork(networks.build_text_encoder(TINY, len(tokenizer), 0), 0)
    captions = [p.captions(2) for p in data.pictures]
    schedule = Schedule(steps=100, batch=16, lr=3e-3, warmup=5)
    rows = train_text(model, tokenizer, data, captions, data, schedule, seed=0)
    assert rows[-1]["object"] > 0.9
    assert rows[-1]["style"] > 0.9
    assert rows[-1]["photo_object"] > 0.9


class _Fixed(nn.Module):
    """Stands for the denoiser: predicts ``value`` everywhere; the inputs of all copies are kept."""

    inputs = []

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, noisy, t, tokens):
        self.inputs.append((noisy, t, tokens))
        return self.value.expand_as(noisy)


def _latents(n, seed=0):
    g = generator(seed, "test latents")
    return 3 * torch.randn(n, 4, 4, 4, generator=g) + 1, torch.rand(n, 4, 4, 4, generator=g) + 0.5


def _fit(model, tokenizer, schedule, *, drop=0.0):
    texts = [["a fox", "a lion"]] * 8
    model.inputs.clear()
    return train_denoiser(
        model,
        tokenizer,
        networks.build_scheduler(),
        _latents(8),
        texts,
        (_latents(6, 1), ["a fox"] * 6),
        schedule,
        gamma=5.0,
        drop=drop,
        seed=5,
    )[-1]


def test_denoiser_loss_and_validation_by_hand(tokenizer):
    """With a model that says 0 the loss is the weighted mean square of the noise; latents have unit
    variance.
    """
    model = _Fixed(0.0)
    mean, deviation = _latents(8)
    row = _fit(model, tokenizer, Schedule(steps=1, batch=64, lr=1e-12))
    total = mean.double().var(correction=0) + deviation.double().square().mean()
    assert model.scale.item() == pytest.approx(total.item() ** -0.5, rel=1e-4)

    alphas = networks.build_scheduler().alphas_cumprod
    noisy, t, _ = model.inputs[0]
    g = generator(5, "denoiser", 0)
    index = torch.randint(8, (64,), generator=g)
    z = model.scale * (mean[index] + deviation[index] * torch.randn(64, 4, 4, 4, generator=g))
    a = alphas[t].view(-1, 1, 1, 1)
    noise = (noisy - a.sqrt() * z) / (1 - a).sqrt()
    snr = alphas[t] / (1 - alphas[t])
    expected = (snr.clamp(max=5) / snr * noise.square().mean((1, 2, 3))).mean()
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-2)

    noisy, t, _ = model.inputs[-1]
    z, a = model.scale * _latents(6, 1)[0], alphas[t].view(-1, 1, 1, 1)
    square = ((noisy - a.sqrt() * z) / (1 - a).sqrt()).square().mean((1, 2, 3))
    assert row["validation_loss"] == pytest.approx(square.mean().item(), rel=1e-2)
    weighted = (min_snr(alphas, 5.0)[t] * square).mean().item()
    assert row["validation_weighted"] == pytest.approx(weighted, rel=1e-2)


def test_captions_are_drawn_and_dropped(tokenizer):
    """Both captions of an image come up equally often; the empty one as often as ``drop`` says."""
    model = _Fixed(0.0)
    _fit(model, tokenizer, Schedule(steps=4, batch=256, lr=1e-12), drop=0.25)
    ids = torch.cat([tokens for _, _, tokens in model.inputs[:4]])
    empty, fox, lion = networks.tokenize(tokenizer, ["", "a fox", "a lion"])
    shares = [(ids == row).all(1).float().mean().item() for row in (empty, fox, lion)]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx(0.25, abs=0.05)  # 3.7 standard errors
    assert shares[1] == pytest.approx(0.375, abs=0.06)


# ---- the tokenizer


def world_prompts() -> list[str]:
    """Every single-object caption of the world: all things, all styles (photo included), all ways
    to ask.
    """
    styles = (PHOTO, *STYLE)
    return [
        text
        for thing in THING.values()
        for style in styles
        for by in ("name", "description", "both")
        for text in world_captions.prompts(world_captions.noun(thing.name), style, by)
    ]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("words") / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return networks.train_tokenizer(world_prompts(), tokenizer_folder, 1280)


FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def test_same_texts_same_files(tmp_path):
    """Order and repetitions do not matter, any other text does."""
    texts = world_prompts()[:200]
    lists = texts, [*reversed(texts), texts[0]], [*texts, "zebra zebra", "zebra crossing"]
    written = []
    for number, words in enumerate(lists):
        networks.train_tokenizer(words, tmp_path / str(number), 1000)
        written.append([(tmp_path / str(number) / name).read_bytes() for name in FILES])
    assert written[0] == written[1]
    assert written[0][0] != written[2][0]


def test_format_is_clips(tokenizer_folder, tokenizer):
    """The ids lie as in CLIP: 256 bytes, 256 bytes that end a word, one id per merge, start,
    end.
    """
    vocab = json.loads((tokenizer_folder / "vocab.json").read_text())
    merges = (tokenizer_folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert len(vocab) == len(tokenizer) == 512 + len(merges[1:]) + 2
    by_id = {i: token for token, i in vocab.items()}
    assert all(len(by_id[i]) == 1 and by_id[256 + i] == f"{by_id[i]}</w>" for i in range(256))
    assert [by_id[512 + i] for i in range(len(merges) - 1)] == [
        m.replace(" ", "") for m in merges[1:]
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(vocab) - 2, len(vocab) - 1)


@pytest.mark.parametrize(
    "text",
    [
        "žluťoučký kůň",
        "🦊 and 🦄🏽",
        "x=3.14%!?",
        "\x01 \x7f",
    ],
)
def test_any_text_round_trips(tokenizer, text):
    """Nothing is unknown: the pieces of any text are bytes that give it back."""
    ids = tokenizer(text).input_ids
    assert tokenizer.eos_token_id not in ids[1:-1]  # the end token doubles as "unknown"
    squeezed = "".join(text.split())
    back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(back.split()) == squeezed


def test_tokenize_pads_with_the_end_and_cuts_as_stable_diffusion_does(tokenizer):
    ids = networks.tokenize(tokenizer, ["", "a fox", "fox " * 60])
    sos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, fox = tokenizer.convert_tokens_to_ids(["a</w>", "fox</w>"])
    assert ids[0].tolist() == [sos] + [eos] * 31
    assert ids[1].tolist() == [sos, a, fox] + [eos] * 29
    assert ids[2].tolist() == [sos] + [fox] * 30 + [eos]
