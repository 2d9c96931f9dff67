"""Comparison of two records, seeds paired where both have them, and labels of records in one
table.
"""

import math

import numpy as np
import pytest
import scipy.stats
from fake_generated import generated
from fake_records import attacked, metric, record, sealed

from eval.report.compare import compare, to_html, to_text
from eval.report.paired import common_seeds, difference
from eval.report.words import labels
from eval.stats.intervals import score_samples
from lab.core.errors import UserError

RNG = np.random.default_rng(7)


def with_seeds(values, *, aggregate="mean", seeds=None, data="d", immunizer="kappa", name="rir"):
    """A record whose metric ``name`` was measured as ``values``, one per seed."""
    seeds = list(range(len(values))) if seeds is None else seeds
    found = score_samples([[v] for v in values], "higher", aggregate=aggregate)
    one = metric(found.value, n=found.n, low=found.low, high=found.high, interval=found.interval)
    base = record(immunizer, seeds=seeds, metrics={name: one})
    base["tables"] = {
        "seed_values": [{"metric": name, **dict(zip(map(str, seeds), found.per_seed, strict=True))}]
    }
    base["provenance"]["data_hash"] = {str(s): f"{data}{s}" for s in seeds}
    return sealed(base)


def test_paired_interval_is_the_paired_t_interval():
    a, b = RNG.normal(3, 1, 5), RNG.normal(3, 1, 5) + 1
    found = difference("rir", with_seeds(a), with_seeds(b))
    expected = scipy.stats.ttest_rel(b, a).confidence_interval()
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found.value == pytest.approx(b.mean() - a.mean())
    assert "paired over 5 seeds" in found.how


def test_pairing_sees_what_independent_intervals_hide():
    hard = np.array([1.0, 5.0, 20.0, 60.0])  # seeds differ by far more than the two methods
    a, b = with_seeds(hard), with_seeds(hard + np.array([1.0, 1.2, 0.9, 1.1]))
    assert difference("rir", a, b).significant
    b["tables"] = {}
    alone = difference("rir", a, b)
    assert not alone.significant
    assert alone.how.startswith("not paired")


def test_geometric_means_are_compared_as_a_ratio_too():
    a = np.array([1e-9, 3e-7, 2e-8, 5e-8])
    b = a * np.array([3.0, 2.5, 3.5, 2.8])
    found = difference(
        "rir", with_seeds(a, aggregate="geomean"), with_seeds(b, aggregate="geomean")
    )
    expected = np.exp(scipy.stats.ttest_rel(np.log(b), np.log(a)).confidence_interval())
    assert found.ratio == (
        pytest.approx(found.ratio[0]),
        pytest.approx(expected[0]),
        pytest.approx(expected[1]),
    )
    assert found.ratio[0] == pytest.approx((3 * 2.5 * 3.5 * 2.8) ** 0.25)
    assert found.significant


@pytest.mark.parametrize("aggregate", ["mean", "geomean"])
def test_the_interval_covers_in_19_of_20_cases(aggregate):
    """Data of known difference, four seeds each, log-normal with a common part per seed."""
    hits, runs = 0, 400
    for _ in range(runs):
        common = RNG.normal(0, 0.5, 4)
        a, b = (np.exp(common + shift + RNG.normal(0, 0.2, 4)) for shift in (0.0, 0.3))
        if aggregate == "mean":
            a, b = np.log(a), np.log(b)
        found = difference(
            "rir", with_seeds(a, aggregate=aggregate), with_seeds(b, aggregate=aggregate)
        )
        if aggregate == "mean":
            hits += found.low <= 0.3 <= found.high
        else:
            hits += found.ratio[1] <= math.exp(0.3) <= found.ratio[2]
    assert hits / runs == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / runs))


def test_ten_seeds_are_paired_by_the_bootstrap():
    a = RNG.normal(3, 1, 12)
    found = difference("rir", with_seeds(a), with_seeds(a + RNG.normal(0.5, 0.1, 12)))
    assert "bootstrap" in found.how
    assert 0.3 < found.low < found.value < found.high < 0.7


def test_a_value_that_is_no_mean_over_seeds_is_not_paired():
    a, b = with_seeds([1.0, 2.0, 3.0]), with_seeds([2.0, 3.0, 4.5])
    for one in (a, b):
        one["metrics"]["rir"]["value"] *= 1.01  # a quotient of means, say
    assert difference("rir", a, b).how.startswith("not paired")


def test_seeds_are_paired_only_on_the_same_data():
    a, b = with_seeds([1.0, 2.0, 3.0]), with_seeds([2.0, 3.0, 4.5], data="other")
    assert common_seeds(a, b) == []
    assert difference("rir", a, b).how.startswith("not paired")
    fewer = with_seeds([2.0, 3.0, 4.5], seeds=[1, 2, 3])
    assert common_seeds(a, fewer) == [1, 2]
    assert difference("rir", a, fewer).how.startswith("not paired")


def test_the_worst_case_over_other_attackers_is_never_sure():
    a, b = attacked("kappa", 1.0, 1.0, 5.0), attacked("kappa", 9.0, 1.0, 500.0)
    assert {r["name"]: r["significant"] for r in compare(a, b)["metrics"]}["slowdown_harmful_worst"]
    b = sealed(b | {"attacks": ["linear_probe"]})
    result = compare(a, b)
    sure = {r["name"]: r["significant"] for r in result["metrics"]}
    assert not sure["slowdown_harmful_worst"]
    assert sure["rir"]


@pytest.mark.parametrize("where", ["attacks", "budget"])
def test_the_same_attackers_with_other_options_are_another_trial(where):
    """A learning rate of 1e-7 makes an attacker of the same name harmless."""
    a, b = attacked("kappa", 1.0, 1.0, 5.0), attacked("kappa", 9.0, 1.0, 500.0)
    a["config"] = {
        **a["config"],
        "attacks": {"linear_probe": {"lr": 0.1}},
        "budget": {"horizon": 20, "points": 3},
    }
    changed = {"attacks": {"linear_probe": {"lr": 1e-7}}, "budget": {"horizon": 20, "points": 30}}[
        where
    ]
    result = compare(sealed(a), sealed(b | {"config": {**a["config"], where: changed}}))
    assert not result["same_trial"]
    assert not {r["name"]: r["significant"] for r in result["metrics"]}["slowdown_harmful_worst"]
    kept = {"linear_probe": {"lr": 0.1, "keep_weights": True}}
    assert compare(a, sealed(b | {"config": {**a["config"], "attacks": kept}}))["same_trial"]


def test_two_seeds_are_never_sure():
    a, b = with_seeds([1.0, 1.1]), with_seeds([9.0, 9.1])
    found = difference("rir", a, b)
    assert not found.significant
    assert found.low is None


def test_the_page_shows_settings_and_differences():
    a, b = attacked("kappa_opt", 1.9, 1.01, 92.6), attacked("kappa", 3.4, 1.03, 356.0)
    a["scenario"] = b["scenario"] = "<script>"
    text = to_html(compare(a, b))
    assert "immunize.name" in text
    assert "B, significant" in text
    assert "<script>" not in text


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_limit_leaves_open_who_is_better(better):
    large, small = 1.7, 1.5
    for limited, kind in (("large", "upper"), ("small", "upper"), ("small", "lower")):
        bounds = {limited: kind}
        a, b = record("a"), record("b")
        for one, value, name in ((a, small, "small"), (b, large, "large")):
            figure = metric(value, better, 0.01, bound=bounds.get(name), unit="×")
            one["metrics"] = {"benign_steps_ratio": figure}
        (row,) = compare(sealed(a), sealed(b))["metrics"]
        is_open = (limited, kind) != ("small", "upper")
        winner = "b" if better == "higher" else "a"
        assert row["winner"] == ("undetermined" if is_open else winner)
        assert not (is_open and row["significant"])
        assert f"{'≤' if kind == 'upper' else '≥'} 1." in to_text(compare(a, b))


def test_a_terminal_shows_ten_figures():
    text = to_text(compare(generated("mima", holds=False), generated()))
    assert "immunize.name: mima → mima_deep" in text
    assert "intervals of" in text
    assert sum(line.startswith(("↑", "↓", "·")) for line in text.splitlines()) <= 10


@pytest.mark.parametrize(("key", "other"), [("scenario", "mnist_pairs"), ("schema", "0.9")])
def test_records_of_other_scenarios_or_schemas_are_refused(key, other):
    a = attacked("kappa", 3.4, 1.03, 356.0)
    with pytest.raises(UserError, match=f"different {key}s"):
        compare(a, a | {key: other})


# labels


def variants(*changes, study="options"):
    """Records of one immunizer whose config deviates from common settings by ``changes``."""
    common = {
        "eta": 0.1,
        "scope": "kv",
        "lower": {"scope": "kv", "steps": 1},
        "attackers": None,
        "cap": 0.5,
    }
    out = []
    for i, change in enumerate(changes):
        one = record("kappa", name=f"{study}/kappa")
        lower = common["lower"] | change.get("lower", {})
        one["config"]["immunize"] = {"name": "kappa", **common, **change, "lower": lower}
        one["notes"] = [str(i)]
        out.append(sealed(one))
    return out


def test_an_ablation_is_labelled_by_what_it_changes():
    changes = [
        {},
        {"eta": 0.2},
        {"scope": "all"},
        {"lower": {"scope": "all"}},
        {"cap": None},
        {"lower": {"steps": 5}},
        {"attackers": {"sgd": {"lr": 1.0, "rank": 4}, "adam": {"lr": 2.0}}},
    ]
    assert labels(variants(*changes)) == [
        "kappa · common settings",
        "kappa · eta=0.2",
        "kappa · immunize.scope=all",
        "kappa · lower.scope=all",
        "kappa · cap=null",
        "kappa · steps=5",
        "kappa · sgd.lr=1.0 · rank=4 · adam.lr=2.0",
    ]


def test_labels_are_always_different():
    twice = variants({}, {})
    assert len(set(labels(twice))) == 2
    other = variants({}, study="second")
    assert labels([*variants({}), *other]) == ["kappa (options)", "kappa (second)"]
    assert labels(variants({})) == ["kappa"]
