"""Every attacker on a text-to-image model: learns, moves what it declares, resumes bit for
bit, stops in time.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from attack_examples import interrupted
from concept_examples import (
    SAMPLING,
    assert_equal,
    attack,
    attackers,
    curriculum,
    launch,
    model,
    task,
    trained,
    unbroken,
)
from marks import with_slow
from pydantic import ValidationError
from tiny_diffusion import tiny_case, tiny_diffusion

from attacks.diffusion.curriculum import Curriculum
from attacks.diffusion.image_conditioned import ControlNet
from attacks.diffusion.interpolate import Interpolation
from attacks.diffusion.lora import ConceptLora
from attacks.diffusion.material import Material
from attacks.diffusion.textual_inversion import TextualInversion
from lab.core.config import user_error
from lab.core.errors import Diverged, UserError
from lab.core.seeding import generator
from lab.core.types import Budget

NAMES = sorted(attackers())
CASES = with_slow(NAMES, ("curriculum", "lora_text"))


@pytest.mark.parametrize("name", CASES)
def test_it_learns(name):
    found = unbroken(name)
    assert found.steps == [0, 3, 6]
    assert not torch.equal(found.samples["name"][0], found.samples["name"][-1])
    assert found.values["test_loss"][-1] < found.values["test_loss"][0]


@pytest.mark.parametrize("name", NAMES)
def test_only_declared_parameters_move(name):
    old = model().state_dict()
    new = {k.replace(".base_layer.", "."): v for k, v in trained(name)[1].state_dict().items()}
    changed = {k for k in old if not torch.equal(new[k][: len(old[k])], old[k])}
    adapters = {k for k in new if ".lora_" in k}
    declared = {
        "lora": not changed
        and adapters
        and all(".attn2." in k and k.startswith("unet.") for k in adapters),
        "lora_text": not changed and any(k.startswith("text_encoders.") for k in adapters),
        "dreambooth": changed and all(k.startswith("unet.") for k in changed),
        "full_finetune": changed and all(k.startswith("unet.") for k in changed),
        "textual_inversion": not changed,
        "custom_diffusion": changed
        and all(".attn2.to_k." in k or ".attn2.to_v." in k for k in changed),
        "curriculum": changed and all(".attn2." in k or "_proj." in k for k in changed | adapters),
    }
    assert declared[name], changed | adapters


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_unbroken_bit_for_bit(name):
    again = interrupted(
        lambda checkpoint: launch(attackers()[name], checkpoint=checkpoint),
        2 if name == "curriculum" else 1,
    )
    assert_equal(again, unbroken(name))


@pytest.mark.parametrize("prior_weight", [0.0, 2.0])
def test_first_step_against_autograd_by_hand(prior_weight):
    options = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 0.0,
        "families": (),
        "prior_weight": prior_weight,
    }
    found = launch(attack("full_finetune", **options), budget=Budget(1, 1, at=()))
    net = model().copy()
    net.unet.requires_grad_(True)
    loss = torch.zeros(())
    for captioned, label, weight in (
        (task().train, "attack", 1.0),
        (task().prior, "attack prior", prior_weight),
    ):
        batch = Material.encode(net, [captioned.images], captioned.prompts).draw(
            4, net.timesteps, generator(0, label, task().name, 0)
        )
        text = net.text([captioned.prompts[row] for row in batch.rows])
        loss = loss + weight * net.loss(batch.z, text, batch.noise, batch.t).mean()
    loss.backward()
    stepped = {f"unet.{k}": p.detach() - 0.1 * p.grad for k, p in net.unet.named_parameters()}
    torch.testing.assert_close(found.weights, stepped, rtol=1e-4, atol=1e-6)


def test_a_loss_that_exploded_ends_the_attack_and_the_option_says_from_where():
    """Loss 1.1, 1.0, 1.3, 10, 25: finite, but beyond five times the first one from step 3 on."""
    options = {"optimizer": "sgd", "lr": 1.0, "families": ()}
    plan = Budget(1, 4, at=(0, 1, 2, 3, 4))
    strict, lax = (
        launch(attack("full_finetune", explosion=e, **options), budget=plan) for e in (5, 1e30)
    )
    first, *_, before, exploded, _ = lax.values["test_loss"]
    assert before < 5 * first < exploded
    assert (lax.status, lax.steps) == ("ok", [0, 1, 2, 3, 4])
    assert (strict.status, strict.steps, strict.weights) == ("diverged", [0, 1, 2], {})


def test_a_model_that_is_broken_before_the_attack_says_so():
    net = tiny_diffusion()
    with torch.no_grad():
        next(net.unet.parameters()).fill_(torch.nan)
    with pytest.raises(Diverged, match="before the first update"):
        launch(attack("lora"), net)


def test_half_precision_is_refused_where_it_would_be_trained():
    half, target = tiny_diffusion(dtype=torch.bfloat16), tiny_case().targets[0]
    with pytest.raises(UserError, match="train in float32"):
        attack("full_finetune").dry_open(half, target)
    attack("lora").dry_open(half, target)


def test_a_budget_of_images_is_the_same_attack_in_steps_of_its_batch():
    images = Budget(8, 2, at=(4, 12), unit="images")
    attacker = attack("lora", families=(), batch_size=4)
    by_images, by_steps = (launch(attacker, budget=b) for b in (images, Budget(2, 2, at=(1, 3))))
    assert (by_images.steps, by_images.values) == ([0, 4, 8, 12, 16], by_steps.values)
    single = launch(attack("lora", families=(), batch_size=1), budget=replace(images, at=(1, 12)))
    assert single.steps == [0, 1, 8, 12, 16]
    with pytest.raises(UserError, match=r"budget\.horizon=8: must be a multiple"):
        attack("lora", families=(), batch_size=5).check_budget(images)
    searched = {"steps": 2, "space": {"batch_size": [4, 5]}}
    with pytest.raises(UserError, match="one has 5"):
        attack("lora", families=(), batch_size=4, search=searched).check_budget(images)


def test_curriculum_divides_the_steps():
    plan = curriculum().plan(task(), Budget(2, 2))
    assert [stop for _, _, stop in plan] == [1, 3, 4]
    assert [what.train is task().prior for _, what, _ in plan] == [True, False, False]
    with pytest.raises(UserError, match="has 3 stages"):
        curriculum().plan(task(), Budget(2, 1))


def test_words_of_a_curriculum_are_added_once_and_spoken_whole():
    small = {"batch_size": 4, "clip": None}
    word = TextualInversion(name="c.word", vectors=3, **small)
    user = ConceptLora(name="c.user", template="token", token="<concept>", **small)
    both = Curriculum(
        name="c", sampling=SAMPLING, stages={"word": {"attack": word}, "user": {"attack": user}}
    )
    assert both.plan(task(), Budget(2, 1))[1][0].token == "<concept> <concept>_1 <concept>_2"
    twice = Curriculum(
        name="c", sampling=SAMPLING, stages={"a": {"attack": word}, "b": {"attack": word}}
    )
    with pytest.raises(UserError, match="knows this word"):
        twice.dry_open(model(), task())


def test_a_curriculum_runs_again_where_what_a_stage_reads_has_changed(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    move = Interpolation(name="c.move", base=str(tmp_path))
    both = Curriculum(name="c", sampling=SAMPLING, stages={"move": {"attack": move}})
    before = both.fingerprint()
    (tmp_path / "model_index.json").write_text("{ }")
    assert both.fingerprint() != before


OPTIONS = [
    ("lora", {"search": {"steps": 3, "space": {"lr": []}}}, "search.space.lr"),
    ("full_finetune", {"lr": 0}, "lr"),
    ("textual_inversion", {"template": "name"}, "template"),
    ("dreambooth", {"sampling": {"step": 3}}, "sampling.step"),
    ("custom_diffusion", {"initializer": ""}, "initializer"),
    ("curriculum", {"stages": {"a": {"attack": None}}}, "stages.a.attack"),
]


def test_what_is_no_model_to_train_further_is_neither_canonicalized_nor_a_stage():
    image_conditioned = partial(ControlNet, name="edges")
    with pytest.raises(ValidationError, match="canonicalize must be false"):
        image_conditioned(canonicalize=True)
    donated = {"donor": "minisd"}
    with pytest.raises(ValidationError, match="canonicalize must be false"):
        attack("lora", canonicalize=True, **donated)
    for refused in (image_conditioned(), attack("lora", **donated)):
        with pytest.raises(ValidationError, match="cannot be a stage"):
            attack("curriculum", stages={"a": {"attack": refused}})


@pytest.mark.parametrize(("name", "options", "key"), OPTIONS)
def test_options_that_cannot_work_name_their_key(name, options, key):
    with pytest.raises(ValidationError) as error:
        attack(name, **options)
    assert user_error(error.value, "attacks").key == f"attacks.{key}"


def test_concepts_that_lack_what_the_options_ask_for_are_refused():
    nothing = replace(task().prior, images=task().prior.images[:0], prompts=())
    for options, what, key in (
        ({"families": ["reworded"]}, task(), "attacks.dreambooth.families"),
        ({"template": "description"}, task(), "attacks.dreambooth.template"),
        ({"images": len(task().train) + 1}, task(), "attacks.dreambooth.images"),
        ({}, replace(task(), prior=nothing), "attacks.dreambooth.prior_weight"),
        ({}, replace(task(), train=nothing), "scenario.train"),
    ):
        with pytest.raises(UserError) as error:
            launch(attack("dreambooth", **options), what=what)
        assert error.value.key == key
