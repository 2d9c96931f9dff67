"""Attackers and immunizers on the layouts of Stable Diffusion 1.x, 2.x (v-prediction) and XL, with
random weights.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from concept_examples import BUDGET, attack, attackers, launch
from mima_examples import moved, preset, rows_of
from tiny_diffusion import tiny_case
from tiny_sd import tiny_pipeline

from lab.core.data import CaptionedImages, Concept
from lab.core.errors import UserError
from lab.models.diffusion import DiffusionModel

LAYOUTS = ("sd1", "sd2", "xl")
LEARN_TOKENS = ("textual_inversion", "custom_diffusion", "curriculum")


@cache
def model(layout: str) -> DiffusionModel:
    return DiffusionModel.from_pipeline(tiny_pipeline(layout))


def fitted(concept: Concept, side: int) -> Concept:
    def sized(pictures: CaptionedImages) -> CaptionedImages:
        images = F.interpolate(pictures.images.float(), (side, side), mode="nearest").to(
            torch.uint8
        )
        return dataclasses.replace(pictures, images=images)

    parts = {part: sized(getattr(concept, part)) for part in ("train", "own", "reference", "prior")}
    return dataclasses.replace(concept, **parts)


@cache
def case(side: int):
    found = tiny_case()
    groups = {
        r: tuple(fitted(c, side) for c in getattr(found, r))
        for r in ("targets", "others", "rehearsal")
    }
    kept = {}
    for part in ("keep", "unrelated"):
        pictures = getattr(found, part)
        images = F.interpolate(pictures.images.float(), (side, side), mode="nearest").to(
            torch.uint8
        )
        kept[part] = dataclasses.replace(pictures, images=images)
    return dataclasses.replace(found, **groups, **kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", sorted(attackers()))
def test_every_attacker_learns_on_every_layout(name, layout):
    net = model(layout)
    target = case(net.image_size).targets[0]
    if layout == "xl" and name in LEARN_TOKENS:
        with pytest.raises(UserError, match="one text encoder"):
            launch(attack(name), net, what=target)
        with pytest.raises(UserError, match="one text encoder"):
            attack(name).dry_open(net, target)
        return
    attack(name).dry_open(net, target)
    before = {k: v.clone() for k, v in net.unet.state_dict().items()}
    found = launch(attack(name), net, what=target)
    assert found.status == "ok"
    assert found.steps == list(BUDGET.snapshots())
    assert all(torch.isfinite(torch.tensor(v)).all() for v in found.values.values())
    pictures = found.samples["name"]
    assert pictures.shape[2:] == (3, net.image_size, net.image_size)
    assert not torch.equal(pictures[0], pictures[-1])
    assert all(torch.equal(v, before[k]) for k, v in net.unet.state_dict().items()), (
        "the input was touched"
    )


@pytest.mark.parametrize("layout", ["sd2", "xl"])
@pytest.mark.parametrize("name", ["mima", "mima_deep", "joint"])
def test_immunizers_on_other_layouts(name, layout):
    net = model(layout)
    found, rows = rows_of(preset(name), of=net, on=case(net.image_size))
    changed = moved(found.unet, net.unet)
    assert changed
    assert all("attn2" in key for key in changed), "Π_u is the cross-attention"
    assert all(torch.isfinite(v).all() for v in found.unet.state_dict().values())
    assert len(rows) >= 2
