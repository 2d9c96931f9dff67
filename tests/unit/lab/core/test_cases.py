"""The fingerprint of a case: equal for equal cases, another one for any other image, word or
role. The same of a model's settings.
"""

import dataclasses
from dataclasses import replace

import pytest
import tiny
import torch
from tiny_diffusion import tiny_diffusion

from lab.core.data import (
    CaptionedImages,
    Case,
    Concept,
    ConceptCase,
    Erasure,
    Sampling,
    Split,
    Task,
)
from lab.core.hashing import fingerprint, model_settings


def shown(start: int, count: int = 2) -> CaptionedImages:
    images = (torch.arange(count * 12).view(count, 3, 2, 2) + start).to(torch.uint8)
    return CaptionedImages(images, tuple(f"picture {start + i}" for i in range(count)))


def one(name: str, role: str, start: int) -> Concept:
    asked = {"name": (f"a fox by {name}", f"{name} art"), "description": ("a fox of tiles",)}
    parts = [shown(start + 30 * i) for i in range(4)]
    return Concept(name, role, "style", name, *parts, prompts=asked)  # type: ignore[arg-type]


def case() -> ConceptCase:
    return ConceptCase(
        "small",
        targets=(one("mosaic", "harmful", 0),),
        others=(one("neon", "benign", 1),),
        rehearsal=(one("sketch", "benign", 2),),
        keep=shown(100),
        regularizers=("a fox", "a lion"),
        unrelated=shown(110),
        sampling=Sampling(steps=2, last_guidance=3.0, count=4),
        erased=(Erasure("mosaic", "mosaic", ("mosaic art",), ("art",), ("a fox",)),),
    )


def variants(value):
    """Every copy of a frozen value that differs in one leaf: one pixel, one character, one number,
    one item.
    """
    if isinstance(value, torch.Tensor):
        for place in (0, value.numel() - 1):
            other = value.clone()
            other.view(-1)[place] += 1
            yield other
        yield value.transpose(-1, -2).contiguous() if value.ndim > 1 else value.flip(0)
        yield value.to(torch.int32 if value.dtype != torch.int32 else torch.int64)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            for other in variants(getattr(value, field.name)):
                yield replace(value, **{field.name: other})
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            for other in variants(item):
                yield (*value[:i], other, *value[i + 1 :])
        if len(value) > 1:
            yield value[1:]
        if len(set(map(str, value))) > 1:
            yield value[::-1]
    elif isinstance(value, dict):
        for key, item in value.items():
            yield {**{k: v for k, v in value.items() if k != key}, f"{key}!": item}
            for other in variants(item):
                yield {**value, key: other}
    elif isinstance(value, str):
        others = {"harmful": "benign", "benign": "harmful", "weights": "bfloat16", "ddim": "dpm"}
        yield others.get(value, f"{value}!")
    else:
        yield value + 1


def test_equal_cases_have_equal_fingerprints() -> None:
    assert fingerprint(case()) == fingerprint(case())
    strided = replace(
        case(),
        keep=CaptionedImages(
            shown(100).images.to(memory_format=torch.channels_last), shown(100).prompts
        ),
    )
    assert fingerprint(strided) == fingerprint(
        case()
    )  # the same image, laid out differently in memory


def test_any_change_changes_it() -> None:
    """Every leaf of a whole case, one at a time; and no two of these cases share a fingerprint."""
    found = [fingerprint(other) for other in variants(case())]
    assert len({*found, fingerprint(case())}) == len(found) + 1


def test_what_follows_from_the_images_counts_for_stages_and_not_for_the_data() -> None:
    described = replace(
        case(), keep=replace(case().keep, described=("a fox of tiles",) * len(case().keep))
    )
    assert fingerprint(described) != fingerprint(case())
    assert fingerprint(described, derived=False) == fingerprint(case(), derived=False)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_linear_cases(kind) -> None:
    def make(shift: float = 0.0, role: str = "benign") -> Case:
        x, y = torch.arange(6.0, dtype=torch.float64).view(3, 2) + shift, torch.arange(3)
        tasks = [
            Task(name, r, kind, Split(x, y), Split(x + 1, y))
            for name, r in (("a", role), ("b", "harmful"))
        ]
        return Case("c", tasks[0], (tasks[1],))

    assert fingerprint(make()) == fingerprint(make())
    found = [fingerprint(other) for other in variants(make())]
    assert len({*found, fingerprint(make())}) == len(found) + 1


def test_what_a_diffusion_model_has_beside_its_weights() -> None:
    """Schedulers, scaling factors and tokenizers are in no state dict, and change every result."""
    first = model_settings(tiny_diffusion())
    assert first == model_settings(tiny_diffusion(seed=1))  # weights have a hash of their own
    used = tiny_diffusion()
    used.text(["a fox"])
    assert model_settings(used) == model_settings(used.copy()) == first
    other = [tiny_diffusion() for _ in range(3)]
    other[0].scheduler.register_to_config(prediction_type="v_prediction")
    other[1].vae.register_to_config(scaling_factor=0.5)
    other[2] = other[2].copy()  # the tokenizer of the tiny model is shared
    other[2].tokenizers[0].add_tokens(["<new1>"])
    assert len({found["settings"] for found in [first, *map(model_settings, other)]}) == 4
    assert model_settings(tiny.tiny_net()) == {}
