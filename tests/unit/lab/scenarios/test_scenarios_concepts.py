"""Concepts to re-learn and to personalise: roles, disjointness, prompts."""

import re
from functools import cache
from itertools import chain

import pytest
import torch
from hydra.utils import instantiate
from marks import with_slow
from omegaconf import OmegaConf
from scenario_configs import config, hashes

from lab.core.errors import UserError
from lab.minisd.world.captions import (
    BARE_TEMPLATES,
    PHOTO_TEMPLATES,
    PLACE_TEMPLATES,
    STYLE_TEMPLATES,
    fill,
    noun,
)
from lab.minisd.world.scenes import BACKGROUNDS
from lab.minisd.world.vocabulary import (
    HELD_OUT_OBJECTS,
    HELD_OUT_PAIRS,
    HELD_OUT_STYLES,
    OBJECTS,
    STYLE,
    STYLE_NAMES,
)
from lab.scenarios import concept_texts
from lab.scenarios.world_concepts import Relearn

WORLD = (
    "relearn_styles",
    "relearn_styles_3",
    "relearn_objects",
    "relearn_objects_3",
    "personalize",
    "personalize_3",
)
HELD_OUT = {*HELD_OUT_OBJECTS, *HELD_OUT_STYLES}
SMALL = {
    "own": 3,
    "train": 3,
    "reference": 3,
    "prior": 3,
    "keep": 8,
    "unrelated": 8,
    "regularizers": 20,
}


def built(name, **options):
    return instantiate(OmegaConf.merge(config(name), options), _convert_="all")


@cache
def loaded(name, split="test", cases=1):
    return built(name, **SMALL, split=split, cases=cases).load(0)


def concepts(case):
    return (*case.targets, *case.others, *case.rehearsal)


# ---- the embedded world


@pytest.mark.parametrize("name", ["relearn_styles", "relearn_objects", "personalize"])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_image_sets_are_disjoint_and_whole(name, split):
    (case,) = loaded(name, split).cases
    assert {t.role for t in case.targets} == {"harmful"}
    assert {c.role for c in (*case.others, *case.rehearsal)} == {"benign"}
    sets = [
        *(hashes(part) for c in concepts(case) for part in (c.own, c.train, c.reference)),
        # concepts of one kind may share their prior images; those are disjoint from all else
        {h for c in concepts(case) for h in hashes(c.prior)},
        hashes(case.keep),
        hashes(case.unrelated),
    ]
    assert len(set.union(*sets)) == sum(map(len, sets))
    assert all(len(s) == 3 for s in sets[: 3 * len(concepts(case))])


@pytest.mark.parametrize(
    "name",
    with_slow(
        ("relearn_styles", "relearn_objects", "personalize"), ("relearn_objects", "personalize")
    ),
)
def test_unrelated_prompts_are_new_and_speak_of_no_concept(name):
    (case,) = (
        built(name, **SMALL | {"unrelated": 64, "keep": 64, "regularizers": 200}).load(0).cases
    )
    trained = {*case.keep.prompts, *case.regularizers}
    for concept in concepts(case):
        for part in (concept.own, concept.train, concept.reference, concept.prior):
            trained |= set(part.prompts)
    assert trained.isdisjoint(case.unrelated.prompts)
    for text in (*case.unrelated.prompts, *case.keep.prompts, *case.regularizers):
        words = f" {text} ".replace(",", " ")
        assert not any(f" {c.words} " in words for c in concepts(case)), text


def test_reported_concepts_have_unrelated_prompts_that_name_an_object():
    families = ["name", "unrelated"]
    (case,) = built("relearn_styles", **SMALL | {"unrelated": 64}, families=families).load(0).cases
    lines = case.targets[0].prompts["unrelated"]
    assert len(lines) == case.sampling.count
    assert {*lines} < {*case.unrelated.prompts}
    assert all(any(name in line for name in OBJECTS) for line in lines)
    assert case.others[0].prompts["unrelated"] == lines
    assert "unrelated" not in case.rehearsal[0].prompts


def test_same_seed_same_bytes_and_another_seed_others():
    first, again = (built("relearn_styles", **SMALL).load(3) for _ in range(2))
    assert first.data_hash == again.data_hash != built("relearn_styles", **SMALL).load(4).data_hash


def test_a_concept_has_the_same_images_in_every_role_and_scenario():
    pairs, triples = loaded("relearn_styles", cases="all"), loaded("relearn_styles_3")
    neon = pairs.cases[0].task("neon")
    for twin in (pairs.cases[1].task("neon"), triples.cases[0].task("neon")):
        assert torch.equal(neon.train.images, twin.train.images)
    assert (neon.role, pairs.cases[1].task("neon").role) == ("harmful", "benign")


def test_an_image_is_described_by_what_it_shows_and_never_by_the_styles_name():
    for case in (*loaded("relearn_styles").cases, *loaded("personalize").cases):
        for concept in concepts(case):
            for part in (concept.own, concept.train, concept.reference):
                assert len(part.described) == (len(part) if concept.kind == "style" else 0)
                for named, described in zip(part.prompts, part.described, strict=False):
                    (shown,) = [
                        o for o in (*OBJECTS, *HELD_OUT_OBJECTS) if re.search(rf"\b{o}\b", named)
                    ][-1:]
                    assert shown in described
                    assert concept.words not in described
                    assert any(text in described for text in STYLE[concept.name].descriptions)


@pytest.mark.parametrize("name", [*STYLE_NAMES, *HELD_OUT_STYLES])
def test_style_prompts(name):
    found = concept_texts.style_prompts(name, 40, 0)
    assert all(name in p for family in ("name", "reworded") for p in found[family])
    assert not any(name in p for p in found["description"])
    assert all(any(d in p for d in STYLE[name].descriptions) for p in found["description"])
    unseen = [o for o in OBJECTS if (o, name) in HELD_OUT_PAIRS]
    for prompt in found["name"]:
        assert not any(f" {o} " in f" {prompt} " for o in unseen), prompt
    for prompt in found.get("unseen_pairs", ()):
        assert any(o in prompt for o in unseen)


def test_reworded_prompts_are_no_captions_of_the_world():
    """Neither as templates nor as what any template becomes for any object, style, description or
    place.
    """
    styled = [*BARE_TEMPLATES.values(), *chain(*STYLE_TEMPLATES.values())]
    templates = [*PHOTO_TEMPLATES, *PLACE_TEMPLATES, *styled]
    reworded = (*concept_texts.REWORDED_STYLE, *concept_texts.REWORDED_OBJECT)
    assert set(reworded).isdisjoint(templates)
    things = [*OBJECTS, *HELD_OUT_OBJECTS]
    captions = {
        fill(t, noun(o), place=p)
        for t in templates
        if "style" not in t and "desc" not in t
        for o in things
        for p in BACKGROUNDS
    }
    captions |= {
        fill(t, noun(o), s, d, p)
        for t in templates
        for o in things
        for s in ("mosaic", "engraving")
        for d in (0, 1)
        for p in BACKGROUNDS
    }
    for name in ("mosaic", "engraving"):
        assert captions.isdisjoint(concept_texts.style_prompts(name, 400, 0)["reworded"])
        assert not captions.isdisjoint(concept_texts.style_prompts(name, 10, 0)["name"])
    for name in things:
        assert captions.isdisjoint(concept_texts.object_prompts(name, 60, 0)["reworded"])


def test_prior_shows_the_class_without_any_concept_of_the_case():
    (case,) = loaded("relearn_objects").cases
    assert all("animal" in text for text in case.task("fox").prior.prompts)
    (case,) = loaded("relearn_styles").cases
    for concept in concepts(case):
        assert not any(c.words in text for c in concepts(case) for text in concept.prior.prompts)


# ---- erasure


@pytest.mark.parametrize("name", [n for n in WORLD if n.startswith("relearn")])
def test_every_known_concept_is_erased_and_nothing_else(name):
    (case,) = loaded(name).cases
    assert [e.name for e in case.erased] == [
        c.name for c in concepts(case) if c.name not in HELD_OUT
    ]
    for erasure in case.erased:
        assert all(erasure.words in p for p in erasure.prompts)
        assert not any(erasure.words in a.split() for a in erasure.anchors)
        for gone in case.erased:
            assert not any(f" {gone.words} " in f" {p} " for p in erasure.preserve)
    assert loaded("personalize").cases[0].erased == ()


# ---- options

CASES = [{"targets": ["mosaic", "neon"], "others": ["halftone"], "rehearsal": ["sketch"]}]
BAD = [
    ({"test": [{"targets": ["mozaic"], "others": ["neon"]}]}, r"test\[0\].*mosaic"),
    ({"test": [{"targets": ["unicorn"], "others": ["neon"]}]}, "personalize"),
    ({"test": [{"targets": ["mosaic"], "others": ["mosaic"]}]}, "two roles"),
    ({"validation": [{"targets": ["neon"], "others": ["sunset"]}]}, r"validation\[0\].*for tests"),
]
GIVEN = {"name": "x", "test": CASES, "validation": [{"targets": ["sunset"], "others": ["owl"]}]}


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:60])
def test_cases_that_cannot_work_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        Relearn(**GIVEN | options)
