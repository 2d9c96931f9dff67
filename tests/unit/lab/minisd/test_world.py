"""The world: real artwork, recognisable objects and artists, held-out parts, and the same bytes
from a seed.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from lab.core.errors import UserError
from lab.minisd.world import captions, openmoji
from lab.minisd.world.dice import Dice
from lab.minisd.world.folders import read
from lab.minisd.world.scenes import BACKGROUNDS, Pose, compose
from lab.minisd.world.styles import ARTISTS, blur, luma
from lab.minisd.world.vocabulary import (
    CATEGORIES,
    HELD_OUT_OBJECTS,
    HELD_OUT_PAIRS,
    HELD_OUT_STYLES,
    OBJECTS,
    PHOTO,
    STYLE_NAMES,
    STYLES,
    THINGS,
    members,
)
from lab.minisd.world.world import (
    CREDIT,
    EVERYTHING,
    TRAINING,
    UNSEEN_PAIRS,
    Subset,
    concept,
    picture,
    sample,
)

EVERY_STYLE = (PHOTO, *(s.name for s in STYLES))
EVERY_OBJECT = tuple(t.name for t in THINGS)


def test_catalog_names_every_picture_once() -> None:
    emojis = openmoji.catalog()
    assert len(emojis) > 1000
    assert len({e.name for e in emojis}) == len({e.hexcode for e in emojis}) == len(emojis)
    fox = openmoji.find("Fox  FACE")
    assert (fox.hexcode, fox.group, fox.subgroup) == ("1F98A", "animals-nature", "animal-mammal")
    groups = {
        "smileys-emotion",
        "people-body",
        "animals-nature",
        "food-drink",
        "travel-places",
        "activities",
        "objects",
    }
    assert {e.group for e in emojis} == groups


def test_rasterise_returns_own_copy_with_transparency() -> None:
    one = openmoji.rasterise("1F98A", 48)
    assert (one.size, one.mode) == ((48, 48), "RGBA")
    alpha = np.asarray(one)[..., 3]
    assert alpha[0, 0] == 0
    assert alpha[24, 24] == 255
    one.paste("red", (0, 0, 48, 48))
    assert np.asarray(openmoji.rasterise("1F98A", 48))[0, 0, 3] == 0


def test_wrong_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unicorn face"):
        openmoji.find("unicorn fase")
    with pytest.raises(UserError, match="catalog"):
        openmoji.rasterise("../svg/1F98A", 32)
    with pytest.raises(UserError, match="1 pixel"):
        openmoji.rasterise("1F98A", 0)
    with pytest.raises(UserError, match="unicorn"):
        concept("unicron")
    with pytest.raises(UserError, match="stained glass"):
        Subset(OBJECTS, ("stained glas",))
    with pytest.raises(UserError, match="fruit"):
        members("fruits")


def test_one_pair_in_ten_is_held_out_evenly() -> None:
    assert abs(len(HELD_OUT_PAIRS) / (len(OBJECTS) * len(STYLE_NAMES)) - 0.1) < 0.005
    by_style = Counter(s for _, s in HELD_OUT_PAIRS)
    assert set(by_style) == set(STYLE_NAMES)
    assert max(by_style.values()) - min(by_style.values()) <= 1
    assert max(Counter(o for o, _ in HELD_OUT_PAIRS).values()) == 1


def test_descriptions_never_use_a_name() -> None:
    for style in STYLES:
        assert len(style.descriptions) >= 2
        for prompt in captions.prompts("a fox", style.name, "description"):
            assert not any(other.name in prompt for other in STYLES), prompt
        for prompt in captions.prompts("a fox", style.name, "name"):
            assert style.name in prompt
            assert "a fox" in prompt
    with pytest.raises(UserError, match="description"):
        captions.prompts("a fox", "neon", "colour")  # type: ignore[arg-type]


def test_captions_are_english() -> None:
    assert captions.noun("elephant") == "an elephant"
    assert captions.noun("unicorn") == "a unicorn"
    assert captions.noun("butterfly", 2) == "two butterflies"
    assert captions.class_noun("fox") == "an animal"
    texts = {picture(EVERYTHING, 0, i).text for i in range(3000)}
    for text in texts:
        words = f" {text} "
        assert not set("{}") & set(text)
        assert "  " not in text
        assert not any(f" a {v}" in words for v in "aeio"), text
        assert not any(f" an {c}" in words for c in "bcdfghjklmnpqrstvwxyz"), text
    assert len(texts) > 2000


# ---- sampling


def test_training_never_shows_what_is_held_out() -> None:
    seen: Counter[tuple[str, str]] = Counter()
    kinds: Counter[str] = Counter()
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
        kinds["two" if len(p.objects) == 2 else "one"] += 1
        kinds["class"] += any(f" {c}" in p.text for c in CATEGORIES)
    assert set(seen) == set(TRAINING.deck())
    painted = [seen[card] for card in seen if card[1] != PHOTO]
    assert max(painted) - min(painted) <= 1  # the deck is dealt evenly
    assert 0.25 < sum(n for (_, s), n in seen.items() if s == PHOTO) / 4000 < 0.35
    assert 0.08 < kinds["two"] / 4000 < 0.16
    assert kinds["class"] > 150
    assert {picture(UNSEEN_PAIRS, 0, i).style for i in range(38)} == set(STYLE_NAMES)
    assert {
        (picture(UNSEEN_PAIRS, 0, i).objects[0], picture(UNSEEN_PAIRS, 0, i).style)
        for i in range(38)
    } == set(HELD_OUT_PAIRS)


def test_concepts_are_photos_of_a_thing_or_many_things_by_an_artist() -> None:
    unicorns = [picture(concept("unicorn"), 0, i) for i in range(12)]
    assert {(p.objects, p.style) for p in unicorns} == {(("unicorn",), PHOTO)}
    mosaics = [picture(concept("mosaic"), 0, i) for i in range(20)]
    assert {p.style for p in mosaics} == {"mosaic"}
    assert len({p.objects for p in mosaics}) == 20


def test_same_seed_same_bytes_in_any_order_and_number_of_processes() -> None:
    whole = sample(TRAINING, 5, 260)
    assert whole.images.dtype == torch.uint8
    assert whole.images.shape == (260, 3, 64, 64)
    assert torch.equal(sample(TRAINING, 5, 20, start=240).images, whole.images[240:])
    shared = sample(TRAINING, 5, 260, workers=2)
    assert torch.equal(shared.images, whole.images)
    assert shared.pictures == whole.pictures
    other = sample(TRAINING, 6, 20)
    assert all(not torch.equal(a, b) for a, b in zip(whole.images[:20], other.images, strict=True))


def test_sample_writes_a_folder_that_reads_back(tmp_path) -> None:
    made = sample(EVERYTHING, 2, 24)
    folder = made.write(tmp_path / "world")
    back = read(folder, 64)
    assert torch.equal(back.images, made.images)
    assert back.texts == made.texts
    assert list(back.rows[0])[:4] == ["file_name", "text", "object", "style"]
    assert (folder / "CREDIT.txt").read_text(encoding="utf-8").strip() == CREDIT
    again = sample(EVERYTHING, 2, 24).write(tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


# ---- what a picture looks like


def _pictures(style: str, seed: int, count: int = 30) -> np.ndarray:
    images = sample(Subset(EVERY_OBJECT, (style,)), seed, count).images
    return images.permute(0, 2, 3, 1).numpy().astype(np.float32) / 255


def _colours(images: np.ndarray) -> np.ndarray:
    """Histograms of 4 × 4 × 4 colours: blind to structure."""
    level = np.clip((images * 4).astype(int), 0, 3)
    index = level @ np.array([16, 4, 1])
    return np.stack([np.sqrt(np.bincount(i.ravel(), minlength=64)) for i in index])


def _structure(images: np.ndarray) -> np.ndarray:
    """Log amplitude spectra of normalised brightness: blind to colour."""
    grey = np.stack([luma(i) for i in images])
    grey = (grey - grey.mean((1, 2), keepdims=True)) / grey.std((1, 2), keepdims=True)
    power = np.abs(np.fft.rfft2(grey))[:, :, :32].reshape(len(grey), 32, 2, 16, 2).mean((2, 4))
    return np.log1p(power).reshape(len(grey), -1)


@pytest.mark.parametrize(
    ("feature", "least", "mean"), [(_colours, 0.7, 0.93), (_structure, 0.3, 0.8)]
)
def test_artists_are_told_apart_by_colour_alone_and_by_structure_alone(
    feature, least: float, mean: float
) -> None:
    """A ridge classifier (closed form) on unseen seeds; chance is 1/11."""
    train, test = (
        np.concatenate([feature(_pictures(s, seed)) for s in EVERY_STYLE]) for seed in (1, 2)
    )
    label = np.repeat(np.arange(len(EVERY_STYLE)), 30)
    centre, spread = train.mean(0), train.std(0) + 1e-6
    x, z = (train - centre) / spread, (test - centre) / spread
    weights = np.linalg.solve(
        x.T @ x + 30 * np.eye(x.shape[1]), x.T @ np.eye(len(EVERY_STYLE))[label]
    )
    right = (z @ weights).argmax(1) == label
    per_artist = {s: right[label == i].mean() for i, s in enumerate(EVERY_STYLE) if s != PHOTO}
    assert min(per_artist.values()) >= least, per_artist
    assert right[label > 0].mean() >= mean, per_artist


def _contours(style: str, coarse: float) -> np.ndarray:
    """Unit vectors of gradient lengths, one per object, all in the same pose."""
    rows = []
    for name in EVERY_OBJECT:
        pose = Pose(32, 32, 50, 5, False)
        image = (
            compose((name,), (pose,), "on a plain background", style, Dice(4, style)).astype(
                np.float32
            )
            / 255
        )
        light = blur(luma(image), coarse) if coarse else luma(image)
        slope = blur(np.hypot(*np.gradient(light)).astype(np.float32), 1.0)[9:-9, 3:-3]
        rows.append((slope - slope.mean()).ravel())
    matrix = np.stack(rows)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


@pytest.mark.parametrize("style", [s.name for s in STYLES])
def test_objects_stay_recognisable_in_every_style(style: str) -> None:
    """The contours of a styled object match its own photo best among all objects, at a fine or a
    coarse scale.
    """
    hits = np.zeros(len(EVERY_OBJECT), bool)
    for coarse in (0.0, 1.6):
        hits |= (_contours(style, coarse) @ _contours(PHOTO, coarse).T).argmax(1) == np.arange(
            len(hits)
        )
    assert hits.mean() >= 0.95, [o for o, h in zip(EVERY_OBJECT, hits, strict=True) if not h]


def test_every_artist_and_background_stays_in_range() -> None:
    """Black, white and pure colours at full and at no coverage: no artist leaves [0, 1] or makes a
    nan.
    """
    for value in ((0, 0, 0), (1, 1, 1), (1, 0, 0)):
        rgb = np.broadcast_to(np.array(value, np.float32), (64, 64, 3)).copy()
        for cover in (0.0, 1.0):
            mask = np.full((64, 64), cover, np.float32)
            for name, artist in ARTISTS.items():
                out = artist(rgb, mask, Dice(0, name))
                assert out.shape == (64, 64, 3)
                assert np.isfinite(out).all(), name
                assert out.min() >= -1e-5, name
                assert out.max() <= 1 + 1e-5, name
    for name, paint in BACKGROUNDS.items():
        out = paint(Dice(0, name))
        assert out.shape == (64, 64, 3)
        assert np.isfinite(out).all()
        assert out.std() > 0.003, name


def test_objects_lie_inside_the_picture() -> None:
    """A pose at the rim is moved in: the same number of object pixels as in the middle, up to
    resampling.
    """
    areas = []
    for x, y in ((32, 32), (0, 0), (63, 20)):
        image = compose(
            ("lemon",), (Pose(x, y, 40, 0, False),), "on a plain background", "sketch", Dice(0)
        )
        areas.append((image.mean(-1) < 140).sum())
    assert min(areas) > 0.9 * max(areas) > 50
