"""The released folder against an attack that knows nothing of this project, and the scorer of its
images.
"""

import ast
import json

import numpy as np
import pytest
import torch
from docs_examples import EXAMPLES, load
from PIL import Image
from release_examples import concept_folder, tiny_folder
from safetensors.torch import load_file

from lab.core.sources import PACKAGES
from lab.minisd.world.world import Subset, concept, sample

ATTACK, SCORER = "lora_without_this_project", "score_plain_attack"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(model in diffusers layout, images of a concept)."""
    root = tmp_path_factory.mktemp("plain")
    return tiny_folder(root / "model"), concept_folder(root / "mosaic", "mosaic")


def attack(places, out, *more):
    model, images = places
    load(ATTACK).main(
        [
            str(model),
            "--images",
            str(images),
            "--prompt",
            "a fox in the style of mosaic",
            "--out",
            str(out),
            "--batch-size",
            "2",
            "--count",
            "3",
            "--inference-steps",
            "2",
            "--at",
            "0",
            "2",
            "--device",
            "cpu",
            *more,
        ]
    )
    return json.loads((out / "attack.json").read_text())


def load_images(folder):
    files = sorted(folder.glob("*.png"))
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))


# ---- the attack


def test_the_attack_imports_nothing_of_this_project():
    tree = ast.parse((EXAMPLES / f"{ATTACK}.py").read_text())
    names = [
        *(a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names),
        *(node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)),
    ]
    assert {"diffusers", "peft", "torch"} <= {name.split(".")[0] for name in names}
    assert not {name.split(".")[0] for name in names} & {*PACKAGES, "run"}


@pytest.mark.slow
def test_it_learns_saves_and_loads_in_plain_diffusers(places, tmp_path):
    losses = attack(places, tmp_path / "out", "--steps", "30", "--lr", "0.01")["losses"]
    still = attack(places, tmp_path / "still", "--steps", "30", "--lr", "1e-12")[
        "losses"
    ]  # the same draws
    assert (len(losses), losses[0]) == (30, still[0])
    assert np.mean(losses[-10:]) < np.mean(still[-10:])
    assert sorted(p.name for p in (tmp_path / "out").glob("step_*")) == [
        "step_00000",
        "step_00002",
        "step_00030",
    ]
    first, last, again = (
        load_images(tmp_path / "out" / name) for name in ("step_00000", "step_00030", "reloaded")
    )
    assert not torch.equal(first, last)
    assert (last.int() - again.int()).abs().max() <= 1  # what was trained is what the file holds
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(".lora" in name and "attn2" in name for name in tensors)


def test_full_finetuning_by_another_optimizer_moves_every_weight(places, tmp_path):
    more = ("--steps", "2", "--lr", "1e-3", "--full", "--optimizer", "NAdam")
    assert len(attack(places, tmp_path / "out", *more)["losses"]) == 2
    last, again = (load_images(tmp_path / "out" / name) for name in ("step_00002", "reloaded"))
    assert (last.int() - again.int()).abs().max() <= 1
    before, after = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (places[0], tmp_path / "out")
    )
    assert {*before} == {*after}
    moved = sum(not torch.equal(before[name], after[name]) for name in before)
    assert moved > 0.9 * len(before)  # a bias that cancels in a normalization has no gradient


# ---- the scorer


def gallery(folder, shown, count=5):
    """Folders as the attack writes them, in which ``shown`` of the images of every step are
    mosaics.
    """
    yes, no = (
        sample(concept("mosaic"), 3, count).images,
        sample(Subset(("fox", "panda")), 4, count).images,
    )
    for step, some in zip((0, 10, 20, 40), shown, strict=True):
        (folder / f"step_{step:05d}").mkdir(parents=True)
        for i in range(count):
            image = (yes if i < some else no)[i].permute(1, 2, 0).numpy()
            Image.fromarray(image).save(folder / f"step_{step:05d}" / f"{i:02d}.png")
    return str(folder)


def test_the_scorer_counts_and_compares(tmp_path, capsys):
    baseline, immunized = (
        gallery(tmp_path / "c", (0, 3, 5, 5)),
        gallery(tmp_path / "i", (0, 0, 3, 5)),
    )
    file = tmp_path / "figures.csv"
    more = ("--csv", str(file), "--label", "LoRA")
    for _ in range(2):
        load(SCORER).main(["mosaic", "--immunized", immunized, "--baseline", baseline, *more])
    out = capsys.readouterr().out
    assert "baseline   mosaic shown at step 0: 0 %, 10: 60 %, 20: 100 %, 40: 100 %" in out
    assert "steps to relearn, baseline: 10 " in out
    assert "steps to relearn, immunized: 20 " in out
    assert "steps_to_relearn_ratio_mosaic: 2 [" in out
    head, *lines = file.read_text().splitlines()
    assert head == "attack,concept,figure,value,low,high,bound,n"
    assert len(lines) == 6
    assert lines[2].startswith("LoRA,mosaic,steps_to_relearn_ratio_mosaic,2.0,")
