"""Extractors that are trained on the world, as a user trains and uses them."""

import json

import pytest
import torch
from presets import composed
from safetensors.torch import load_file

from lab.cli.actions import train
from lab.core.data import Case, Split, Task
from lab.core.errors import UserError
from lab.minisd.train.extractors import ExtractorRecipe, WorldClassifier
from lab.models.vision import VisionBackbone

SMALL = (
    "train.images=24",
    "train.held_out=8",
    "train.schedule.steps=2",
    "train.schedule.batch=8",
)


def composed_training(folder, name, *more):
    paths = [f"paths.outputs={folder}", f"paths.cache={folder}/cache"]
    return composed("experiment=train_extractor", f"train={name}", *SMALL, *paths, *more)


@pytest.mark.parametrize(
    "name", [pytest.param("resnet18_world", marks=pytest.mark.slow), "vit_small_world"]
)
def test_trained_weights_are_a_backbone(tmp_path, name):
    folder = train(composed_training(tmp_path, name))
    record = json.loads((folder / "training.json").read_text())
    assert record["accuracy"].keys() == {"object", "style"}
    options = composed(f"backbone={name}", f"paths.outputs={tmp_path}").backbone
    backbone = VisionBackbone(**{k: v for k, v in options.items() if k != "_target_"})
    x = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    split = Split(x, torch.arange(4) % 2)
    model = backbone.build(Case("a", Task("b", "benign", "classification", split, split, 2), ()), 0)
    recipe = {k: v for k, v in record["recipe"].items() if k != "_target_"}
    classifier = WorldClassifier(ExtractorRecipe(**recipe))
    classifier.network.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        expected = classifier.eval().network(classifier.inputs(x))
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    again = train(composed_training(tmp_path, name))  # from the cache
    assert json.loads((again / "training.json").read_text())["log"] == record["log"]


def test_wrong_recipes_are_refused(tmp_path):
    with pytest.raises(UserError, match="held_out"):
        train(composed_training(tmp_path, "resnet18_world", "train.held_out=0"))
