"""What the tests of the concept immunizers share: presets at tiny sizes, one model, one case."""

import dataclasses
from contextlib import contextmanager
from functools import cache

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from presets import composed
from tiny import no_log
from tiny_diffusion import tiny_case, tiny_diffusion

from immunize.mima.inner_loop import DrawnAttacker, InnerLoopOptions
from immunize.mima.outer_loop import Setup

PRESETS = ("mima", "mima_first_order", "joint", "compose", "imma", "mima_released", "mima_deep")
LORA = {"kind": "lora", "scopes": ["attn2"], "ranks": 2, "lr": 1e-2}
model = cache(tiny_diffusion)
case = cache(tiny_case)
default = cache(lambda name: composed(f"immunize={name}").immunize)  # read only


def preset(name, **changes):
    """``conf/immunize/NAME.yaml`` for two steps of two images. Random weights have losses above
    any useful cap.
    """
    node = OmegaConf.merge(default(name))
    OmegaConf.set_struct(node, False)
    small = {"steps": 2, "batch_size": 2, "prior_batch_size": 2, "cap": None}
    if name == "mima_deep":
        small |= {"k_min": 1, "k_max": 4, "inner_batch_size": 2, "decoys": 4, "decoy_steps": 2}
    return instantiate(OmegaConf.merge(node, {**small, **changes}), _convert_="all")


def attacker(**settings):
    """A drawn attacker that writes plain captions."""
    return DrawnAttacker(InnerLoopOptions(**{"scope": "all", **settings}), "name")


def objective(method, of=None, on=None, seed=0):
    """Return what one outer step of ``method`` descends, and θ."""
    setup = Setup(method, of or model(), on or case(), seed)
    runs, merges, _ = setup.arrange()
    theta = setup.restart()
    return method.objective(setup, runs[0], merges[0]), theta


@contextmanager
def kept():
    """Sizes of the activations that graphs made inside keep for their backward pass."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def run(immunizer, *, of=None, on=None, seed=0, checkpoint=None, log=no_log):
    return immunizer(of or model(), on or case(), seed=seed, checkpoint=checkpoint, log=log)


def rows_of(immunizer, **options):
    rows = []
    return run(immunizer, log=lambda step, **values: rows.append((step, values)), **options), rows


def moved(after, before):
    new, old = after.state_dict(), before.state_dict()
    return {name for name, value in new.items() if not torch.equal(value, old[name])}


def with_targets(some):
    return dataclasses.replace(case(), targets=tuple(some))
