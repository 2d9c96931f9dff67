from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from fake_records import attacked, baseline, digits, failed, metric, record, sealed, sweep

from eval.report.compare import compare, to_text
from eval.report.labels import labels
from eval.report.leaderboard import leaderboard, to_csv, to_html, to_markdown
from eval.report.outcomes import outcome
from eval.report.published import PUBLISHED
from eval.report.summary import summary
from eval.report.words import figure
from lab.core.errors import UserError

CONF = Path(__file__).resolve().parents[4] / "conf"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (4.561, "4.56"),
        (12345.0, "12,345"),
        (2.5e9, "2.5·10⁹"),
        (1e-7, "10⁻⁷"),
        (9.999e6, "10⁷"),
        (None, "–"),
        (-3.0, "-3"),
    ],
)
def test_figures_are_readable(value: float | None, text: str) -> None:
    assert figure(value) == text


# words


def test_outcome_says_who_won_and_how_sure() -> None:
    good = outcome(attacked("kappa", 3.4, 1.03, 356.0))
    assert good.tone == "good"
    assert "kappa wins over the baseline" in good.headline
    assert any("over 3 seeds lies above 1" in d for d in good.details)
    broken = outcome(attacked("kappa", 4.9, 3.7, 1.2))
    assert broken.tone == "bad"
    assert (
        broken.headline
        == "The baseline wins: kappa fails on the benign side, though it holds back the "
        "harmful task."
    )
    assert outcome(baseline()).tone == "neutral"
    assert "UserError" in outcome(failed()).headline
    assert outcome(digits()).tone == "unsure"
    assert any("supports no claim about other seeds" in d for d in outcome(digits()).details)


def test_an_interval_over_one_is_not_sure() -> None:
    found = outcome(record("kappa", attacks=[], metrics={"rir": metric(1.05, spread=0.2)}))
    assert found.tone == "unsure"
    assert any("may be chance" in d for d in found.details)
    assert outcome(record("kappa", attacks=[], metrics={"rir": metric(0.8)})).tone == "bad"


def test_summary_fits_a_screen() -> None:
    for one in sweep():
        lines = summary(one).splitlines()
        assert len(lines) <= 32
        assert all(len(line) <= 110 for line in lines)
    text = summary(attacked("kappa", 3.4, 1.03, 356.0))
    assert "kappa wins over the baseline" in text
    assert "with uncommitted changes" in text
    assert "1 of 1 stages failed" in summary(failed())
    assert "skipped verdict" in summary(digits())


def test_a_lower_limit_is_marked() -> None:
    one = attacked("kappa", 5.0, 1.0, 2.0)
    one["metrics"]["slowdown_harmful_worst"]["bound"] = "lower"
    assert "≥ 5×" in summary(sealed(one))


# leaderboard


def test_order_puts_holding_verdicts_first_then_the_worst_case() -> None:
    rows = [r for r in leaderboard(sweep()) if r["scenario"] == "house_price"]
    names = [
        "kappa_closed_form",
        "kappa",
        "kappa_opt",
        "kappa_ill_only",
        "kappa_well_only",
        "kappa_imma",
        "none",
    ]
    assert [r["immunizer"] for r in rows] == names
    assert [r["rank"] for r in rows] == [1, 2, 3, 4, 5, None, None]


def test_among_failures_the_checks_passed_decide_then_the_harmful_slowdown() -> None:
    records = [
        attacked(name, slow, 5.0, 1.3) for name, slow in (("a", 5.0), ("b", 1.5), ("c", 1.4))
    ]
    for one, passed in zip(records, (1, 2, 2), strict=True):
        one["tables"]["verdict"] = [{"passed": i < passed, "side": "benign"} for i in range(3)]
    rows = leaderboard(records)
    assert [r["immunizer"] for r in rows] == ["b", "c", "a"]
    assert all(r["best"] == [] for r in rows)


def test_measures_that_disagree_are_said() -> None:
    one = attacked("kappa", 0.71, 0.04, 88.0)
    one["metrics"]["slowdown_loss_harmful_worst"]["value"] = 1.43
    assert any("the two measures disagree" in d for d in outcome(sealed(one)).details)


def test_a_broken_model_is_never_marked_as_best() -> None:
    rows = {r["immunizer"]: r for r in leaderboard(sweep()) if r["scenario"] == "house_price"}
    assert rows["kappa_ill_only"]["best"] == []
    assert "slowdown_harmful_worst" in rows["kappa_closed_form"]["best"]


def test_markdown_html_and_csv_carry_intervals_and_directions() -> None:
    rows = leaderboard(sweep())
    text = to_markdown(rows)
    assert "harmful slowdown, worst attacker ↑" in text
    assert "benign slowdown, worst attacker ↓" in text
    assert "3.4× [3.13, 3.67]" in text
    assert "kappa_closed_form comes first of 5" in text
    assert "intervals overlap" not in text
    page = to_html(rows)
    assert "3.4× [3.13, 3.67]" in page
    table = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert len(table) == len(rows)
    assert float(table[1]["slowdown_harmful_worst_low"]) == pytest.approx(3.4 * 0.92)
    assert table[0]["rir_interval"] == "across_seeds"


def test_overlapping_intervals_are_said() -> None:
    text = to_markdown(leaderboard([attacked("a", 3.4, 1.0, 9.0), attacked("b", 3.3, 1.0, 9.0)]))
    assert "overlap, so the order may be chance" in text
    nobody = to_markdown(leaderboard([attacked("a", 3.4, 2.0, 9.0), attacked("b", 3.3, 2.0, 9.0)]))
    assert "The baseline wins" in nobody


def test_records_of_one_immunizer_are_told_apart_by_their_settings() -> None:
    small, large = attacked("kappa", 3.4, 1.0, 9.0), attacked("kappa", 3.0, 1.0, 9.0)
    large["config"]["immunize"]["eta"] = 0.05
    assert labels([small, sealed(large)]) == ["kappa · eta=0.005", "kappa · eta=0.05"]


def diverged(one: dict) -> dict:
    one["status"] = "diverged"
    one["error"] = {
        "type": "Diverged",
        "message": "κ left the finite range",
        "key": None,
        "last_good_step": 3,
    }
    return sealed(one)


def test_a_run_that_diverged_in_part_is_never_good() -> None:
    found = outcome(diverged(attacked("kappa", 3.4, 1.03, 356.0)))
    assert (found.tone, found.label) == ("bad", "partly diverged")
    assert "wins over the baseline" not in found.headline
    assert "κ left the finite range" in found.details[0]
    predicted = outcome(diverged(record("kappa", attacks=[], metrics={"rir": metric(356.0)})))
    assert (predicted.tone, predicted.label) == ("unsure", "partly diverged")
    assert "On the rest: kappa makes the harmful task relatively harder" in predicted.headline
    worse = outcome(diverged(record("kappa", attacks=[], metrics={"rir": metric(0.5)})))
    assert worse.tone == "bad"


def test_a_run_that_diverged_in_part_ranks_below_complete_ones() -> None:
    best, failing = (
        diverged(attacked("kappa_opt", 9.0, 1.0, 5000.0)),
        attacked("kappa", 1.0, 3.0, 0.5),
    )
    rows = leaderboard([best, failing, failed()])
    assert [(r["immunizer"], r["rank"]) for r in rows] == [
        ("kappa", 1),
        ("kappa_opt", 2),
        ("kappa_imma", None),
    ]
    assert rows[1]["best"] == []
    text = to_markdown(rows)
    assert "| kappa_opt | partly diverged |" in text
    assert "Student's t over seed means" in text
    assert "| partly diverged |" in text
    good = attacked("kappa", 3.0, 1.0, 9.0)
    assert "kappa_opt with 9×" in to_markdown(leaderboard([best, good]))
    assert "which diverged on part of the run" in to_markdown(leaderboard([best, good]))


def test_summary_shows_what_was_dropped_imputed_and_what_remains() -> None:
    notes = [
        "Rows were split by seed.",
        "Dropped as constant in the benign training rows (6): Utilities, Street, "
        + "and a long list of columns " * 9,
        "Missing numbers were replaced by the median of both tasks' training rows, by "
        "column (3): LotFrontage 259.",
        "61 features remain (rank 61 of 61).",
    ]
    text = summary(record("kappa", notes=notes))
    for part in (
        "data: Dropped as constant",
        "data: Missing numbers were replaced",
        "data: 61 features remain (rank 61",
    ):
        assert part in text
    assert "Rows were split" not in text
    assert "1 more notes in the record" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "data: Rows were split" in summary(record("kappa", notes=notes[:1]))


# compare


def test_compare_gives_differences_with_intervals() -> None:
    a, b = attacked("kappa_opt", 1.9, 1.01, 92.6), attacked("kappa", 3.4, 1.03, 356.0)
    result = compare(a, b)
    json.dumps(result, allow_nan=False)
    rir = next(m for m in result["metrics"] if m["name"] == "rir")
    assert rir["difference"] == pytest.approx(263.4)
    half = ((0.08 * 92.6) ** 2 + (0.08 * 356) ** 2) ** 0.5
    assert (rir["low"], rir["high"]) == (pytest.approx(263.4 - half), pytest.approx(263.4 + half))
    assert (rir["winner"], rir["sure"]) == ("b", True)
    benign = next(m for m in result["metrics"] if m["name"] == "slowdown_benign_worst")
    assert (benign["winner"], benign["sure"]) == ("a", False)
    assert {"key": "immunize.name", "a": "kappa_opt", "b": "kappa"} in result["config"]
    text = to_text(result)
    assert "immunize.name: kappa_opt → kappa" in text
    assert "B better, sure" in text


def test_compare_of_equal_records_says_so() -> None:
    a = attacked("kappa", 3.4, 1.03, 356.0)
    assert "same content" in to_text(compare(a, a))


@pytest.mark.parametrize(("key", "other"), [("scenario", "mnist_pairs"), ("schema", "0.9")])
def test_compare_refuses_what_is_not_comparable(key: str, other: str) -> None:
    a = attacked("kappa", 3.4, 1.03, 356.0)
    with pytest.raises(UserError, match=f"different {key}s"):
        compare(a, a | {key: other})


def test_a_preset_of_a_paper_stands_beside_what_the_paper_reports() -> None:
    for name in PUBLISHED:
        assert (CONF / "immunize" / f"{name}.yaml").is_file()
    name = "kappa_paper_house_price"
    error = {"type": "Diverged", "message": "loss is nan", "last_good_step": 1, "key": None}
    ended = outcome(record(name, status="diverged", error=error))
    assert ended.label == "diverged"
    assert "356.2" in ended.details[-1]
    assert "diverge" in ended.details[-1]
    reached = outcome(record(name, attacks=[], metrics={"rir": metric(1.2)}))
    assert "356.2" in reached.details[-1]
    assert "here it is 1.2" in reached.details[-1]
    assert not any("356.2" in line for line in outcome(record(name, scenario="csv")).details)
    assert not any(
        "356.2" in line for line in outcome(record("kappa", metrics={"rir": metric(1.2)})).details
    )


def test_records_of_other_cases_are_not_ranked_together():
    def of(name, *cases):
        common = {
            "stage": "immunize",
            "key": "k",
            "status": "ok",
            "model": name,
            "seed": 0,
            "attack": None,
            "task": None,
        }
        cells = [{**common, "case": case} for case in cases]
        return sealed(attacked(name, 1.4, 1.0, 5.0) | {"cells": cells})

    many = [f"case{i}" for i in range(9)]
    other = [*many[:-2], "x", "y"]
    found = [
        of("a", "one", "two"),
        of("b", "two", "one"),
        of("c", "one"),
        of("d", *many),
        of("e", *other),
    ]
    rows = leaderboard(found)
    assert [(r["immunizer"], r["rank"]) for r in rows] == [
        ("a", 1),
        ("b", 2),
        ("c", 1),
        ("d", 1),
        ("e", 1),
    ]
    assert [r["title"] for r in leaderboard([*found, failed()])].count(rows[0]["title"]) == 3
    titles = [line for line in to_markdown(rows).splitlines() if line.startswith("###")]
    assert titles[0].endswith("· cases one, two")
    assert titles[1].endswith("· case one")
    assert "9 cases case0 … case8 (" in titles[2]


def test_a_run_that_ended_before_its_cases_stands_where_it_was_asked_to():
    """With what was asked for alike; one that was killed has no cells at all, see
    `lab.cluster.status`.
    """
    first, second = attacked("first", 1.4, 1.0, 5.0), attacked("second", 1.4, 1.0, 5.0)
    second = sealed(second | {"attacks": ["linear_probe"]})
    early = sealed(failed() | {"attacks": ["linear_probe"], "config": second["config"]})
    killed = {k: v for k, v in early.items() if k != "cells"} | {"immunizer": "killed"}
    rows = leaderboard([first, second, early, killed])
    assert len({r["title"] for r in rows}) == 2
    assert [r["immunizer"] for r in rows if r["title"] == rows[0]["title"]] == ["first"]


def test_records_that_met_other_attackers_or_budgets_are_not_ranked_together():
    hard = attacked("hard", 1.4, 1.0, 5.0)
    easy = attacked("easy", 9.0, 1.0, 5.0)
    easy = sealed(easy | {"attacks": ["linear_probe"]})
    long = attacked("long", 8.0, 1.0, 5.0)
    long = sealed(
        long
        | {"config": long["config"] | {"budget": {"horizon": 200, "multiple": 5, "points": 20}}}
    )
    rows = leaderboard([hard, easy, long, failed()])
    assert [(r["immunizer"], r["rank"]) for r in rows if r["rank"]] == [
        ("hard", 1),
        ("easy", 1),
        ("long", 1),
    ]
    text = to_markdown(rows)
    assert "linear_probe, linear_probe_adam · 20 steps (1×) of 100" in text
    assert text.count("### house_price on linear · ") == 3
    assert "comes first" not in text
    assert "linear_probe · 20 steps (1×) of 100" in to_csv(rows)
    alike = to_markdown(leaderboard([hard, attacked("second", 1.3, 1.0, 5.0), failed()]))
    assert "### house_price on linear\n" in alike
