"""What the quality report of MiniSD asks for."""

from collections import Counter

from lab.minisd.train.quality import asked, suites
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
    sizes = {scale: [len(s.prompts) for s in suites(scale).values()] for scale in (1, 16, 32, 64)}
    assert sizes[64] == [2 * n for n in sizes[32]]
    assert all(abs(n - m / 2) <= 1 for n, m in zip(sizes[16], sizes[32], strict=True))
    assert sum(sizes[1]) < 120


def test_prompts_say_what_they_are_scored_for() -> None:
    full = suites(32)
    for text, name, style in zip(
        full["styles"].prompts, full["styles"].objects, full["styles"].styles, strict=True
    ):
        assert name in text
        assert style in text
    described = full["described"]
    assert not any(s in t for t, s in zip(described.prompts, described.styles, strict=True))
    five = asked([("fox", PHOTO)], 7)
    assert len(set(five.prompts)) == 5  # every way to ask once, then again from the start
    assert five.prompts[5:] == five.prompts[:2]
