"""Negative controls of a table."""

import pytest
import tiny
from presets import build
from tiny_diffusion import tiny_case, tiny_diffusion


def test_noise_has_the_stated_size_and_leaves_vectors() -> None:
    method, model = build("immunize", "weight_noise", relative=0.1), tiny_diffusion()
    noisy = method(model, tiny_case(), seed=0, checkpoint=None, log=tiny.no_log)
    before = dict(model.unet.named_parameters())
    for name, weight in noisy.unet.named_parameters():
        change = weight.detach() - before[name].detach()
        if weight.ndim == 1:
            assert not change.any()
        elif weight.numel() > 500:
            size = change.square().mean().sqrt() / before[name].detach().square().mean().sqrt()
            assert float(size) == pytest.approx(0.1, rel=0.15)
