"""Images, scorers and a RunView made by hand, for tests of the diffusion metrics.

An image is one colour: red and green set its CLIP vector, blue says whether the detector sees the
concept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.core.data import CaptionedImages, Concept, ConceptCase, Sampling
from lab.core.types import BASELINE, IMMUNIZED, Budget, Trajectory

BUDGET = Budget(20, 4, at=(0, 10, 20, 40, 80))
STEPS = BUDGET.snapshots()
RED = (200, 0, 0)


def colours(*values):
    """uint8 [n, 3, 4, 4]."""
    return (
        torch.tensor(values, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    )


def tilted(cosine, seen=False):
    """A colour whose CLIP cosine to `RED` is ``cosine`` (exact for 1, 0.8, 0.6 and 0)."""
    return (round(200 * cosine), round(200 * (1 - cosine**2) ** 0.5), 255 if seen else 0)


class Clip:
    def images(self, images):
        return F.normalize(images.double().mean((2, 3))[:, :2], dim=1)

    def texts(self, texts):
        return torch.tensor([[0.0, 1.0] if "green" in text else [1.0, 0.0] for text in texts])


class Features:
    def features(self, images):
        return images.double().mean((2, 3))

    def distance(self, images, references):
        other = references[torch.arange(len(images)) % len(references)]
        return (images.double() - other.double()).abs().mean((1, 2, 3)) / 255


class Perceptual:
    def distance(self, a, b):
        return (a.double() - b.double()).abs().amax((1, 2, 3)) / 255


@dataclass
class Detector:
    """Object 1 where green outweighs red, style 1 where blue is bright; the concept is there where
    style 1 is.
    """

    rates: dict[str, dict[str, float]] = field(default_factory=dict)

    def probabilities(self, images):
        red, green, blue = images.double().mean((2, 3)).T
        objects, styles = (green > red).double(), (blue > 127).double()
        return {
            "object": torch.stack([1 - objects, objects], 1),
            "style": torch.stack([1 - styles, styles], 1),
        }

    def detects(self, images, name):
        return self.probabilities(images)["style"][:, 1] > 0.5


@dataclass(eq=False)
class FakeScorers:
    clip: Any = field(default_factory=Clip)
    features: Any = field(default_factory=Features)
    detector: Any = field(
        default_factory=lambda: Detector({n: RATES for n in ("mosaic", "neon", "sketch")})
    )
    lpips: Any = None

    def fingerprint(self):
        return str(id(self))


RATES = {"false_positive": 0.1, "false_negative": 0.1}


def concept(name, role, families=("name",)):
    none, known = (
        CaptionedImages(torch.empty(0, 3, 4, 4, dtype=torch.uint8), ()),
        CaptionedImages(colours(RED, RED), ("a", "b")),
    )
    return Concept(
        name,
        role,
        "style",
        name,
        none,
        none,
        known,
        none,
        {f: (f"a {name}", "green") for f in families},
    )


def case(
    name="case",
    targets=("mosaic", "neon"),
    others=("sketch",),
    **kwargs,
):
    unrelated = CaptionedImages(colours((200, 0, 0), (0, 200, 0)), ("a red thing", "a green thing"))
    return ConceptCase(
        name,
        tuple(concept(t, "harmful", **kwargs) for t in targets),
        tuple(concept(o, "benign", **kwargs) for o in others),
        (),
        unrelated,
        (),
        unrelated,
        Sampling(steps=2, guidance=4.0, count=4),
    )


def attack(points, status="ok", families=("name",)):
    """A trajectory from the colours of every point; it ends early where there are fewer points than
    snapshots.
    """
    samples = torch.stack([colours(*point) for point in points])
    steps = list(STEPS[: len(points)])
    return Trajectory(
        steps, {"train_loss": [1.0] * len(steps)}, status, samples={f: samples for f in families}
    )


def shares(*counts, of=10, cosines=None, status="ok"):
    """A trajectory whose detector sees ``counts`` of ``of`` images per point; cosine 1 − … per
    point on request.
    """
    cosines = cosines or [0.8] * len(counts)
    return attack(
        [
            [tilted(c, i < count) for i in range(of)]
            for c, count in zip(cosines, counts, strict=True)
        ],
        status,
    )


@dataclass
class Painter:
    """A "model": ``paint(prompt, number)`` is the colour of image ``number``."""

    paint: Callable[[str, int], tuple[int, int, int]]
    calls: list[Sampling] = field(default_factory=list)
    weights: int = field(default_factory=partial(next, count()))
    unet = vae = scheduler = SimpleNamespace(config={})
    text_encoders = tokenizers = ()
    pipeline_class, zero_negative = "Painter", False

    def state_dict(self):
        """Painters have different weights, and so different images."""
        return {"weights": torch.tensor([self.weights])}

    def latents(self, total, seed, *labels):
        return torch.arange(total)

    def generate(self, prompts, latents, sampling, batch=32):
        self.calls.append(sampling)
        return colours(*(self.paint(p, int(z)) for p, z in zip(prompts, latents, strict=True)))


def faithful(prompt, number):
    return (0, 200, 0) if "green" in prompt else (200, 0, 0)


@dataclass
class FakeRun:
    """Trajectories by a function of model, attack, concept and seed; models by model."""

    trajectories: Callable[[str, str, str, int], Trajectory] = lambda *_: shares(0, 0, 0, 0, 0)
    case_list: tuple[ConceptCase, ...] = field(default_factory=lambda: (case(),))
    models: dict[str, Painter] = field(
        default_factory=lambda: {a: Painter(faithful) for a in (BASELINE, IMMUNIZED)}
    )
    diverged: dict[tuple[str, int], Any] = field(default_factory=dict)
    scenario: str = "fake"
    model_names: tuple[str, ...] = (BASELINE, IMMUNIZED)
    attacks: tuple[str, ...] = ("lora",)
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget = BUDGET
    store: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    logged: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    def cases(self, seed):
        return tuple(c for c in self.case_list if (c.name, seed) not in self.diverged)

    def model(self, model_name, case, seed):
        return self.models[model_name]

    def history(self, case, seed):
        return self.logged.get(seed, {})

    def trajectory(self, model_name, attack, case, task, seed):
        return self.trajectories(model_name, attack, task.name, seed)

    def cached(self, key, compute):
        if key not in self.store:
            self.store[key] = compute()
        return self.store[key]


def flat(*cosines, count=4, status="ok"):
    """A trajectory with one cosine per snapshot, alike in all images."""
    return attack([[tilted(c)] * count for c in cosines], status)


def world(immunized, baseline=None, **kwargs):
    """The baseline learns: cosine 0, 0.6, 0.8, 1, 1; the immunized model by concept."""
    learned = baseline or flat(0.0, 0.6, 0.8, 1.0, 1.0)

    def make(model_name, attack_name, name, seed):
        return learned if model_name == BASELINE else immunized[name]

    return FakeRun(make, **kwargs)


HELD = {
    "mosaic": flat(0.0, 0.0, 0.6, 0.8, 1.0),
    "neon": flat(0.0, 0.6, 0.8, 1.0, 1.0),
    "sketch": flat(0.0, 0.6, 0.6, 1.0, 1.0),
}
