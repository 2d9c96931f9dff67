"""Choices of `conf/`: composed, at sizes that take seconds, and models and cases for them.

Where keys of `conf/` get other names, change the tables below.
"""

import re
import tempfile
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny_diffusion import tiny_case, tiny_diffusion

import run  # noqa: F401 - registers the resolvers of the configuration
from attacks.probes.optimizers import OPTIMIZERS
from lab.core.sources import ROOT
from lab.models.linear import LinearBackbone

# Options that make a case tiny. They apply where a preset has the key. No learning rate is changed,
# except where a preset diverges on the tiny data: see `OWN`.
SMALL = {
    "immunize/linear": {"epochs": 2, "steps": 4, "batch_size": 16, "log_points": 3},
    "immunize/deep": {"epochs": 1, "steps": 3, "batch_size": 16, "log_points": 3},
    "immunize/diffusion": {
        "steps": 2,
        "batch_size": 2,
        "prior_batch_size": 2,
        "cap": None,
        "inner_batch_size": 2,
        "k_min": 1,
        "k_max": 2,
        "decoys": 4,
        "decoy_steps": 2,
        "keep_samples": 6,
        "target_samples": 4,
        "sampling_steps": 1,
    },
    "attacks/linear": {"lr_trials": 3, "batch_size": 16},
    "attacks/deep": {"lr_trials": 3, "batch_size": 16},
    "attacks/diffusion": {
        "batch_size": 2,
        "sampling": {"sampler": "ddim", "steps": 1, "guidance": 2.0, "count": 2, "negative": ""},
    },
    "eval/diffusion": {"count": 8},
}

# Options of single presets, beyond those of `SMALL`.
OWN = {  # with their own lr the weights leave the finite numbers
    "immunize/kappa_paper_house_price": {"lr": 1e-9},
    "immunize/kappa_paper_mnist": {"lr": 1e-9},
    "immunize/kappa_clamp": {"lr": 1e-3},  # kappa_clamp_deep has it
}


# Options that name a model by path: here another tiny one.
PATHS = {"attacks/lora_transplant": "donor", "attacks/interpolate": "base"}


@cache
def tiny_folder():
    """Save a tiny text-to-image model of other weights, for this process, and return its folder."""
    other = tiny_diffusion().copy()
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.mul_(0.9)
    return str(other.save(Path(tempfile.mkdtemp(prefix="tiny-")) / "model"))


def composed(*overrides, config="config", **options):
    """Compose the configuration; ``options`` are those of `hydra.compose`."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(config, overrides=list(overrides), **options)


# the empty list, metrics with a detector of their own or a text encoder, methods that read weights
# which are not included or fit MiniSD only, and a chain of presets that are tested alone
LEFT_OUT = {("attacks", "none"), ("eval", "false_positives"), ("eval", "target_similarity")} | {
    ("immunize", name)
    for name in (
        "retrained",
        "other_seed",
        "stored",
        "joint_stored",
        "joint_stored_uce",
        "mima_deep_stored",
        "undo_mima_deep",
        "mima_deep_joint",
        "retrained_joint",
        "retrained_mima_deep",
    )
}


def presets(group):
    """List the choices of a group, without `LEFT_OUT`."""
    names = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
    return [name for name in names if (group, name) not in LEFT_OUT]


@cache
def nodes(group):
    """Compose every preset of a group once."""
    names = presets(group)
    if group in ("attacks", "eval"):
        found = composed(f"{group}=[{','.join(names)}]")[group]
    else:
        found = {name: composed(config=f"{group}/{name}")[group] for name in names}
    for name in names:
        OmegaConf.set_struct(found[name], False)
    return found


def build(group, name, kind="", **objects):
    """Instantiate a preset with the small options of its group and kind."""
    node = nodes(group)[name]
    small = {**SMALL.get(f"{group}/{kind}", {}), **OWN.get(f"{group}/{name}", {})}
    kept = {key: value for key, value in small.items() if node.get(key) is not None}
    if f"{group}/{name}" in PATHS:
        kept[PATHS[f"{group}/{name}"]] = tiny_folder()
    if node.get("attackers") is None:  # k_min and k_max belong to drawn attackers
        kept = {key: value for key, value in kept.items() if not key.startswith("k_")}
    optimizer = OPTIMIZERS.get(node.get("optimizer"))
    if optimizer is not None and not optimizer.uses_rate:
        kept.pop("lr_trials", None)
    merged = OmegaConf.merge(node, kept)
    for key in objects:  # Hydra would turn the objects into options
        del merged[key]
    return instantiate(merged, _partial_=True, _convert_="all")(**objects)


def outline(node):
    """Reduce options to those that choose code: of numbers only whether they are 0."""
    if isinstance(node, dict):
        return {key: outline(value) for key, value in node.items() if key != "name"}
    if isinstance(node, list):
        return list(map(outline, node))
    return bool(node) if isinstance(node, int | float) else node


@cache
def repetitions(group, by_class=True):
    """List presets of the class of another one, which has the name of the class or is the first;
    else those that differ from an earlier one in numbers alone. Short forms (``_quick``) are among
    them.
    """
    first = {}
    for name in presets(group):
        node = OmegaConf.to_container(nodes(group)[name])
        own = re.sub("(?<!^)(?=[A-Z])", "_", node["_target_"].rpartition(".")[2]).lower()
        key = node["_target_"] if by_class else repr(outline(node))
        if key not in first or (by_class and own == name):
            first[key] = name
    return {n for n in presets(group) if n not in first.values() or n.endswith("_quick")}


def param(group, name, *more):
    """Return (name, *more) as a case of a test; those after the first of a class are slow."""
    return pytest.param(name, *more, marks=[pytest.mark.slow] if name in repetitions(group) else [])


@cache
def kinds(group, name):
    """List the kinds of model that a preset takes."""
    accepted = build(group, name).accepts
    return [
        kind
        for kind in ("linear", "deep", "diffusion")
        if kind in accepted and not (kind == "linear" and name.endswith("_deep"))  # names blocks
    ]


def problem(kind, labelled=False, harmful=1, dtype=torch.float32):
    """Return a tiny model of a kind and a case for it; ``dtype`` is that of a diffusion model."""
    if kind == "linear":
        case = tiny.linear_case(harmful=harmful)
        return LinearBackbone().build(case, 0), tiny.linear_classes() if labelled else case
    if kind == "deep":
        return tiny.tiny_net(), tiny.image_case(harmful=harmful)
    return tiny_diffusion(dtype=dtype), tiny_case()
