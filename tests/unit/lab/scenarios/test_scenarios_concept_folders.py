"""A user's own concepts from folders of images, and every way in which their list can be wrong."""

import re

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scenario_configs import config, hashes

import run  # noqa: F401 - registers a resolver of the config
from immunize.mima.method import Mima
from lab.core.errors import UserError, UserErrors
from lab.minisd.world import folders
from lab.scenarios.concept_folders import ConceptFolders, Shares

SAMPLING = {"count": 3, "steps": 2, "guidance": 2.0}  # else of the checkpoint


def noise(count: int, seed: int, side: int = 24):
    return torch.randint(
        0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)


@pytest.fixture
def root(tmp_path):
    for i, (name, caption) in enumerate(
        (("rex", "a photo of Rex"), ("mug", "my mug"), ("hat", "no words of it"))
    ):
        folders.write(tmp_path / name, noise(8, i), [{"text": caption}] * 8)
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
    return [entry("rex", "harmful", **more), entry("mug", "benign"), entry("hat", "rehearsal")]


def folder_scenario(root, concepts=None, **options):
    options = {
        "resolution": 16,
        "sampling": SAMPLING,
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
    found = scenario.load(0)
    (case,) = found.cases
    (rex,), (mug,), (hat,) = case.targets, case.others, case.rehearsal
    assert (rex.role, mug.role, hat.role) == ("harmful", "benign", "benign")
    assert [len(part) for part in (rex.own, rex.train, rex.reference)] == [2, 2, 4]
    sets = [
        *(hashes(p) for c in (rex, mug, hat) for p in (c.own, c.train, c.reference)),
        hashes(case.keep),
        hashes(case.unrelated),
    ]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 24 + 12
    assert rex.prompts["description"] == ("a brown dog",) * 3
    assert set(hat.train.prompts) == {"a photo of hat"}  # its captions do not name it
    assert set(case.keep.prompts).isdisjoint(case.unrelated.prompts)
    assert scenario.load(0).data_hash == found.data_hash != scenario.load(1).data_hash


def test_folders_erase_by_an_anchor(root) -> None:
    given = listed(
        erase=True, anchor="a dog", words="Rex", prompts=["a photo of rex", "Rex in the snow"]
    )
    (case,) = folder_scenario(root, given).load(0).cases
    (erasure,) = case.erased
    assert erasure.prompts == ("a photo of rex", "Rex in the snow")
    assert erasure.anchors == ("a photo of a dog", "a dog in the snow")
    assert set(case.keep.prompts) <= set(erasure.preserve)


def test_folders_without_surroundings_borrow_the_world(root) -> None:
    options = {"unrelated": None, "keep_images": 6, "unrelated_images": 5}
    (case,) = folder_scenario(root, listed(), **options).load(0).cases
    assert (len(case.keep), len(case.unrelated), len(case.regularizers)) == (6, 5, 10)
    assert set(case.unrelated.prompts).isdisjoint({*case.keep.prompts, *case.regularizers})


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
    assert case.unrelated.prompts == (
        "one",
        "five",
    )  # one has a caption of keep, two name a concept
    assert case.regularizers == ("a tree", "a house")
    assert case.targets[0].prior.prompts == ("a dog",) * 4  # the fifth is an image of rex


@pytest.mark.filterwarnings("ignore:.*have no text")
def test_copies_are_used_once_and_a_folder_without_metadata_works(root) -> None:
    folders.write(root / "twice", torch.cat([noise(4, 30), noise(2, 30)]), [{"text": "x"}] * 6)
    (root / "twice" / "metadata.csv").unlink()
    found = folder_scenario(root, [*listed(), entry("twice", "harmful")]).load(0)
    twice = found.cases[0].task("twice")
    assert sum(len(p) for p in (twice.own, twice.train, twice.reference)) == 4
    assert set(twice.train.prompts) == {"a photo of twice"}


@pytest.mark.parametrize("count", [3, 4])
def test_four_images_are_enough_for_an_immunizer_and_three_are_not(root, count) -> None:
    folders.write(root / "few", noise(count, 40), [{"text": "x"}] * count)
    (case,) = folder_scenario(root, [*listed(), entry("few", "harmful")]).load(0).cases
    if count == 4:
        return Mima().check((case,))
    with pytest.raises(UserError, match="concept few has 1 image"):
        Mima().check((case,))


def test_shared_images(root) -> None:
    folders.write(root / "own", noise(8, 0), [{"text": "rex in person"}] * 8)
    folders.write(root / "copy", noise(8, 0), [{"text": "x"}] * 8)
    with pytest.raises(UserError, match="one of rex, too"):
        folder_scenario(root, [*listed(), entry("copy", "benign")]).load(0)
    with pytest.raises(UserError, match=r"scenario\.keep.*unrelated to the concepts"):
        folder_scenario(root, listed(), keep="own").load(0)


BAD_ENTRIES = [
    ({"prompts": ["a photo of a dog"]}, r"concepts\[0\].prompts.*lacks the words 'rex'"),
    ({"name": "../rex"}, r"concepts\[0\].name"),
    ({"erase": True, "anchor": "not Rex"}, "another meaning"),
    ({"role": "benign"}, "no role: harmful"),
    ({"prompts": ["rex \u202e"]}, "control character"),
]


@pytest.mark.parametrize(("more", "message"), BAD_ENTRIES, ids=lambda v: str(v)[:60])
def test_bad_entries_are_explained(more, message) -> None:
    first, *others = listed()
    with pytest.raises(UserError, match=message):
        ConceptFolders(concepts=[first | more, *others])


def test_every_mistake_of_the_list_is_in_one_message() -> None:
    concepts = [{"name": "neno", "role": "harmful"}, entry("mug", "benign", knd=1), entry("a", "b")]
    with pytest.raises(UserErrors) as raised:
        ConceptFolders(concepts=concepts)
    message = str(raised.value)
    for part in ("3 mistakes", "did you mean neon", "did you mean .*kind", r"concepts\[2\].role"):
        assert re.search(part, message), message


def test_two_keys_are_enough_and_the_world_has_concepts_by_name(root) -> None:
    concepts = [{"path": "rex", "role": "harmful"}, {"name": "neon", "role": "benign"}]
    (case,) = folder_scenario(root, concepts).load(0).cases
    (rex,), (neon,) = case.targets, case.others
    assert (rex.name, rex.kind, neon.kind) == ("rex", "object", "style")
    assert set(rex.prompts["name"]) == {"a photo of Rex"}
    assert [len(part) for part in (neon.own, neon.train, neon.reference)] == [20, 20, 32]
    assert (neon.train.images.shape[-1], len(neon.prior)) == (16, 32)


@pytest.mark.parametrize("total", [3, 4, 5, 7, 20, 101])
@pytest.mark.parametrize("shares", [(0.3, 0.3), (0.98, 0.01), (0.01, 0.98), (0.9, 0.9)])
def test_every_part_gets_an_image(total, shares) -> None:
    sizes = Shares(own=shares[0], train=shares[1]).cut(total)
    assert sum(sizes) == total
    assert min(sizes) >= 1
    assert sizes[0] >= (2 if total > 3 else 1)  # an immunizer needs two
