"""Distillation into a noised copy."""

from dataclasses import replace

import pytest
import tiny
import torch
from assertions import same_weights
from attack_examples import interrupted
from presets import build
from tiny_diffusion import tiny_case, tiny_diffusion

from immunize.merge.build import scope_names
from immunize.undo import _captions, noised_copy
from lab.core.errors import UserError
from lab.core.seeding import generator


def method(**options):
    return build("immunize", "undo", "diffusion", **options)


def test_start_is_a_mean_of_weights_and_noise() -> None:
    model = tiny_diffusion()
    start = noised_copy(model, 0.25, 0.1, seed=3).unet.state_dict()
    for name, weight in model.unet.named_parameters():
        noise = torch.zeros(weight.shape)
        if weight.ndim > 1:
            torch.nn.init.xavier_uniform_(noise, generator=generator(3, "undo noise", name))
        assert torch.allclose(start[name], 0.75 * weight + 0.025 * noise, atol=1e-6)
    assert same_weights(noised_copy(model, 0.0, 0.1, seed=3), model)


def test_targets_mean_their_anchors_and_everything_else_itself() -> None:
    """Erased concepts that are no targets are kept."""
    found = _captions(method(keep_samples=40, target_samples=4), tiny_case(), seed=0)
    assert len(found) == 40 + 2 * 4
    assert all(asked == meant for asked, meant in found[:40])
    assert any("halftone" in asked for asked, _ in found[:40])
    assert not any("mosaic" in meant or "neon" in meant for _, meant in found)
    for asked, meant in found[40:]:
        assert "mosaic" in asked or "neon" in asked
        assert meant in ("a photo of a fox", "a photo of a panda")
        assert ("fox" in asked) == ("fox" in meant)


def test_keys_and_values_of_cross_attention_can_stay() -> None:
    model = tiny_diffusion()
    undo = method(steps=2, batch_size=4, keep_samples=8, target_samples=2, keep_text_layers=True)
    student = undo(model, tiny_case(), seed=0, checkpoint=None, log=tiny.no_log)
    old, new = (dict(net.unet.named_parameters()) for net in (model, student))
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == set(scope_names(model.unet, "kv"))


@pytest.mark.slow  # a training
def test_the_student_comes_to_predict_what_the_teacher_does() -> None:
    rows = []
    undo = method(steps=120, batch_size=8, lr=3e-3, warmup=5, alpha=0.3)
    undo(
        tiny_diffusion(),
        tiny_case(),
        seed=0,
        checkpoint=None,
        log=lambda step, **values: rows.append(values["distillation_loss"]),
    )
    assert rows[-1] < 0.5 * rows[0]


def test_a_resumed_distillation_repeats_the_unbroken_one() -> None:
    undo = method(steps=6, batch_size=4, checkpoint_every=3)

    def start(checkpoint):
        return undo(tiny_diffusion(), tiny_case(), seed=0, checkpoint=checkpoint, log=tiny.no_log)

    assert same_weights(start(None), interrupted(start, fail_at=2))


def test_what_was_never_known_cannot_be_undone() -> None:
    case = tiny_case()
    with pytest.raises(UserError, match="neon is not erased"):
        method().check((replace(case, erased=case.erased[:1]),))
