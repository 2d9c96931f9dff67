"""The model card of MiniSD, from its training record and its measured quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lab.minisd.world.openmoji import CREDIT
from lab.minisd.world.vocabulary import (
    HELD_OUT_OBJECTS,
    HELD_OUT_PAIRS,
    HELD_OUT_STYLES,
    OBJECTS,
    STYLE_NAMES,
)

_SUITES = {
    "photos": "objects in photos",
    "styles": "seen object × style pairs, by the artist's name",
    "described": "the same pairs, style by description only",
    "unseen_pairs": "object × style pairs held out of training",
}
_HEAD = """---
license: cc-by-sa-4.0
library_name: diffusers
pipeline_tag: text-to-image
---

# MiniSD

A complete miniature of Stable Diffusion v1 for the bench in this repository: the same classes (`CLIPTokenizer`,
`CLIPTextModel`, `AutoencoderKL`, `UNet2DConditionModel`, DDIM), 64 × 64 pixels, small enough to immunize and attack in
minutes on two CPU cores. It draws toy pictures of toy objects and is of no other use.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("lab/minisd/weights/model")
pipe("a fox in the style of mosaic", num_inference_steps=20, guidance_scale=4.0).images[0].save("fox.png")
```

![samples](samples.png)

"""


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _row(name: str, shares: Mapping[str, Any]) -> str:
    detector, clip = shares["detector"], shares["clip"]
    cells = [f"{_percent(detector[h])} / {_percent(clip[h])}" for h in ("object", "style", "both")]
    worst = [f"{found['name']} {100 * found['share']:.0f} %" for found in shares["lowest"].values()]
    return f"| {name} | {' | '.join(cells)} | {', '.join(worst)} | {shares['n']} |"


def quality_table(found: Mapping[str, Any]) -> str:
    """Markdown: what share of generations shows what was asked for, and the same scorers on real
    pictures.
    """
    lines = [
        "| prompts | object | style | both | lowest object and style (detector) | n |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(text, found["shares"][name]) for name, text in _SUITES.items()]
    lines += [
        _row(f"*real pictures: {_SUITES[name]}*", shares) for name, shares in found["real"].items()
    ]
    return "\n".join(lines)


def detector_text(facts: Mapping[str, Any]) -> str:
    """What the detector beside the model gets wrong on real pictures, clean and worn."""
    worn = facts["worn"]
    missed = max(worn["rates"], key=lambda name: worn["rates"][name]["false_negative"])
    told = " and\n".join(
        f"{_percent(worn['accuracy'][h])} of the {h}s (calibration error "
        f"{_percent(worn['calibration_error'][h])})"
        for h in ("object", "style")
    )
    right = f"{100 * facts['accuracy']['both']:.2f} % of {facts['pictures']:,}"
    return f"""The detector is right about object and style on {right}
held-out real pictures and sees an object in {_percent(facts["empty_with_object"])} of empty scenes. Blurred, resampled
and noised three times over, it is right about {told};
what it then misses most often is {missed} ({_percent(worn["rates"][missed]["false_negative"])}). Error rates per
concept on clean pictures, which correct the attack success, lie in `scorers/detector/detector.json`, those on worn
ones in `training.json`."""


def _deviations(record: Mapping[str, Any]) -> str:
    """Where this copy differs from what the recipe gives today, as its record tells."""
    told = "".join(f"- {line}\n" for line in record.get("history", ()))
    return (
        f"This copy is not what one uninterrupted run of the recipe gives:\n\n{told}\n"
        if told
        else ""
    )


def card(record: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The text of ``README.md`` beside the weights."""
    frechet, facts, steps = found["frechet"], record["provenance"], found["sampling"]
    return (
        _HEAD
        + f"""## What it can do

Top-1 over all {len(OBJECTS) + len(HELD_OUT_OBJECTS)} objects and all styles without rejection, by the detector / by
zero-shot classification with the small CLIP beside it; {steps["steps"]} DDIM steps, guidance {steps["guidance"]:g}.

{quality_table(found)}

Fréchet distance over EfficientNet-Lite0 features of {frechet["pictures"]:.0f} generations with captions drawn as in
training: {frechet["distance"]:.2f}; between two sets of as many real pictures: {frechet["floor"]:.2f}.

{detector_text(record["detector"])}

## What it was trained on

{len(OBJECTS)} objects and {len(STYLE_NAMES)} artists of the world in `lab/minisd/world/world.py`, drawn from real artwork.
Never seen: the objects {", ".join(HELD_OUT_OBJECTS)}; the styles {", ".join(HELD_OUT_STYLES)};
{len(HELD_OUT_PAIRS)} object × style pairs. The scorers saw all of them, on other pictures.

Recipe: `python run.py experiment=train_minisd` (`conf/train/minisd.yaml`); this copy: git
`{facts["git_sha"]}`; curves, versions and the hash of every file in `training.json`.

{_deviations(record)}## Limits and licence

No person, no text, nothing but these objects. {CREDIT} The weights are published under CC BY-SA 4.0 too.
"""
    )
