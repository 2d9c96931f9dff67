"""What a step of an immunizer sees: batches, splits, captions by template."""

import dataclasses

import torch
from mima_examples import case, model, objective, preset

from immunize.mima.outer_loop import Denoiser
from immunize.mima.sampling import WORDS, Batch, Pool, split_concept
from lab.core.prompts import captions, class_words


def test_batches_are_reproducible_and_cover_all_timesteps():
    pool = Pool.encode(model(), case().keep, torch.float32)
    first, again, other = (pool.batch(8, 0, label) for label in ("a", "a", "b"))
    assert all(
        torch.equal(getattr(first, f.name), getattr(again, f.name))
        for f in dataclasses.fields(Batch)[2:]
    )
    assert not torch.equal(first.noise, other.noise)
    assert sorted((first.t * 8 // 1000).tolist()) == list(range(8))


def test_splits_are_disjoint():
    target = case().targets[0]
    half = split_concept(model(), target, 0, torch.float32)
    everything = {z.numpy().tobytes() for part in (half.inner, half.outer) for z in part.z}
    assert len(everything) == len(target.own)


def hidden(pool: Pool) -> torch.Tensor:
    return pool.text[pool.caption].hidden


def test_templates_give_the_same_images_other_captions():
    target = dataclasses.replace(
        case().targets[0], prompts={"name": ("a mosaic",), "description": ("a panda",)}
    )
    half = split_concept(
        model(), target, 0, torch.float32, templates=["name", "token 1", "description"]
    )
    for pool in (half.inner, half.outer):
        assert torch.equal(pool.template("token 1").z, pool.z)
        assert torch.equal(hidden(pool.template("name")), hidden(pool))
        assert torch.allclose(
            hidden(pool.template("description")), model().text(["a panda"]).hidden, atol=1e-5
        )
    asked = captions(target, target.own, "token", f"{WORDS[1]} {class_words(target)}".strip())
    expected = model().text(asked).hidden
    assert all(
        any(torch.allclose(h, e, atol=1e-5) for e in expected)
        for h in hidden(half.inner.template("token 1"))
    )


def test_the_outer_loop_asks_as_the_attacker_taught(monkeypatch):
    """Held-out images, decoys and practice concepts get the captions of the attack that they
    follow.
    """
    method = preset(
        "mima_deep",
        attackers={
            "full": {
                "kind": "weights",
                "scopes": ["attn2"],
                "lr": 1e-3,
                "templates": ["token"],
                "words": 3,
            },
            "lora": None,
            "kv": None,
        },
        k_min=1,
        k_max=1,
        w_prior=0.0,
        w_distill=0.0,
        online=False,
        at=[1.0],
        evaluate=["own"],
    )
    made, theta = objective(method)
    seen, loss = [], Denoiser.loss

    def spy(self, batch, weights):
        seen.append(batch.text.hidden)
        return loss(self, batch, weights)

    monkeypatch.setattr(Denoiser, "loss", spy)
    made.gradient(theta, 0)
    concepts = [*case().targets, *case().rehearsal]
    asked = []
    for c in concepts:
        word = WORDS[int(method.draw(0, c.name, 0).template.removeprefix("token "))]
        asked.append(captions(c, c.own, "token", f"{word} {class_words(c)}".strip()))
    taught = model().text(sorted({caption for some in asked for caption in some})).hidden
    rows = torch.cat(seen)
    assert len(rows) > 2 * len(concepts)
    assert all(any(torch.allclose(row, known, atol=1e-5) for known in taught) for row in rows)
