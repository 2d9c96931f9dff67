"""Changes of attention weights that leave a U-Net's function equal."""

import torch
from tiny_diffusion import tiny_diffusion

from lab.models.symmetries import canonicalize, reparametrize


def _predicts(model):
    with torch.no_grad():
        text = model.text(["a fox", "a cat"])
        return model.predict(model.latents(2, 0, "test"), torch.tensor([5, 500]), text)


def _distance(a, b):
    pairs = zip(a.unet.parameters(), b.unet.parameters(), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


def test_a_reparametrization_is_exact_and_the_canonical_form_does_not_depend_on_it():
    model = tiny_diffusion()
    changed, canonical = model.copy(), model.copy()
    reparametrize(changed.unet, 3, seed=0)
    canonicalize(canonical.unet)
    assert min(_distance(changed, model), _distance(canonical, model)) > 1e-2
    assert torch.equal(_predicts(changed), _predicts(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_predicts(changed), _predicts(model))
    torch.testing.assert_close(_predicts(canonical), _predicts(model), rtol=1e-4, atol=1e-5)
    canonicalize(changed.unet)
    assert _distance(changed, canonical) < 1e-4
