"""What the report makes of a figure that is a lower limit, or has no interval, or no verdict beside
it.
"""

from __future__ import annotations

from typing import Any

import pytest
from fake_generated import generated
from fake_records import Record, metric, sealed

from eval.report.compare import compare, to_text
from eval.report.leaderboard import leaderboard, sound, to_markdown
from eval.report.outcomes import outcome
from eval.report.summary import summary

BENIGN, WORST = "benign_steps_ratio", "steps_to_relearn_ratio_worst"


def with_metrics(
    name: str, drop: tuple[str, ...] = (), holds: bool = True, **changes: Any
) -> Record:
    one = generated(name, holds=holds)
    for key in drop:
        one["metrics"].pop(key)
    one["metrics"] |= changes
    return sealed(one)


def narrow(value: float, better: str = "higher", **kwargs: Any) -> dict[str, Any]:
    return metric(value, better, 0.01, unit="×", **kwargs)


@pytest.mark.parametrize(("name", "better"), [(BENIGN, "lower"), (WORST, "higher")])
def test_a_limit_that_may_be_any_higher_figure_neither_wins_nor_loses(
    name: str, better: str
) -> None:
    a = with_metrics("a", **{name: narrow(1.5, better, bound="lower")})
    b = with_metrics("b", **{name: narrow(1.7, better)})
    row = next(r for r in compare(a, b)["metrics"] if r["name"] == name)
    assert (row["winner"], row["sure"]) == ("open", False)
    assert "open, as the figure behind a limit is not known" in to_text(compare(a, b))
    assert all(name not in r["best"] for r in leaderboard([a, b]))
    known = next(
        r
        for r in compare(b, with_metrics("c", **{name: narrow(1.5, better)}))["metrics"]
        if r["name"] == name
    )
    assert known["winner"] in ("a", "b")


def test_a_limit_above_all_others_is_best_where_higher_is_better() -> None:
    rows = leaderboard(
        [with_metrics("a", **{WORST: narrow(5.0, bound="lower")}), with_metrics("b")]
    )
    assert [WORST in r["best"] for r in rows] == [True, False]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_an_upper_limit_leaves_open_what_lies_below_it(better: str) -> None:
    large, small = 1.7, 1.5
    for limited in ("large", "small"):
        bounds = {limited: "upper"}
        a = with_metrics("a", **{WORST: narrow(small, better, bound=bounds.get("small"))})
        b = with_metrics("b", **{WORST: narrow(large, better, bound=bounds.get("large"))})
        row = next(r for r in compare(a, b)["metrics"] if r["name"] == WORST)
        winner = "b" if better == "higher" else "a"
        assert row["winner"] == ("open" if limited == "large" else winner)
        best = [WORST in r["best"] for r in sorted(leaderboard([a, b]), key=lambda r: r["label"])]
        assert best == ([False, False] if limited == "large" else [winner == "a", winner == "b"])
        assert ("≤ 1.7" if limited == "large" else "≤ 1.5") in to_text(compare(a, b))


def test_the_headline_says_where_the_order_is_open_or_has_no_interval() -> None:
    first = with_metrics("first", **{WORST: narrow(3.0)})
    limited = with_metrics("limited", **{WORST: narrow(2.0, bound="lower")})
    assert "a limit, so the order is open" in to_markdown(leaderboard([first, limited]))
    bare = with_metrics("bare", **{WORST: metric(1.08, low=None, high=None, unit="×")})
    assert "one of them has no interval" in to_markdown(leaderboard([first, bare]))
    assert "No interval of MSGR could be given over 3 seeds" in " ".join(
        outcome(with_metrics("m", msgr_clip=metric(0.2, low=None, high=None))).details
    )


def test_seeds_are_told_by_a_figure_that_was_measured() -> None:
    nothing = metric(None, n=3, interval="point", note="not measured for neon", unit="×")
    one = with_metrics("m", **{WORST: nothing})
    assert sound(leaderboard([one])[0]) == "3 seeds"
    assert "(3 seeds)" in summary(one)


def test_figures_of_each_model_names_best_attacker_are_not_sure_where_the_attackers_differ() -> (
    None
):
    a = with_metrics(
        "a", msgr_clip=narrow(0.1), mrsgr_clip=narrow(0.1), sgr_benign_clip=narrow(0.5, "lower")
    )
    b = with_metrics(
        "b", msgr_clip=narrow(0.9), mrsgr_clip=narrow(0.9), sgr_benign_clip=narrow(0.1, "lower")
    )
    other = sealed(b | {"attacks": ["textual_inversion"]})
    for names, sure in ((b, True), (other, False)):
        rows = {r["name"]: r for r in compare(a, names)["metrics"]}
        for name in ("msgr_clip", "mrsgr_clip", "sgr_benign_clip"):
            assert (rows[name]["winner"], rows[name]["sure"]) == ("b", sure), name


def test_figures_that_neither_record_has_do_not_differ() -> None:
    a, b = (with_metrics(n, asr_reduction=metric(None, note="not measured")) for n in "ab")
    assert "asr_reduction" not in to_text(compare(a, b))


# no verdict

NO_MSGR = ("verdict", "msgr_clip", "msgr_dino", "msgr_clip_5x", "mrsgr_clip")


def test_without_msgr_the_steps_and_the_success_decide_what_is_said() -> None:
    held = outcome(with_metrics("mima", NO_MSGR, asr_reduction=narrow(0.6)))
    assert held.headline.startswith("mima holds back 2 targets: attack success 35 %")
    failed = outcome(with_metrics("mima", NO_MSGR, asr_reduction=metric(0.01, spread=5.0)))
    assert (failed.tone, failed.label) == ("bad", "not held back")
    assert failed.headline.startswith("mima is not shown to hold back")


def test_a_scorer_that_says_the_opposite_is_told_and_nothing_is_held_back() -> None:
    known = {
        "msgr_clip": narrow(0.3),
        "asr_reduction": narrow(0.6),
        "steps_to_relearn_ratio": narrow(3.0),
    }
    against = outcome(
        with_metrics(
            "mima", NO_MSGR, **known, msgr_feature_lpips=metric(-0.1, low=-0.2, high=-0.01)
        )
    )
    assert against.label == "not held back"
    assert any(
        "Another scorer says the opposite: MSGR (feature LPIPS)" in line for line in against.details
    )
    unsure = outcome(
        with_metrics("mima", NO_MSGR, **known, msgr_feature_lpips=metric(-0.1, low=-0.2, high=0.01))
    )
    assert unsure.label == "held back, no verdict"
    assert not any("opposite" in line for line in unsure.details)


def test_a_target_that_no_attack_brings_back_anywhere_was_not_put_to_the_test() -> None:
    zero, none = metric(0.0, low=0.0, high=0.0), metric(None, note="not reached")
    told = {
        "asr_baseline": zero,
        "steps_to_relearn_ratio": none,
        "verdict": metric(0.0, note="not held"),
    }
    one = outcome(with_metrics("mima", **told))
    assert (one.tone, one.label) == ("bad", "not put to the test")
    assert "in the baseline either" in one.headline


def test_a_hair_above_zero_is_no_protection() -> None:
    one = with_metrics("mima", ("verdict",), msgr_clip=metric(0.001, spread=20.0))
    assert outcome(one).tone == "bad"
    other = with_metrics("mima", ("verdict", "msgr_clip"), msgr_dino=metric(0.4))
    assert outcome(other).tone == "unsure"
    assert "MSGR (DINO) 0.4" in " ".join(outcome(other).details)


def test_what_clip_could_not_measure_is_not_held_back_by_another_scorer() -> None:
    known = {
        "msgr_features": metric(0.4),
        "asr_reduction": narrow(0.6),
        "steps_to_relearn_ratio": narrow(3.0),
    }
    one = outcome(
        with_metrics(
            "mima",
            ("verdict",),
            msgr_clip=metric(None, note="the baseline gained nothing"),
            **known,
        )
    )
    assert one.label == "not held back"
    assert (
        "No verdict was passed (eval=concept_verdict): whether the benign side holds was "
        "not scored." in one.details
    )


def test_utility_alone_is_told_as_such() -> None:
    names = tuple(n for n in generated()["metrics"] if not n.startswith("utility_"))
    found = outcome(with_metrics("mima", names))
    assert "only what it does to unrelated prompts" in found.headline
    assert any("CLIP drift" in d for d in found.details)
