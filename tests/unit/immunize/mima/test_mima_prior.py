"""What must stay as it is: where its images come from, and its place in the released inner
loop.
"""

import dataclasses
from functools import cache

import pytest
import torch
from mima_examples import case, objective, preset, rows_of, with_targets
from tiny_diffusion import tiny_diffusion

from immunize.gradients import gradient_at
from immunize.merge.build import scope_names
from lab.core.data import CaptionedImages

unchanged = cache(lambda: rows_of(preset("mima_released", steps=1, prior="keep"))[1])


@pytest.mark.parametrize("changes", [{}, pytest.param({"prior": "class"}, marks=pytest.mark.slow)])
def test_the_prior_has_the_images_of_its_source(changes):
    """A case whose unrelated images are exactly these gives the same run; the preset asks for
    both.
    """
    classes = [target.prior for target in case().targets]
    parts = classes if changes else [case().keep, *classes]
    _, rows = rows_of(preset("mima_released", steps=1, **changes))
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    joined = CaptionedImages(torch.cat([part.images for part in parts]), prompts)
    same = dataclasses.replace(case(), keep=joined)
    assert rows_of(preset("mima_released", steps=1, prior="keep"), on=same)[1] == rows
    assert unchanged() != rows


@pytest.mark.parametrize("changes", [{}, {"prior": False}])
def test_the_released_inner_loop_descends_the_prior_too(changes):
    """One SGD step on L(x^l) + w_prior · L(x^prior), or on L(x^l) alone, by hand; one concept needs
    no merge.
    """
    exact, alone = tiny_diffusion(dtype=torch.float64), with_targets(case().targets[:1])
    method = preset("mima_released", w_prior=2.0, inner_loop={"lr": 0.5, **changes})
    made, theta = objective(method, exact, alone)
    start = {name: value.clone() for name, value in theta.items()}
    concept = made.concepts[0]
    own = concept.inner.batch(2, 0, concept.name, 1, "lower", 0)
    prior = made.setup.prior.batch(2, 0, concept.name, 1, "prior", 0)

    def loss(weights):
        value = made.denoiser.loss(own, weights)
        return value if changes else value + 2.0 * made.denoiser.loss(prior, weights)

    _, gradient = gradient_at(loss, start, {}, scope_names(exact.unet, "kv"))
    made.gradient(theta, 1)
    stepped = {name: start[name] - 0.5 * g for name, g in gradient.items()}
    found = {name: theta[name] for name in gradient}
    torch.testing.assert_close(found, stepped, rtol=1e-9, atol=1e-12)
