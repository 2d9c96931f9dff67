"""Decoys of ``mima_deep``: what the original paints for a concept's captions, and their term of the
gradient.
"""

import pytest
import torch
from mima_examples import case, model, preset, with_targets
from mima_examples import objective as deep_objective

from immunize.gradients import gradient_at
from immunize.mima.sampling import Pool, split_concept
from lab.core.data import CaptionedImages, Sampling

ALONE = {
    "evaluate": ["own"],
    "w_prior": 0.0,
    "w_distill": 0.0,
    "w_benign": 0.0,
    "cap": None,
    "at": [1.0],
}


def objective(**changes):
    method = preset("mima_deep", **{**ALONE, "online": False, **changes})
    return deep_objective(method, on=with_targets(case().targets[:1]))


def test_decoys_are_what_the_original_paints_for_the_concepts_captions():
    concept = case().targets[0]
    found = split_concept(model(), concept, 3, torch.float32, Sampling(count=3, steps=5)).decoys
    prompts = tuple(concept.own.prompts[i % len(concept.own)] for i in range(3))
    images = model().generate(
        prompts, model().latents(3, 3, "mima", "decoys", concept.name), Sampling(steps=5)
    )
    want = Pool.encode(model(), CaptionedImages(images, prompts), torch.float32)
    assert torch.equal(found.z, want.z)
    assert torch.equal(found.text[found.caption].hidden, model().text(list(prompts)).hidden)


def test_the_term_is_the_decoys_loss_at_the_attacked_weights():
    """By hand: the difference to the gradient without it, at the weights that the same attack has
    reached.
    """
    whole, theta = objective(w_decoy=2.0, decoys=3)
    without, other = objective(w_decoy=0.0)
    found, seen = whole.gradient(theta, 2)
    none, _ = without.gradient(other, 2)
    target = whole.concepts[0]
    point = whole._strongest(theta, target, 2)[1][-1].weights
    template = whole.config.draw(0, target.name, 2).template
    batch = target.decoys.template(template).batch(2, 0, target.name, 2, "decoys", 0)
    value, gradient = gradient_at(
        lambda weights: whole.denoiser.loss(batch, weights), theta, point, whole.outer_names
    )
    assert seen["decoy_loss"] == pytest.approx(value)
    assert max(float(g.abs().max()) for g in gradient.values()) > 0
    term = {name: (found[name] - none[name]) / 2 for name in gradient}
    torch.testing.assert_close(term, gradient, rtol=1e-3, atol=5e-6)
