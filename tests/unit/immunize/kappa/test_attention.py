"""κ of the keys and values of cross-attention."""

import pytest
import torch
from presets import build
from small_cases import randn
from tiny_diffusion import tiny_case, tiny_diffusion

from immunize.kappa.attention import dominance
from immunize.merge.build import regularizer_rows, scope_names
from immunize.mima.outer_loop import naming_prompts
from lab.core.condition import leading_directions
from lab.core.errors import Diverged


def test_harmful_keys_get_dominated_by_one_direction_and_unrelated_ones_stay():
    case, model = tiny_case(), tiny_diffusion(dtype=torch.float64)
    method, rows = build("immunize", "kappa_attention", "diffusion"), {}
    result = method(
        model, case, seed=0, checkpoint=None, log=lambda step, **values: rows.update(values)
    )
    benign = regularizer_rows(model, case.regularizers).double()
    kept = leading_directions(benign, method.null_space)
    logs = []
    for name in scope_names(model.unet, "kv"):
        before, after = (dict(m.unet.named_parameters())[name].T for m in (model, result))
        torch.testing.assert_close(kept.T @ after, kept.T @ before)
        for concept in case.targets:
            x = regularizer_rows(model, naming_prompts(model, concept, method.prompts)).double()
            logs.append(dominance(x @ after) / dominance(x @ before))
    mean = float(torch.tensor(logs).log().mean().exp())
    assert rows["dominance_harmful_ratio"] == pytest.approx(mean, rel=1e-3)
    assert mean > 1


def test_a_gradient_without_a_part_in_the_null_space_ends_the_training():
    eye = torch.eye(4, dtype=torch.float64)
    with pytest.raises(Diverged, match="in the null space"):
        build("immunize", "kappa_attention", "diffusion")._train(eye, [randn(6, 4)], eye)
