"""What immunization does to a model of random weights: the concept is harder to learn."""

import pytest
import torch
from mima_examples import LORA, attacker, case, model, preset, run, with_targets

from immunize.merge.build import scope_names
from immunize.mima.deep import InnerAttack
from immunize.mima.outer_loop import Denoiser
from immunize.mima.sampling import split_concept

ATTACK = attacker(scope="attn2", rank=2, lr=1e-2, optimizer="adamw", steps=4)
ALONE = {"lora": {**LORA, "optimizer": "adamw"}, "kv": None, "full": None}
FAST = {
    "mima": {"inner_loop": {"lr": 3.0}},
    "mima_deep": {
        "attackers": ALONE,
        "evaluate": ["own"],
        "w_benign": 0.0,
        "w_distill": 0.0,
        "w_decoy": 0.0,
    },
}


def after_attack(some):
    """Loss of the first target, outer half, after a short attack on its inner half; equal batches
    for every model.
    """
    own = split_concept(some, case().targets[0], 0, torch.float32)
    theta = dict(some.unet.named_parameters())
    denoiser = Denoiser(some, theta)
    moves = scope_names(some.unet, "attn2")
    mark = InnerAttack(denoiser.loss, theta, moves, ATTACK, own.inner, 4, 0, "test").advance(4)
    with torch.no_grad():
        return float(denoiser.loss(own.outer.batch(16, 1, "test"), mark.weights))


@pytest.mark.parametrize("name", [pytest.param("mima", marks=pytest.mark.slow), "mima_deep"])
def test_the_loss_after_an_attack_rises(name):
    alone = with_targets(case().targets[:1])
    method = preset(name, steps=16, lr=5e-2, clip=None, w_prior=0.0, **FAST[name])
    assert after_attack(run(method, on=alone)) > 1.03 * after_attack(model())
