"""Captions, prompts and images as the attackers see them."""

from dataclasses import replace

import torch
from concept_examples import attack, model, task

from attacks.diffusion.attack import ConceptLearner
from attacks.diffusion.material import Material, variants
from lab.core.data import CaptionedImages
from lab.core.prompts import captions, class_words, spoken
from lab.core.seeding import generator


def test_words_are_replaced_whole_in_any_case_and_in_the_plural() -> None:
    assert spoken("a Unicorn by two unicorns", "unicorn", "sks") == "a sks by two sks"
    assert spoken("a unicornish thing", "unicorn", "sks") == "sks, a unicornish thing"
    assert spoken("in van gogh style", "van gogh", r"\1") == r"in \1 style"


def test_captions_of_every_template() -> None:
    images = CaptionedImages(
        torch.zeros(3, 3, 4, 4, dtype=torch.uint8), ("a mosaic fox", "a fox", "mosaic art")
    )
    concept = replace(task(), prompts={"name": ("x",), "description": ("tiles", "stones")})
    assert captions(concept, images, "name", "sks") == images.prompts
    assert captions(concept, images, "token", "sks") == ("a sks fox", "sks, a fox", "sks art")
    assert captions(concept, images, "description", "sks") == ("tiles", "stones", "tiles")
    described = replace(images, described=("a fox of tiles", "a fox of stones", "tiles"))
    assert captions(concept, described, "description", "sks") == described.described
    assert captions(concept, described.pick([2, 0]), "description", "sks") == (
        "tiles",
        "a fox of tiles",
    )


def test_prompts_speak_of_the_token_where_training_does() -> None:
    concept = replace(
        task(), prompts={"name": ("a mosaic fox", "mosaic art"), "description": ("tiles",)}
    )
    lora = attack("lora", template="token", families=("name", "description"))
    prompts = ConceptLearner(lora, model().copy(), concept, 1, 0).prompts(lora)
    assert prompts == {"name": ["a sks fox", "sks art"], "description": ["sks, tiles"] * 2}


def test_class_words_are_what_all_prior_captions_share() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    animal = replace(
        task(), prior=CaptionedImages(images, ("a photo of an animal", "an animal in the snow"))
    )
    assert class_words(animal) == "animal"
    assert class_words(replace(task(), prior=CaptionedImages(images[:0], ()))) == ""
    dogs = ("a brown dog sitting", "a brown dog, sitting in the snow")
    assert class_words(replace(task(), prior=CaptionedImages(images, dogs))) == "", (
        "two captions share more than their class"
    )


def test_variants_keep_size_and_repeat_from_the_seed() -> None:
    images = task().train.images
    assert torch.equal(variants(images, "flip", 0)[1].flip(-1), images)
    crops = variants(images, "crop", 0, "a")
    assert torch.equal(crops[0], images)
    assert all(c.shape == images.shape and c.dtype == torch.uint8 for c in crops)
    assert torch.equal(crops[1], variants(images, "crop", 0, "a")[1])
    assert not torch.equal(crops[1], variants(images, "crop", 1, "a")[1])


def test_draws_have_no_repeats_before_all_images_were_seen_and_cover_the_schedule() -> None:
    material = Material.encode(model(), [task().train.images], task().train.prompts)
    assert sorted(material.draw(4, 1000, generator(0, "d")).rows) == [0, 1, 2, 3]
    every = material.evenly(1000, generator(0, "e"))
    assert every.t[0] < 40 < 960 < every.t[-1]
    assert set(every.rows) == {0, 1, 2, 3}
