"""A user's own concepts from folders of images, and every way in which their list can be wrong."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ValidationError
from scenario_configs import CONF, config, hashes

import run  # noqa: F401 - registers a resolver of the config
from immunize.mima.method import Mima
from lab.core.config import user_error
from lab.core.errors import UserError
from lab.core.types import Scenario
from lab.minisd.world import folders
from lab.runner.assemble import assemble
from lab.scenarios.concept_folders import ConceptFolders, Shares

PAPER = ("relearn_art", "relearn_object", "personalize")


def noise(count: int, seed: int, side: int = 24):
    return torch.randint(
        0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)


@pytest.fixture
def root(tmp_path):
    for i, (name, caption) in enumerate(
        (("rex", "a photo of Rex"), ("mug", "my mug"), ("hat", "no words of it"))
    ):
        rows = [{"text": caption}] * 8
        folders.write(tmp_path / name, noise(8, i), rows)
    folders.write(
        tmp_path / "rest", noise(12, 9), [{"text": f"scene number {i}"} for i in range(12)]
    )
    return tmp_path


def entry(name: str, role: str, **more):
    return {
        "path": name,
        "name": name,
        "role": role,
        "kind": "object",
        "prompts": [f"a photo of {name}"],
        **more,
    }


def listed(**more):
    return [entry("rex", "target", **more), entry("mug", "other"), entry("hat", "rehearsal")]


def folder_scenario(root, concepts=None, **options):
    options = {
        "resolution": 16,
        "sampling": {"count": 3},
        "unrelated": "rest",
        "regularizers": 10,
    } | options
    return instantiate(
        OmegaConf.merge(config("folder"), {"root": str(root), "concepts": concepts}, options),
        _convert_="all",
    )


def test_folders_make_a_case(root) -> None:
    first = {
        "descriptions": ["a brown dog"],
        "reworded": ["there sits Rex", "Rex barks"],
        "words": "rex",
    }
    scenario = folder_scenario(root, listed(**first))
    assert isinstance(scenario, Scenario)
    found = scenario.load(0)
    (case,) = found.cases
    (rex,), (mug,), (hat,) = case.targets, case.others, case.rehearsal
    assert (rex.role, mug.role, hat.role) == ("harmful", "benign", "benign")
    assert [len(part) for part in (rex.own, rex.train, rex.reference)] == [2, 2, 4]
    sets = [hashes(p) for c in (rex, mug, hat) for p in (c.own, c.train, c.reference)]
    sets += [hashes(case.keep), hashes(case.unrelated)]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 24 + 12
    assert rex.prompts["description"] == ("a brown dog",) * 3
    assert rex.prompts["reworded"] == ("there sits Rex", "Rex barks", "there sits Rex")
    assert set(rex.train.prompts) == {"a photo of Rex"}  # names it in another case
    assert set(hat.train.prompts) == {"a photo of hat"}  # its captions do not name it
    assert any(note.startswith("hat: 8 captions") for note in found.notes)
    assert set(case.keep.prompts).isdisjoint(case.unrelated.prompts)
    assert len(rex.prior) == 0
    assert case.erased == ()
    assert scenario.load(0).data_hash == found.data_hash != scenario.load(1).data_hash


def test_folders_erase_by_an_anchor(root) -> None:
    given = listed(
        erase=True, anchor="a dog", words="Rex", prompts=["a photo of rex", "Rex in the snow"]
    )
    (case,) = folder_scenario(root, given).load(0).cases
    (erasure,) = case.erased
    assert erasure.prompts == ("a photo of rex", "Rex in the snow")
    assert erasure.anchors == ("a photo of a dog", "a dog in the snow")
    assert "a photo of mug" in erasure.preserve
    assert set(case.keep.prompts) <= set(erasure.preserve)


def test_folders_without_surroundings_borrow_the_world(root) -> None:
    options = {"unrelated": None, "keep_pictures": 6, "unrelated_pictures": 5}
    found = folder_scenario(root, listed(), **options).load(0)
    (case,) = found.cases
    assert (len(case.keep), len(case.unrelated), len(case.regularizers)) == (6, 5, 10)
    assert case.keep.images.shape[-1] == 16
    assert set(case.unrelated.prompts).isdisjoint({*case.keep.prompts, *case.regularizers})
    assert any("embedded world" in note for note in found.notes)


def test_folders_with_both_pools_captions_and_prior(root) -> None:
    texts = ("one", "two hats", "scene number 3", "a hat", "five")
    folders.write(root / "more", noise(5, 20), [{"text": t} for t in texts])
    folders.write(root / "dogs", torch.cat([noise(4, 21), noise(1, 0)]), [{"text": "a dog"}] * 5)
    (root / "c.txt").write_text(
        "a tree\n\na house\na photo of my mug\ntwo Mugs\n", encoding="utf-8"
    )
    found = folder_scenario(
        root, listed(prior="dogs"), keep="rest", unrelated="more", captions="c.txt"
    ).load(0)
    (case,) = found.cases
    assert len(case.keep) == 12
    assert case.unrelated.prompts == (
        "one",
        "five",
    )  # one has a caption of keep, two name a concept
    assert case.regularizers == ("a tree", "a house")
    assert case.targets[0].prior.prompts == ("a dog",) * 4  # the fifth is a picture of rex
    assert any("C_reg" in note and "name a concept" in note for note in found.notes)


@pytest.mark.filterwarnings("ignore:.*has no metadata.csv")
def test_copies_are_used_once_and_a_folder_without_metadata_works(root) -> None:
    images = torch.cat([noise(4, 30), noise(2, 30)])
    folders.write(root / "twice", images, [{"text": "x"}] * 6)
    (root / "twice" / "metadata.csv").unlink()
    given = [*listed(), entry("twice", "target")]
    found = folder_scenario(root, given).load(0)
    twice = found.cases[0].task("twice")
    assert sum(len(p) for p in (twice.own, twice.train, twice.reference)) == 4
    assert any(note.startswith("twice: 2 images were copies") for note in found.notes)
    assert set(twice.train.prompts) == {"a photo of twice"}


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images(root, count) -> None:
    folders.write(root / "few", noise(count, 40), [{"text": "x"}] * count)
    with pytest.raises(UserError, match=r"concepts\[3\].path.*holds 1|holds 2") as caught:
        folder_scenario(root, [*listed(), entry("few", "target")]).load(0)
    assert "three is the least" in caught.value.fix
    assert "four where an immunizer trains" in caught.value.fix


@pytest.mark.parametrize("count", [3, 4])
def test_four_images_are_enough_for_an_immunizer_and_three_for_the_rest(root, count) -> None:
    folders.write(root / "few", noise(count, 40), [{"text": "x"}] * count)
    (case,) = folder_scenario(root, [*listed(), entry("few", "other")]).load(0).cases
    assert all(
        len(part)
        for part in (case.task("few").own, case.task("few").train, case.task("few").reference)
    )
    (case,) = folder_scenario(root, [*listed(), entry("few", "target")]).load(0).cases
    if count == 4:
        return Mima().check((case,))
    with pytest.raises(UserError, match="concept few has 1 image"):
        Mima().check((case,))


@pytest.mark.parametrize("pool", ["keep", "unrelated"])
@pytest.mark.parametrize("caption", ["a \x07 tree", "a tree\nand a house", "a \u202e tree"])
def test_captions_of_the_surroundings_are_prompts_too(root, pool, caption) -> None:
    rows = [{"text": text} for text in ("a tree", caption, "a house", "a hill")]
    folders.write(root / "odd", noise(4, 60), rows)
    with pytest.raises(UserError, match=rf"scenario\.{pool}.*control character"):
        folder_scenario(root, listed(), **{"keep": "rest", "unrelated": "rest", pool: "odd"}).load(
            0
        )


def test_empty_folder_missing_folder_and_shared_images(root) -> None:
    (root / "empty").mkdir()
    folders.write(root / "thief", noise(3, 0)[:3], [{"text": "x"}] * 3)  # the first three of rex
    folders.write(root / "own", noise(8, 0), [{"text": "rex in person"}] * 8)
    for name, message in (("empty", "holds no image"), ("absent", "no such folder")):
        with pytest.raises(UserError, match=rf"concepts\[3\].path.*{message}"):
            folder_scenario(root, [*listed(), entry(name, "other")]).load(0)
    same = noise(8, 0)
    folders.write(root / "copy", same, [{"text": "x"}] * 8)
    with pytest.raises(UserError, match="one of rex too"):
        folder_scenario(root, [*listed(), entry("copy", "other")]).load(0)
    with pytest.raises(UserError, match=r"scenario\.keep.*unrelated to the concepts"):
        folder_scenario(root, listed(), keep="own").load(0)


BAD_ENTRIES = [
    ({"prompts": ["a photo of a dog"]}, r"concepts\[0\].prompts.*lacks the words 'rex'"),
    ({"descriptions": ["the dog Rex"]}, r"concepts\[0\].descriptions.*names 'rex'"),
    ({"reworded": ["a dog"]}, r"concepts\[0\].reworded.*lacks"),
    ({"reworded": ["a photo of rex"]}, "must be new"),
    ({"name": "../rex"}, r"concepts\[0\].name"),
    ({"name": "MUG", "words": "rex"}, r"concepts\[0\].name=MUG.*taken by mug"),
    ({"name": "猫", "words": "rex"}, r"concepts\[0\].name=猫: needs letters"),
    ({"words": "mug", "prompts": ["mug"]}, r"concepts\[0\].words"),
    ({"erase": True}, r"concepts\[0\].anchor"),
    ({"erase": True, "anchor": "not Rex"}, "another meaning"),
    ({"anchor": "dog"}, "erase: true only"),
    ({"role": "other"}, "no role: target"),
]


@pytest.mark.parametrize(("more", "message"), BAD_ENTRIES, ids=lambda v: str(v)[:60])
def test_bad_entries_are_explained(more, message) -> None:
    first, *others = listed()
    with pytest.raises(UserError, match=message):
        ConceptFolders(concepts=[first | more, *others])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"concepts": None}, "concepts"),
        ({"concepts": [entry("rex", "target", prompt=["rex"])]}, "concepts.0.prompt"),
        (
            {"concepts": [entry("rex", "target", descriptions=["a \x07"])]},
            "concepts.0.descriptions.0",
        ),
        ({"shares": {"own": 0.5}}, "shares"),
        ({"resolution": 100}, "resolution"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_an_option_that_is_refused_names_its_key(options, key) -> None:
    with pytest.raises(ValidationError) as caught:
        ConceptFolders(**{"concepts": listed(), **options})
    assert user_error(caught.value, "scenario").key == f"scenario.{key}"


@pytest.mark.parametrize("captions", ["/nowhere/captions.txt", []])
def test_captions_that_are_missing_are_explained(captions) -> None:
    with pytest.raises(UserError, match=r"scenario\.captions"):
        ConceptFolders(concepts=listed(), captions=captions)


@pytest.mark.parametrize("total", [3, 4, 5, 7, 20, 101])
@pytest.mark.parametrize("shares", [(0.3, 0.3, 0.4), (0.98, 0.01, 0.01), (0.01, 0.98, 0.01)])
def test_every_part_gets_an_image(total, shares) -> None:
    sizes = Shares(**dict(zip(("own", "train", "reference"), shares, strict=True))).cut(total)
    assert sum(sizes) == total
    assert min(sizes) >= 1
    assert sizes[0] >= (2 if total > 3 else 1)  # an immunizer needs two


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_hold_the_published_settings(name, tmp_path) -> None:
    preset = OmegaConf.load(CONF / "experiment" / "paper" / f"{name}.yaml")
    with pytest.raises(
        InstantiationException, match=r"scenario\.captions=.*captions\.txt: cannot be read"
    ):
        instantiate(
            OmegaConf.merge(config("folder"), preset.scenario, {"root": str(tmp_path)}),
            _convert_="all",
        )
    (tmp_path / "captions.txt").write_text("a quiet street\n")
    scenario = instantiate(
        OmegaConf.merge(config("folder"), preset.scenario, {"root": str(tmp_path)}), _convert_="all"
    )
    assert scenario.lines == ("a quiet street",)
    assert (scenario.keep, scenario.unrelated) == ("keep", None)
    assert [e.role for e in scenario.concepts].count("target") == 2
    assert (scenario.resolution, scenario.regularizers, scenario.keep_pictures) == (512, 200, 200)
    assert {preset.budget.horizon * times for times in (1, 2, 5)} <= set(preset.budget.at)
    assert len(preset.budget.at) >= 8
    erased = [e.name for e in scenario.concepts if e.erase]
    assert len(erased) == (0 if name == "personalize" else len(scenario.concepts))
    assert preset.immunize.inner_loop.lr == 5e-6
    assert dict(preset.immunize.merge) == {"lam": 0.0, "mu": 0.0}
    assert preset.immunize.lr == (2e-5 if name == "personalize" else 3e-5)


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_report_lpips_where_their_scorers_have_it(name) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "config", overrides=[f"experiment=paper/{name}", "scenario.captions=[a street]"]
        )
    (generation,) = (part.obj for key, part in assemble(cfg).metrics.items() if key == "generation")
    assert cfg.scorers.lpips is not None
    assert generation.similarities == ("clip", "features", "lpips")  # as MIMA and IMMA report
