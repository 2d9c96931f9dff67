"""Comparison of two records, seeds paired where both have them, and labels of records in one
table.
"""

import numpy as np
import pytest
import scipy.stats
from fake_generated import generated
from fake_records import attacked, metric, record, sealed

from eval.report.compare import compare, compare_many, many_to_text, to_html, to_text
from eval.report.paired import common_seeds, difference, holm
from eval.report.words import labels
from eval.stats.intervals import score_samples
from lab.core.errors import UserError

RNG = np.random.default_rng(7)


def with_seeds(values, *, aggregate="mean", seeds=None, data="d"):
    """A record whose RIR was measured as ``values``, one per seed."""
    seeds = list(range(len(values))) if seeds is None else seeds
    score = score_samples([[v] for v in values], "higher", aggregate=aggregate)
    parts = {part: getattr(score, part) for part in ("n", "low", "high", "interval")}
    base = record("kappa", seeds=seeds, metrics={"rir": metric(score.value, **parts)})
    per_seed = dict(zip(map(str, seeds), score.per_seed, strict=True))
    base["tables"] = {"seed_values": [{"metric": "rir", **per_seed}]}
    base["provenance"]["data_hash"] = {str(s): f"{data}{s}" for s in seeds}
    return sealed(base)


def limits(ends):
    return pytest.approx((ends["low"], ends["high"]))


def student(a, b):
    """The paired t interval of scipy."""
    interval = scipy.stats.ttest_rel(b, a).confidence_interval()
    return interval.low, interval.high


def test_paired_interval_is_the_paired_t_interval():
    a, b = RNG.normal(3, 1, 5), RNG.normal(3, 1, 5) + 1
    gap = difference("rir", with_seeds(a), with_seeds(b))
    assert student(a, b) == limits(gap)
    assert gap["difference"] == pytest.approx(b.mean() - a.mean())
    assert "paired over 5 seeds" in gap["how"]
    assert gap["p"] == pytest.approx(scipy.stats.ttest_rel(b, a).pvalue)


def test_p_value_of_the_bootstrap_agrees_with_the_interval():
    a = RNG.normal(3, 1, 12)
    near, far = (
        difference("rir", with_seeds(a), with_seeds(a + shift))
        for shift in (RNG.normal(0, 1, 12), RNG.normal(2, 1, 12))
    )
    assert (near["p"] < 0.05) == near["significant"]
    assert far["p"] < 0.05
    assert far["significant"]


def test_holm_by_hand():
    """0.01 × 3, 0.02 × 2, and no smaller than those before it."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_many_records_are_corrected_for_their_number():
    """One of three methods is clearly better; another only as long as it is looked at alone."""
    base = np.array([5.0, 6.0, 7.0, 8.0, 9.0])
    noise = np.array([0.1, -0.1, 0.05, -0.05, 0.0])
    gains = base + 3 + noise, base + 1 + 9 * noise, base + 7 * noise
    alone = compare(with_seeds(base), with_seeds(gains[1]))["metrics"][0]
    assert alone["significant"]
    p = scipy.stats.ttest_rel(gains[1], base).pvalue
    table = compare_many(with_seeds(base), [with_seeds(values) for values in gains])
    assert list(table["figure"]) == ["rir"] * 3
    assert table["significant"].tolist() == [True, False, False]
    assert table["p_holm"][1] == pytest.approx(2 * p)
    assert "p (Holm)" in many_to_text(table, with_seeds(base))


def test_pairing_sees_what_independent_intervals_hide():
    hard = np.array([1.0, 5.0, 20.0, 60.0])  # seeds differ by far more than the two methods
    a, b = with_seeds(hard), with_seeds(hard + np.array([1.0, 1.2, 0.9, 1.1]))
    assert difference("rir", a, b)["significant"]
    b["tables"] = {}
    unpaired = difference("rir", a, b)
    assert not unpaired["significant"]
    assert unpaired["how"].startswith("not paired")


def test_geometric_means_are_compared_as_a_ratio_too():
    a = np.array([1e-9, 3e-7, 2e-8, 5e-8])
    b = a * np.array([3.0, 2.5, 3.5, 2.8])
    gap = difference("rir", *(with_seeds(values, aggregate="geomean") for values in (a, b)))
    assert tuple(np.exp(student(np.log(a), np.log(b)))) == limits(gap["ratio"])
    assert gap["ratio"]["value"] == pytest.approx((3 * 2.5 * 3.5 * 2.8) ** 0.25)
    assert gap["significant"]


def test_ten_seeds_are_paired_by_the_bootstrap():
    a = RNG.normal(3, 1, 12)
    gap = difference("rir", with_seeds(a), with_seeds(a + RNG.normal(0.5, 0.1, 12)))
    assert "bootstrap" in gap["how"]
    assert 0.3 < gap["low"] < gap["difference"] < gap["high"] < 0.7


def test_seeds_are_paired_only_on_the_same_data_and_where_the_value_is_their_mean():
    a, b = with_seeds([1.0, 2.0, 3.0]), with_seeds([2.0, 3.0, 4.5], data="other")
    fewer = with_seeds([2.0, 3.0, 4.5], seeds=[1, 2, 3])
    quotient = with_seeds([2.0, 3.0, 4.5])
    quotient["metrics"]["rir"]["value"] *= 1.01  # a quotient of means, say
    assert (common_seeds(a, b), common_seeds(a, fewer)) == ([], [1, 2])
    for other in (b, fewer, quotient):
        assert difference("rir", a, other)["how"].startswith("not paired")


def test_two_seeds_are_never_significant():
    gap = difference("rir", with_seeds([1.0, 1.1]), with_seeds([9.0, 9.1]))
    assert not gap["significant"]
    assert gap["low"] is None


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"linear_probe": {"lr": 0.1, "keep_weights": True}}, True),
        ({"linear_probe": {"lr": 1e-7}}, False),  # it makes an attacker harmless
        ({"linear_probe": {"lr": 0.1}, "another_probe": {}}, False),
    ],
)
def test_the_worst_case_over_other_attackers_is_never_significant(change, is_same):
    a, b = attacked("kappa", 1.0, 1.0, 5.0), attacked("kappa", 9.0, 1.0, 500.0)
    a["config"] = a["config"] | {"attacks": {"linear_probe": {"lr": 0.1}}}
    result = compare(sealed(a), sealed(b | {"config": a["config"] | {"attacks": change}}))
    significant = {row["name"]: row["significant"] for row in result["metrics"]}
    assert (result["same_trial"], significant["slowdown_harmful_worst"]) == (is_same, is_same)
    assert significant["rir"]


def test_figures_come_first_then_settings_of_both():
    a, b = attacked("<script>", 1.9, 1.01, 92.6), attacked("kappa", 3.4, 1.03, 356.0)
    b["config"]["immunize"] |= {"epochs": 100}
    result = compare(a, sealed(b))
    for text in (to_text(result), to_html(result)):
        assert text.index("B, significant") < text.index("immunize.name")
        assert "epochs" not in text  # comes with the choice of the other method
    assert "<script" not in to_html(result)


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_limit_leaves_open_who_is_better(better):
    for limited, kind in (("large", "upper"), ("small", "upper"), ("small", "lower")):
        bounds = {limited: kind}
        a, b = record("a"), record("b")
        for side, value, name in ((a, 1.5, "small"), (b, 1.7, "large")):
            figure = metric(value, better, 0.01, bound=bounds.get(name), unit="×")
            side["metrics"] = {"benign_steps_ratio": figure}
        (row,) = compare(sealed(a), sealed(b))["metrics"]
        is_open = (limited, kind) != ("small", "upper")
        winner = "b" if better == "higher" else "a"
        assert row["winner"] == ("undetermined" if is_open else winner)
        assert not (is_open and row["significant"])
        assert f"{'≤' if kind == 'upper' else '≥'} 1." in to_text(compare(a, b))


def test_a_terminal_shows_ten_figures():
    text = to_text(compare(generated("mima", holds=False), generated()))
    assert "immunize.name: mima → mima_deep" in text
    assert sum(line.startswith(("↑", "↓", "·")) for line in text.splitlines()) <= 10


def test_records_without_a_difference_or_a_common_figure():
    values = [1.0, 2.0, 3.0]
    other = sealed(with_seeds(values) | {"immunizer": "other"})
    assert "0 more figures differ and 1 are equal" in to_text(compare(with_seeds(values), other))
    with pytest.raises(UserError, match="no figure in common"):
        compare(with_seeds(values), record(status="failed", metrics={}))


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
        lower = common["lower"] | change.get("lower", {})
        config = {"immunize": {"name": "kappa", **common, **change, "lower": lower}}
        out.append(record("kappa", name=f"{study}/kappa", config=config, notes=[str(i)]))
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


def test_sampling_of_an_attack_is_named_only_where_it_is_not_the_scenarios():
    runs = variants({}, {}, {})
    for run, steps in zip(runs, (1, 2, 2), strict=True):
        run["config"] |= {"scenario": {"sampling": {"steps": steps}}}
        run["config"]["attacks"] = {"lora": {"sampling": {"steps": steps}}}
    assert labels(runs[:2]) == ["kappa · steps=1", "kappa · steps=2"]
    runs[2]["config"]["attacks"]["lora"]["sampling"]["steps"] = 4
    assert labels(runs)[2] == "kappa · lora.sampling.steps=4"


def test_labels_are_always_different():
    assert len(set(labels(variants({}, {})))) == 2
    other = variants({}, study="second")
    assert labels([*variants({}), *other]) == ["kappa (options)", "kappa (second)"]
    assert labels(variants({})) == ["kappa"]
