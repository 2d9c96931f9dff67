"""Training, calibration and error rates of MiniSD's scorers: the detector of objects and styles,
and the small CLIP.

They learn from the same world as MiniSD, from other images of it, and from all objects and styles,
those that MiniSD never sees included. Images with two objects are left out: the second would have
no label.

Scorers look at generated images but learn from rendered ones. They also see what a small
autoencoder and a short sampler do to images, imitated (`degrade`), so that they do not mistake
softness for a missing object. No image that MiniSD draws is used, so that the scorers stay
independent of it; only the detector's class of degenerate images comes from its decoder
(`lab.minisd.train.degenerate`).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import CLIPTokenizer

from lab.core.config import Count, options
from lab.core.seeding import derive, generator
from lab.core.types import Checkpoint
from lab.minisd.train.degenerate import DEGENERATE, degenerate_images
from lab.minisd.train.networks import (
    CONTEXT,
    Rows,
    Schedule,
    device_of,
    tokenize,
    tokenize_all,
    train,
    train_tokenizer,
)
from lab.minisd.world import captions
from lab.minisd.world.dice import Dice
from lab.minisd.world.scenes import BACKGROUNDS, compose
from lab.minisd.world.vocabulary import CATEGORIES, PHOTO
from lab.minisd.world.world import EVERYTHING, Sample, sample
from lab.scorers.detector import Detector, DetectorNetwork, Head, Rates

WORLD = replace(EVERYTHING, two_share=0.0)
NAMES: dict[Head, tuple[str, ...]] = {"object": WORLD.objects, "style": WORLD.styles}
DETECTED: dict[Head, tuple[str, ...]] = NAMES | {"style": (*NAMES["style"], DEGENERATE)}
"""The detector's classes: those of the world and, among its styles, degenerate images."""
PARTS = ("train", "calibrate", "measure")
# 2 × 256 bytes, start, end, and at least one merge
Vocabulary = Annotated[int, Field(strict=True, ge=515)]
ShareBelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]

# faults of images
_BLUR = (0.3, 1.1)  # standard deviation in pixels: the autoencoder's own softness is about 0.5
_SCALE = (0.5, 0.9)  # side of the image before it is enlarged again
_NOISE = 0.05  # largest standard deviation, of a range of 1
_LEVELS = 16  # coarsest JPEG-like step, in levels of 255 per frequency
_COLOUR, _CONTRAST, _LIGHT = 0.06, 0.15, 0.06  # largest gain per channel, gain, offset
# CLIP
_GUIDE_SCALE = 16.0  # convention: 1/0.07, CLIP's first logit scale, rounded up
_LARGEST_SCALE = math.log(100)  # of CLIP's logits (arXiv 2103.00020 §2.5)


# ---- data


@options
class ClipWidths:
    """Sizes of the small CLIP.

    Attributes:
        embed: width of the common space.
        image: width of open_clip's ModifiedResNet, a multiple of 2, with ``blocks`` bottlenecks in
            its four stages.
        text, layers: width and depth of the text transformer; the width is a multiple of 32.
    """

    embed: Count = 128
    image: Count = 20
    blocks: tuple[Count, ...] = (1, 1, 1, 1)
    text: Count = 128
    layers: Count = 3


@options
class ScorerRecipe:
    """Everything but the seed that determines the scorers.

    Attributes:
        images: training images; ``calibrate`` and ``measure`` more, disjoint from these and
            from each other.
        empty: images of a scene without an object, never shown with a label of one; as many are
            degenerate.
        captions: captions drawn per image.
        vocabulary: tokens of CLIP's tokenizer at most.
        smoothing: label smoothing of the detector.
        empty_share: share of a detector's batch that shows an empty scene, and share that is
            degenerate.
        width: of the detector (`lab.scorers.detector.DetectorNetwork`).
    """

    images: Count
    calibrate: Count
    measure: Count
    empty: Count
    captions: Count
    vocabulary: Vocabulary
    smoothing: ShareBelowOne
    empty_share: ShareBelowOne
    clip: Schedule
    detector: Schedule
    clip_widths: ClipWidths = field(default_factory=ClipWidths)
    width: Count = 32
    workers: Count = 1


def draw(recipe: ScorerRecipe, seed: int, part: str) -> Sample:
    """Draw the images of ``train``, ``calibrate`` or ``measure``: three disjoint stretches of one
    series.
    """
    sizes = [recipe.images, recipe.calibrate, recipe.measure]
    place = PARTS.index(part)
    start, workers = sum(sizes[:place]), recipe.workers
    return sample(WORLD, seed, sizes[place], start=start, workers=workers)


def labelled(drawn: Sample) -> TensorDataset:
    """Return images uint8 [n, 3, 64, 64] of a sample of `WORLD` with the indices [n] of their
    objects and of their styles in `NAMES`.
    """
    objects = torch.tensor([NAMES["object"].index(p.objects[0]) for p in drawn.pictures])
    styles = torch.tensor([NAMES["style"].index(p.style) for p in drawn.pictures])
    return TensorDataset(drawn.images, objects, styles)


def empty_scenes(seed: int, total: int, part: str = "train") -> TensorDataset:
    """Draw scenes without an object (index -1), in every style: what a detector must see nothing
    in.
    """
    images, styles = [], []
    for i in range(total):
        dice = Dice(seed, "empty", part, i)
        style, background = dice.pick(NAMES["style"]), dice.pick(tuple(BACKGROUNDS))
        images.append(torch.from_numpy(compose((), (), background, style, dice)))
        styles.append(NAMES["style"].index(style))
    pixels = torch.stack(images).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(pixels, torch.full((total,), -1), torch.tensor(styles))


def degenerate(vae: Any, seed: int, total: int, part: str = "train") -> TensorDataset:
    """Draw degenerate images: of no object (index -1), of the last of the detector's styles."""
    images = degenerate_images(vae, total, seed, part)
    nothing, style = torch.full((total,), -1), torch.full((total,), len(NAMES["style"]))
    return TensorDataset(images, nothing, style)


def labels_of(data: TensorDataset) -> dict[Head, Tensor]:
    """Return the class indices [n] of both heads."""
    return {"object": data.tensors[1], "style": data.tensors[2]}


def class_prompts(head: Head, style: str | None = PHOTO) -> dict[str, list[str]]:
    """Return prompts of every class, for zero-shot classification by an ensemble (arXiv 2103.00020
    §3.1.4).

    Args:
        head: ``object``: every object in ``style`` (None: in every style), by the artist's name;
            ``style``: class words ("an animal") in every style, by name and by description.
    """
    if head == "style":
        nouns = [captions.article(category) for category in CATEGORIES]
        ways: dict[str, tuple[captions.By, ...]] = {
            s: ("name", "description") for s in NAMES["style"]
        }
        ways[PHOTO] = ("name",)  # a photo has no artist
        return {
            s: [t for it in nouns for by in ways[s] for t in captions.prompts(it, s, by)]
            for s in ways
        }
    styles = NAMES["style"] if style is None else (style,)
    return {
        o: [t for s in styles for t in captions.prompts(captions.noun(o), s)]
        for o in NAMES["object"]
    }


# ---- faults of images


def _uniform(g: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [n, c, h, w], border repeated."""
    radius = max(1, round(3 * sigma))
    t = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-(t**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.unsqueeze(2), groups=x.shape[1])
    return F.conv2d(x, kernel.unsqueeze(3), groups=x.shape[1])


def resample(x: Tensor, share: float) -> Tensor:
    """Down to ``share`` of the side and back, bilinear."""
    side = max(8, round(x.shape[-1] * share))
    small = F.interpolate(
        x, size=(side, side), mode="bilinear", antialias=True, align_corners=False
    )
    return F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False)


def quantise(x: Tensor, step: float) -> Tensor:
    """Round the 8 × 8 cosine coefficients to steps that grow with frequency, as JPEG does. Sides:
    multiples of 8.
    """
    t = torch.arange(8, dtype=x.dtype)
    basis = torch.cos(torch.pi * (2 * t[None] + 1) * t[:, None] / 16) / 2
    basis[0] /= 2**0.5
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    steps = step * (1 + t[:, None] + t[None]) / 4
    rounded = torch.round(basis @ blocks @ basis.T / steps) * steps
    return (basis.T @ rounded @ basis).transpose(3, 4).reshape(n, c, h, w)


def degrade(images: Tensor, g: torch.Generator) -> Tensor:
    """Float images [n, 3, s, s] in [0, 1] with mild faults; a fifth stays as it is, faults differ
    by fifths.

    The batch must be in random order: which image gets which fault depends on its place.
    """
    parts = list(torch.tensor_split(images, 5))
    parts[1] = blur(parts[1], float(_uniform(g, *_BLUR, 1)))
    parts[2] = resample(parts[2], float(_uniform(g, *_SCALE, 1)))
    parts[3] = quantise(parts[3], float(_uniform(g, 1, _LEVELS, 1)) / 255 * 4)
    parts[4] = resample(
        blur(parts[4], float(_uniform(g, *_BLUR, 1))), float(_uniform(g, *_SCALE, 1))
    )
    n = len(images)
    noise = torch.randn(images.shape, generator=g) * (_uniform(g, 0, 1, n, 1, 1, 1) ** 2 * _NOISE)
    gain = _uniform(g, 1 - _COLOUR, 1 + _COLOUR, n, 3, 1, 1) * _uniform(
        g, 1 - _CONTRAST, 1 + _CONTRAST, n, 1, 1, 1
    )
    light = _uniform(g, -_LIGHT, _LIGHT, n, 1, 1, 1)
    gain[: len(parts[0])], light[: len(parts[0])], noise[: len(parts[0])] = 1, 0, 0
    return ((torch.cat(parts) - 0.5) * gain + 0.5 + light + noise).clamp_(0, 1)


def noise_images(number: int, side: int, g: torch.Generator) -> Tensor:
    """Coloured noise of one random grain, float [number, 3, side, side] in [0, 1]: images of
    nothing.
    """
    grain = min(side, 2 ** int(torch.randint(1, 7, (1,), generator=g)))
    coarse = torch.rand(number, 3, grain, grain, generator=g)
    return F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)


# ---- the detector


def to_unit(images: Tensor) -> Tensor:
    """Return uint8 [0, 255] as float [0, 1], what scorers take."""
    return images.float().div_(255)


def detector_loss(
    logits: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], smoothing: float
) -> Tensor:
    """Compute the cross-entropy of both heads with label smoothing.

    Images with label −1 pull the head towards equal probabilities, so that it stays undecided where
    there is nothing to see (outlier exposure, arXiv 1812.04606, Eq. 1 with the uniform target,
    weight 1 per image).
    """
    total = torch.zeros((), device=logits[0].device)
    for x, y in zip(logits, labels, strict=True):
        right = F.cross_entropy(x, y.clamp(min=0), reduction="none", label_smoothing=smoothing)
        undecided = -F.log_softmax(x, 1).mean(1) - math.log(x.shape[1])
        total = total + torch.where(y >= 0, right, undecided).mean()
    return total


def train_detector(
    model: DetectorNetwork,
    data: TensorDataset,
    held_out: TensorDataset,
    empty: TensorDataset,
    broken: TensorDataset,
    recipe: ScorerRecipe,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> Rows:
    """Train in place and round to float16.

    Args:
        data, held_out: `labelled` images for training and validation.
        empty, broken: scenes without an object, and `degenerate` images. Each makes up
            ``recipe.empty_share`` of a batch; a third of the degenerate ones are plain noise.
    """
    device, batch = device_of(model), recipe.detector.batch
    scenes = round(batch * recipe.empty_share)
    noisy = scenes // 3

    def step(_: int, g: torch.Generator) -> Tensor:
        sizes = {data: batch - 2 * scenes, empty: scenes, broken: scenes - noisy}
        drawn = [part[torch.randint(len(part), (n,), generator=g)] for part, n in sizes.items()]
        noise = noise_images(noisy, drawn[0][0].shape[-1], g)
        x = torch.cat([*(to_unit(images) for images, *_ in drawn), noise])
        order = torch.randperm(len(x), generator=g)
        x = degrade(x[order], g).to(device).contiguous(memory_format=torch.channels_last)
        nothing = torch.full((noisy,), -1), torch.full((noisy,), len(NAMES["style"]))
        labels = zip(*(labels for _, *labels in drawn), nothing, strict=True)
        objects, styles = (torch.cat(y)[order].to(device) for y in labels)
        return detector_loss(model(x), (objects, styles), recipe.smoothing)

    def validate(average: Any) -> dict[str, float]:
        return accuracy(Detector(average, DETECTED["object"], DETECTED["style"]), held_out)

    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    options: dict[str, Any] = {"seed": seed, "checkpoint": checkpoint, "validate": validate}
    rows = train(model, step, recipe.detector, label="detector", **options)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.half().float()  # as its file keeps it: the measured network is the shipped one
    return rows


def accuracy(detector: Detector, data: TensorDataset) -> dict[str, float]:
    """Return the top-1 accuracy of ``object``, ``style`` and ``both`` together."""
    logits = detector.logits(data.tensors[0])
    hits = {head: logits[head].argmax(1) == y for head, y in labels_of(data).items()}
    both = hits["object"] & hits["style"]
    return {name: hit.float().mean().item() for name, hit in (*hits.items(), ("both", both))}


def wear(data: TensorDataset, seed: int, times: int = 3) -> TensorDataset:
    """Return images after ``times`` passes of `degrade`, about as faulty as the worst of a
    generator.
    """
    images, *labels = data.tensors
    x = to_unit(images)
    for i in range(times):
        x = degrade(x, generator(seed, "worn", i))
    return TensorDataset((x.clamp(0, 1) * 255).round().to(torch.uint8), *labels)


def calibrate(
    detector: Detector, held_out: TensorDataset, empty: TensorDataset | None = None
) -> dict[str, float]:
    """Return the temperature of each head that minimises the negative log likelihood on images it
    never saw (arXiv 1706.04599 §4.2).

    Rendered images are too easy for it: where nothing goes wrong the best temperature is 0, and
    then any scene shows some object for certain. So ``held_out`` should be worn (`wear`), and the
    object's head also has to be undecided about ``empty`` scenes, whose target is the uniform
    distribution as in `detector_loss`.
    """
    logits, labels = detector.logits(held_out.tensors[0]), labels_of(held_out)
    blank = None if empty is None else detector.logits(empty.tensors[0])["object"].double()
    temperature: dict[str, float] = {}
    for head, x in logits.items():

        def loss(t: float, head: Head = head, x: Tensor = x) -> float:
            seen = F.cross_entropy(x.double() / math.exp(t), labels[head]).item()
            if head == "style" or blank is None:
                return seen
            nothing = float(-F.log_softmax(blank / math.exp(t), 1).mean())
            return (len(x) * seen + len(blank) * nothing) / (len(x) + len(blank))

        bounds = math.log(0.05), math.log(20)
        temperature[head] = math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)
    return temperature


def measure(
    detector: Detector, data: TensorDataset, empty: TensorDataset, broken: TensorDataset
) -> dict[str, Any]:
    """Measure a detector on ``data`` images, on ``empty`` scenes and on ``broken``, degenerate
    images.

    Returns:
        ``rates`` of every name of the world: ``false_negative``, the share of its images in which
        `Detector.detects` misses it, and ``false_positive``, the share of all other images in which
        it is detected (nan where no image shows the name, or all do); `accuracy`;
        ``calibration_error``, the expected error of each head's likeliest class over 15 bins (arXiv
        1706.04599, Eq. 5); ``empty_with_object``, the share of empty scenes in which an object is
        detected; ``degenerate``, see `blind`.
    """
    # imported late: it takes seconds
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities = detector.probabilities(data.tensors[0])
    rates: Rates = {}
    errors: dict[str, float] = {}
    for head, p in probabilities.items():
        labels = labels_of(data)[head]
        errors[head] = multiclass_calibration_error(p, labels, p.shape[1], n_bins=15).item()
        for i, name in enumerate(NAMES[head]):
            present, seen = labels == i, p[:, i] >= detector.threshold
            rates[name] = {
                "false_positive": seen[~present].double().mean().item(),
                "false_negative": 1 - seen[present].double().mean().item(),
            }
    detected = (detector.probabilities(empty.tensors[0])["object"] >= detector.threshold).any(1)
    return {
        "rates": rates,
        "accuracy": accuracy(detector, data),
        "calibration_error": errors,
        "images": len(data),
        "empty_with_object": detected.double().mean().item(),
        "degenerate": blind(detector, broken.tensors[0]),
    }


def blind(detector: Detector, images: Tensor) -> dict[str, float]:
    """Return what a detector makes of images of destroyed models: the share called degenerate
    (``recognised``), and the share in which it detects a style or an object of the world
    (``style``, ``object``).
    """
    p = detector.probabilities(images)
    last = detector.styles.index(DEGENERATE)
    seen = {head: p[head] >= detector.threshold for head in p}
    shares = {
        "recognised": seen["style"][:, last],
        "style": seen["style"][:, :last].any(1),
        "object": seen["object"].any(1),
    }
    return {name: share.double().mean().item() for name, share in shares.items()}


# ---- CLIP


def clip_config(widths: ClipWidths, vocabulary: int) -> dict[str, Any]:
    """Return the contents of ``open_clip_config.json``; pixels are scaled to [-1, 1]."""
    return {
        "model_cfg": {
            "embed_dim": widths.embed,
            "vision_cfg": {
                "image_size": 64,
                "layers": list(widths.blocks),
                "width": widths.image,
                "head_width": 4 * widths.image,  # eight heads
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": ".",  # open_clip looks into the folder itself
                "width": widths.text,
                "heads": widths.text // 32,
                "layers": widths.layers,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }


def clip_network(config: dict[str, Any], seed: int) -> nn.Module:
    """Build an ``open_clip.CLIP`` from `clip_config`."""
    from open_clip import CLIP

    torch.manual_seed(derive(seed, "clip", "init"))
    return CLIP(**copy.deepcopy(config["model_cfg"]))


def save_clip(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write an open_clip folder in float16, beside the files of `clip_tokenizer`.

    It loads by ``open_clip.create_model_from_pretrained("local-dir:FOLDER")`` without this project.
    """
    state = copy.deepcopy(model).half().state_dict()
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")


def clip_tokenizer(texts: list[list[str]], folder: Path, vocabulary: int) -> CLIPTokenizer:
    """Learn CLIP's tokenizer from the training captions and the class prompts; writes its files
    into ``folder``.
    """
    prompts = [*class_prompts("object", None).values(), *class_prompts("style").values()]
    return train_tokenizer([t for ts in (*texts, *prompts) for t in ts], folder, vocabulary)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Compute CLIP's symmetric cross-entropy (arXiv 2103.00020, Fig. 3) without false negatives.

    Args:
        images, texts: unit vectors [n, d] and [m, d], m ≤ n; row i of both belongs together, the
            images from m on have no text and serve as negatives only.
        scale: factor of the similarities.
        same: bool [n, m]: pairs that show the same things; outside the diagonal they are left out
            of the loss, since the caption of one is true of the other.
    """
    m, device = len(texts), texts.device
    own = torch.eye(len(images), m, dtype=torch.bool, device=device)
    logits = (scale * images @ texts.T).masked_fill(same & ~own, float("-inf"))
    target = torch.arange(m, device=device)
    return (F.cross_entropy(logits[:m], target) + F.cross_entropy(logits.T, target)) / 2


def draw_rows(step: int, styles: Tensor, batch: int, g: torch.Generator) -> Tensor:
    """Draw the rows [batch] of a step out of images with ``styles`` [n].

    Every second batch holds one style only: within it captions differ by their object alone,
    which random batches rarely ask for.
    """
    pool = torch.arange(len(styles))
    if step % 2:
        kinds = styles.unique()
        style = kinds[int(torch.randint(len(kinds), (1,), generator=g))]
        pool = torch.nonzero(styles == style).flatten()
    return pool[torch.randint(len(pool), (batch,), generator=g)]


class _Guided(nn.Module):
    """A CLIP and one direction per object and per style in its common space, which only the
    training uses.
    """

    def __init__(self, clip: Any, seed: int) -> None:
        super().__init__()
        self.clip = clip
        g = generator(seed, "clip", "guides")
        width = clip.text_projection.shape[-1]
        self.guides = nn.ParameterDict(
            {head: torch.randn(len(names), width, generator=g) for head, names in NAMES.items()}
        )

    def guide_loss(self, vectors: Tensor, labels: dict[Head, Tensor]) -> Tensor:
        """Compute the cross-entropy of unit vectors [n, d] against the directions (normalised
        softmax, arXiv 1704.06369).
        """
        losses = [
            F.cross_entropy(_GUIDE_SCALE * vectors @ F.normalize(self.guides[h], dim=1).T, y)
            for h, y in labels.items()
        ]
        return torch.stack(losses).mean()


def train_clip(
    model: Any,
    data: TensorDataset,
    texts: list[list[str]],
    held_out: TensorDataset,
    tokenizer: Any,
    schedule: Schedule,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> Rows:
    """Train an ``open_clip.CLIP`` in place and round it to float16.

    Half of the images bring a caption: texts are soon learned
    and cost as much as images. Labels guide both towers (`_Guided`): contrast alone needs several
    times the steps.

    Args:
        texts: captions of the images ``data``, as many for each.
        held_out: images for validation (zero-shot top-1).
    """
    tokens, device = tokenize_all(tokenizer, texts), device_of(model)
    pixels, _, styles = data.tensors
    guided = _Guided(model, seed).to(device)
    # every second image to the front: faults go by place, and each kind shall come with and without
    # a caption
    order = torch.argsort(torch.arange(schedule.batch) % 2, stable=True)

    def step(number: int, g: torch.Generator) -> Tensor:
        index = draw_rows(number, styles, schedule.batch, g)
        x = (degrade(to_unit(pixels[index]), g) * 2 - 1).to(device)
        x = x.contiguous(memory_format=torch.channels_last)
        images, index = model.encode_image(x, normalize=True)[order], index[order]
        captioned = index[: (schedule.batch + 1) // 2]
        n = len(captioned)
        ids = tokens[captioned, torch.randint(tokens.shape[1], (n,), generator=g)]
        text_vectors = model.encode_text(ids.to(device), normalize=True)
        labels: dict[Head, Tensor] = {h: y[index].to(device) for h, y in labels_of(data).items()}
        pairs = labels["object"] * len(NAMES["style"]) + labels["style"]
        scale = model.logit_scale.clamp(max=_LARGEST_SCALE).exp()
        loss = contrastive_loss(images, text_vectors, scale, pairs[:, None] == pairs[None, :n])
        by_image = guided.guide_loss(images, labels)
        by_text = guided.guide_loss(text_vectors, {head: y[:n] for head, y in labels.items()})
        return loss + (by_image + by_text) / 2

    def validate(average: _Guided) -> dict[str, float]:
        return zero_shot_accuracy(average.clip, held_out, tokenizer)

    model.visual.to(memory_format=torch.channels_last)
    options: dict[str, Any] = {"seed": seed, "checkpoint": checkpoint, "validate": validate}
    rows = train(guided, step, schedule, label="clip", **options)
    with torch.no_grad():
        model.logit_scale.clamp_(max=_LARGEST_SCALE)
    model.to(memory_format=torch.contiguous_format)
    model.half().float()  # as its file keeps it: the measured network is the shipped one
    return rows


def prototypes(
    encode: Callable[[list[str]], Tensor], prompts: Mapping[str, Sequence[str]]
) -> Tensor:
    """Return one unit vector [k, d] per class: the mean of the unit vectors of its prompts (arXiv
    2103.00020 §3.1.4).

    Args:
        encode: texts to unit vectors, for example `lab.scorers.clip.OpenClip.texts`.
        prompts: class → its prompts, at least one.
    """
    vectors = encode([text for texts in prompts.values() for text in texts])
    parts = vectors.split([len(texts) for texts in prompts.values()])
    return F.normalize(torch.stack([part.mean(0) for part in parts]), dim=1)


def zero_shot(vectors: Tensor, classes: Tensor) -> Tensor:
    """Return the index [n] of the class whose prototype is nearest to each image vector; both are
    unit vectors, [n, d] and [k, d].
    """
    return (vectors @ classes.T).argmax(1)


def zero_shot_accuracy(model: Any, data: TensorDataset, tokenizer: Any) -> dict[str, float]:
    """Return the zero-shot top-1 accuracy over all objects, over all styles, and over the objects
    of photos among the prompts for photos.
    """
    device = device_of(model)
    images, objects, styles = data.tensors

    def encode(texts: list[str]) -> Tensor:
        ids = tokenize(tokenizer, texts).to(device).split(256)
        return torch.cat([model.encode_text(part, normalize=True) for part in ids]).cpu()

    parts = (to_unit(x.to(device)) * 2 - 1 for x in images.split(256))
    vectors = torch.cat([model.encode_image(x, normalize=True) for x in parts]).cpu()

    def hits(prompts: dict[str, list[str]], labels: Tensor) -> Tensor:
        return zero_shot(vectors, prototypes(encode, prompts)) == labels

    in_photos = hits(class_prompts("object", PHOTO), objects)
    shares = {
        "object": hits(class_prompts("object", None), objects),
        "style": hits(class_prompts("style"), styles),
        "photo_object": in_photos[styles == NAMES["style"].index(PHOTO)],
    }
    return {name: hit.float().mean().item() for name, hit in shares.items() if len(hit)}
