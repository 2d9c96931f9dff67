"""The world: real artwork, held-out parts, and the same bytes from a seed."""

from collections import Counter

import numpy as np
import pytest
import torch

from lab.core.errors import UserError
from lab.minisd.world import captions, openmoji
from lab.minisd.world.dice import Dice
from lab.minisd.world.folders import read, write
from lab.minisd.world.vocabulary import (
    HELD_OUT_OBJECTS,
    HELD_OUT_PAIRS,
    HELD_OUT_STYLES,
    OBJECTS,
    PHOTO,
    ROLES,
    STYLE,
    STYLE_NAMES,
    THING,
)
from lab.minisd.world.world import (
    EVERYTHING,
    TRAINING,
    UNSEEN_PAIRS,
    concept,
    picture,
    sample,
)


def test_catalog_names_every_picture_once() -> None:
    emojis = openmoji.catalog()
    assert len(emojis) > 1000
    assert len({e.name for e in emojis}) == len({e.hexcode for e in emojis}) == len(emojis)
    fox = openmoji.by_name()["fox face"]
    assert (fox.hexcode, fox.group, fox.subgroup) == ("1F98A", "animals-nature", "animal-mammal")


def test_wrong_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unicorn"):
        concept("unicron")


def test_one_pair_in_ten_is_held_out_evenly() -> None:
    assert abs(len(HELD_OUT_PAIRS) / (len(OBJECTS) * len(STYLE_NAMES)) - 0.1) < 0.005
    by_style = Counter(s for _, s in HELD_OUT_PAIRS)
    assert set(by_style) == set(STYLE_NAMES)
    assert max(by_style.values()) - min(by_style.values()) <= 1
    assert set(Counter(o for o, _ in HELD_OUT_PAIRS).values()) == {1, 2}


def test_roles_name_concepts_of_the_world_once() -> None:
    assert set(ROLES) <= {*THING, *STYLE}
    assert len([name for name in STYLE_NAMES if ROLES.get(name) == "validation"]) >= 6
    assert len(STYLE_NAMES) >= 16
    assert len(HELD_OUT_OBJECTS) >= 20


def test_descriptions_never_use_a_name() -> None:
    for style in STYLE.values():
        for prompt in captions.prompts("a fox", style.name, "description"):
            assert not any(other in prompt for other in STYLE), prompt
        for prompt in captions.prompts("a fox", style.name, "name"):
            assert style.name in prompt
            assert "a fox" in prompt


# ---- sampling


def test_training_never_shows_what_is_held_out() -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for i in range(4000):
        p = picture(TRAINING, 11, i)
        for name in p.objects:
            assert name not in HELD_OUT_OBJECTS
            assert (name, p.style) not in HELD_OUT_PAIRS
        assert p.style not in HELD_OUT_STYLES
        assert not any(
            f" {name} " in f" {p.text} " for name in (*HELD_OUT_OBJECTS, *HELD_OUT_STYLES)
        )
        seen[p.objects[0], p.style] += 1
    assert set(seen) == set(TRAINING.deck())
    painted = [seen[card] for card in seen if card[1] != PHOTO]
    assert max(painted) - min(painted) <= 1  # the deck is dealt evenly
    assert 0.25 < sum(n for (_, s), n in seen.items() if s == PHOTO) / 4000 < 0.35
    assert {
        (picture(UNSEEN_PAIRS, 0, i).objects[0], picture(UNSEEN_PAIRS, 0, i).style)
        for i in range(len(HELD_OUT_PAIRS))
    } == set(HELD_OUT_PAIRS)


def test_concepts_are_photos_of_a_thing_or_many_things_by_an_artist() -> None:
    unicorns = [picture(concept("unicorn"), 0, i) for i in range(12)]
    assert {(p.objects, p.style) for p in unicorns} == {(("unicorn",), PHOTO)}
    mosaics = [picture(concept("mosaic"), 0, i) for i in range(20)]
    assert ({p.style for p in mosaics}, len({p.objects for p in mosaics})) == ({"mosaic"}, 20)


@pytest.mark.slow  # starts processes
def test_same_seed_same_bytes_in_any_order_and_number_of_processes() -> None:
    whole = sample(TRAINING, 5, 260)
    assert torch.equal(sample(TRAINING, 5, 20, start=240).images, whole.images[240:])
    shared = sample(TRAINING, 5, 260, workers=2)
    assert torch.equal(shared.images, whole.images)
    assert shared.pictures == whole.pictures
    other = sample(TRAINING, 6, 20)
    assert all(not torch.equal(a, b) for a, b in zip(whole.images[:20], other.images, strict=True))


def test_a_written_folder_reads_back(tmp_path) -> None:
    made = sample(EVERYTHING, 2, 24)
    rows = [{"text": text} for text in made.texts]
    folder, again = (write(tmp_path / name, made.images, rows) for name in ("world", "again"))
    back = read(folder, 64)
    assert torch.equal(back.images, made.images)
    assert back.texts == made.texts
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


# ---- what a picture looks like


def test_every_artist_stays_in_range() -> None:
    """Black, white and pure colours at full and at no coverage: no artist leaves [0, 1] or makes a
    nan.
    """
    for value in ((0, 0, 0), (1, 1, 1), (1, 0, 0)):
        rgb = np.broadcast_to(np.array(value, np.float32), (64, 64, 3)).copy()
        for cover in (0.0, 1.0):
            mask = np.full((64, 64), cover, np.float32)
            for style in STYLE.values():
                out = style.paint(rgb, mask, Dice(0, style.name))
                assert out.shape == (64, 64, 3)
                assert -1e-5 <= out.min() <= out.max() <= 1 + 1e-5, style.name  # nor nan
