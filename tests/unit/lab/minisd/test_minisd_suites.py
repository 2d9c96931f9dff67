"""What the quality report of MiniSD asks for."""

from collections import Counter

from lab.minisd.train.quality import suites
from lab.minisd.world.vocabulary import HELD_OUT_PAIRS, OBJECTS, PHOTO, STYLE_NAMES


def test_suites_ask_for_every_object_style_and_pair() -> None:
    full = suites(32)
    assert Counter(full["photos"].objects) == dict.fromkeys(OBJECTS, 32)
    assert set(full["photos"].styles) == {PHOTO}
    for name in ("styles", "described"):
        pairs = list(zip(full[name].objects, full[name].styles, strict=True))
        assert (
            len(pairs) == len(set(pairs)) == len(OBJECTS) * len(STYLE_NAMES) - len(HELD_OUT_PAIRS)
        )
        assert not set(pairs) & HELD_OUT_PAIRS
    unseen = Counter(zip(full["unseen_pairs"].objects, full["unseen_pairs"].styles, strict=True))
    assert unseen == dict.fromkeys(HELD_OUT_PAIRS, 8)
