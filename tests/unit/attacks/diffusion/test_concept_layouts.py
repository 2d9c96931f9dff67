"""Attackers and immunizers on the layouts of Stable Diffusion 1.x, 2.x (v-prediction) and XL, with
random weights.
"""

from functools import cache

import pytest
import torch
from concept_examples import BUDGET, attack, launch
from mima_examples import moved, preset, run
from tiny_diffusion import tiny_case
from tiny_sd import tiny_pipeline

from lab.core.errors import UserError
from lab.models.diffusion import DiffusionModel

# the model of test_concept_attackers.py has the first layout
LAYOUTS = (
    pytest.param("sd1", marks=pytest.mark.slow),
    pytest.param("sd2", marks=pytest.mark.slow),
    "xl",
)


@cache
def model(layout: str) -> DiffusionModel:
    return DiffusionModel.from_pipeline(tiny_pipeline(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["lora_text", "custom_diffusion"])
def test_attackers_learn_on_every_layout(name, layout):
    net = model(layout)
    target = tiny_case().targets[0]
    if layout == "xl" and name == "custom_diffusion":
        with pytest.raises(UserError, match="one text encoder"):
            attack(name).dry_open(net, target)
        return
    found = launch(attack(name), net, what=target)
    assert found.steps == list(BUDGET.snapshots())
    assert all(torch.isfinite(torch.tensor(v)).all() for v in found.values.values())
    images = found.samples["name"]
    assert images.shape[2:] == (3, net.image_size, net.image_size)
    assert not torch.equal(images[0], images[-1])


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("mima", "sd2", marks=pytest.mark.slow),
        ("mima_deep", "xl"),
        pytest.param("mima", "xl", marks=pytest.mark.slow),
        pytest.param("mima_deep", "sd2", marks=pytest.mark.slow),
    ],
)
def test_immunizers_on_other_layouts(name, layout):
    net = model(layout)
    found = run(preset(name), of=net, on=tiny_case())
    changed = moved(found.unet, net.unet)
    assert changed
    assert all("attn2" in key for key in changed), "Π_u is the cross-attention"
    assert all(torch.isfinite(v).all() for v in found.unet.state_dict().values())
