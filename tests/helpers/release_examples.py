"""A run of the tiny text-to-image model from a folder, attacked by LoRA, with a record and a stage
cache.
"""

import torch
from presets import composed as composed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_diffusion import draw_images, tiny_diffusion

from lab.minisd.world import folders
from lab.minisd.world.world import concept
from lab.runner.experiment import run_once


def concept_folder(folder, name, count=6):
    found = draw_images(concept(name), 1, count)
    return folders.write(
        folder,
        found.images,
        [{"file_name": f"{i}.png", "text": t} for i, t in enumerate(found.prompts)],
    )


def world(root, backbone, *overrides):
    """Overrides of a run on ``backbone`` with one target and one other concept from folders, in
    seconds.
    """
    rows = []
    for name, role in (("mosaic", "harmful"), ("neon", "benign")):
        if not (root / name).is_dir():
            concept_folder(root / name, name)
        rows.append(
            f"{{path: {name}, name: {name}, role: {role}, kind: style, words: {name}, "
            f"prompts: [a fox in the style of {name}], erase: true, anchor: photo}}"
        )
    return [
        "experiment=relearn",
        "backbone=minisd",
        f"backbone.path={backbone}",
        "scenario=folder",
        f"scenario.root={root}",
        f"scenario.concepts=[{', '.join(rows)}]",
        "scenario.sampling={steps: 2, guidance: 2.0, count: 4, negative: ''}",
        "scenario.keep_images=4",
        "scenario.unrelated_images=4",
        "scenario.regularizers=8",
        "immunize=mima",
        "immunize.steps=2",
        "immunize.batch_size=2",
        "immunize.prior_batch_size=2",
        "attacks=[lora]",
        "attacks.lora.batch_size=2",
        "eval=[relearning]",
        "budget.horizon=2",
        "budget.multiple=2",
        "budget.at=[0,2,4]",
        "tracker=none",
        f"paths.outputs={root / 'outputs'}",
        "threads=1",
        *overrides,
    ]


def tiny_folder(folder, seed=0):
    """Diffusers layout, random weights."""
    return tiny_diffusion(seed).save(folder)


def finished(root):
    """The record of a finished run below ``root``."""
    path = run_once(composed(*world(root, tiny_folder(root / "base"))), root / "run")
    assert path is not None
    torch.set_num_threads(1)
    return path


def options(run_folder, *more):
    """Config of an export of (root, record file)."""
    root, path = run_folder
    return composed("action=export", f"records={path}", f"paths.outputs={root / 'outputs'}", *more)


def move(file, name=None, by=0.5):
    """Change one tensor of a file, and nothing else."""
    tensors = load_file(file)
    name = name or next(k for k, v in sorted(tensors.items()) if v.is_floating_point())
    tensors[name] = tensors[name] + by
    with safe_open(file, "pt") as handle:
        save_file(tensors, file, handle.metadata())
