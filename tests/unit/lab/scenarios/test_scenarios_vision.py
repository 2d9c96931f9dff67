"""OpenMoji against MNIST, and any two image folders."""

import pytest
import torch
from PIL import Image

from lab.core import images
from lab.core.errors import UserError
from lab.minisd.world.openmoji import catalog
from lab.scenarios.vision import ImageFolders, OpenmojiMnist, _pools

SMALL = {"size": 32, "train_rows": 70, "test_rows": 35}


@pytest.mark.slow
def test_openmoji_mnist_shapes_and_balance():
    scenario = OpenmojiMnist(**SMALL)
    data = scenario.load(0)
    (case,) = data.cases
    assert (case.benign.name, case.harmful[0].name) == ("openmoji", "mnist")
    for task, classes in ((case.benign, 7), (case.harmful[0], 10)):
        for split, rows in ((task.train, 70), (task.test, 35)):
            assert split.x.shape == (rows, 3, 32, 32)
            counts = torch.bincount(split.y, minlength=classes)
            assert counts.max() - counts.min() <= 1
        assert task.classes == classes
    assert data.data_hash == scenario.load(0).data_hash != scenario.load(1).data_hash


def test_train_and_test_share_no_emoji_and_no_digit():
    train, test = _pools(sorted({emoji.group for emoji in catalog()}), 0)
    codes = [{emoji.hexcode for pool in half for emoji in pool} for half in (train, test)]
    assert not codes[0] & codes[1]
    mnist = OpenmojiMnist(size=32, train_rows=4000, test_rows=1000)._digits(0)
    rows = [{x.numpy().tobytes() for x in split.x} for split in mnist]
    assert not rows[0] & rows[1]


def test_a_group_of_the_same_world_is_harmful():
    (same,) = OpenmojiMnist(**SMALL, harmful="animals-nature").load(0).cases
    assert (same.harmful[0].name, same.benign.classes, same.harmful[0].classes) == (
        "animals-nature",
        6,
        6,
    )
    assert torch.bincount(same.harmful[0].test.y).tolist() == [6] * 5 + [5]
    assert not torch.equal(same.benign.train.x, same.harmful[0].train.x)
    with pytest.raises(UserError, match="harmful=animals") as refused:
        OpenmojiMnist(**SMALL, harmful="animals")
    assert "animals-nature" in refused.value.fix


def test_several_harmful_tasks():
    (case,) = OpenmojiMnist(**SMALL, harmful=["digits", "animals-nature"]).load(0).cases
    (animals,) = OpenmojiMnist(**SMALL, harmful="animals-nature").load(0).cases
    assert [task.name for task in case.harmful] == ["mnist", "animals-nature"]
    assert torch.equal(case.benign.train.x, animals.benign.train.x)  # without that group
    assert torch.equal(case.harmful[1].train.x, animals.harmful[0].train.x)
    with pytest.raises(UserError, match="names a task twice"):
        OpenmojiMnist(**SMALL, harmful=["digits", "digits"])


def fill(path, classes=2, count=10, base=0):
    for c in range(classes):
        (path / f"class{c}").mkdir(parents=True)
        for i in range(count):
            colour = (base + 10 * i, 100 * c, 50)
            Image.new("RGB", (40, 36), colour).save(path / f"class{c}" / f"{i}.png")
    return path


def folders(benign, harmful, **options):
    return ImageFolders(
        **{"benign_path": str(benign), "harmful_path": str(harmful), "size": 32, **options}
    )


def test_image_folders(tmp_path):
    scenario = folders(fill(tmp_path / "a"), fill(tmp_path / "b", classes=3, base=5))
    data = scenario.load(0)
    (case,) = data.cases
    benign, harmful = case.benign, case.harmful[0]
    assert (benign.classes, harmful.classes) == (2, 3)
    assert torch.equal(
        benign.train.x[:, 1, 0, 0].long(), 100 * benign.train.y
    )  # label and image belong together
    seen = [{x.numpy().tobytes() for x in split.x} for split in (benign.train, benign.test)]
    assert not seen[0] & seen[1]
    assert data.data_hash == scenario.load(0).data_hash != scenario.load(1).data_hash


def test_folders_with_their_own_split_and_a_limit(tmp_path):
    fill(tmp_path / "a" / "train", classes=3)
    fill(tmp_path / "a" / "val", classes=2, count=4, base=200)
    data = folders(tmp_path / "a", fill(tmp_path / "b"), train_rows=4, test_rows=2).load(0)
    benign = data.cases[0].benign
    assert torch.bincount(benign.train.y).tolist() == [2, 1, 1]
    assert benign.test.x[:, 0].min() >= 200
    fill(tmp_path / "a" / "val" / "class9")
    with pytest.raises(UserError, match=r"scenario\.benign_path=.*class9"):
        folders(tmp_path / "a", tmp_path / "b").load(0)


def test_unreadable_and_huge_images(tmp_path, monkeypatch):
    a, b = fill(tmp_path / "a"), fill(tmp_path / "b")
    broken = a / "class0" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UserError, match=r"scenario\.benign_path=.*3\.png: cannot be read"):
        folders(a, b).load(0)
    broken.unlink()
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="more than 1,000 pixels"):
        folders(a, b).load(0)


def test_folders_that_cannot_work(tmp_path):
    good = fill(tmp_path / "good")
    for path, message in (
        (tmp_path / "none", "cannot be read"),
        (fill(tmp_path / "one", classes=1), "of 1 classes"),
    ):
        with pytest.raises(UserError, match=rf"scenario\.harmful_path=.*{message}"):
            folders(good, path).load(0)
    with pytest.raises(UserError, match=r"scenario\.train_rows="):
        OpenmojiMnist(train_rows=4900)
