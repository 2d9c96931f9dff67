from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from fake_generated import generated
from fake_records import attacked, baseline, digits, failed, metric, record, sealed, sweep

from eval.report.compare import compare, to_text
from eval.report.leaderboard import leaderboard, to_csv, to_html, to_markdown
from eval.report.outcomes import outcome
from eval.report.published import PUBLISHED
from eval.report.summary import summary
from lab.core.errors import UserError

CONF = Path(__file__).resolve().parents[4] / "conf"


# words


def test_outcome_says_who_won_and_how_sure() -> None:
    good = outcome(attacked("kappa", 3.4, 1.03, 356.0))
    assert good.tone == "good"
    assert "kappa wins over the baseline" in good.headline
    broken = outcome(attacked("kappa", 4.9, 3.7, 1.2))
    assert broken.tone == "bad"
    assert "The baseline wins" in broken.headline
    assert outcome(baseline()).tone == "neutral"
    assert "UserError" in outcome(failed()).headline
    assert outcome(digits()).tone == "unsure"


def test_summary_fits_a_screen() -> None:
    for one in (*sweep(), generated(), generated("mima", holds=False)):
        lines = summary(one).splitlines()
        assert len(lines) <= 32
        assert all(len(line) <= 110 for line in lines)


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


def test_a_broken_model_is_never_marked_as_best() -> None:
    rows = {r["immunizer"]: r for r in leaderboard(sweep()) if r["scenario"] == "house_price"}
    assert rows["kappa_ill_only"]["best"] == []
    assert "slowdown_harmful_worst" in rows["kappa_closed_form"]["best"]


def test_markdown_html_and_csv_carry_intervals_and_directions() -> None:
    rows = leaderboard(sweep())
    assert "harmful slowdown, worst attacker ↑" in to_markdown(rows)
    for text in (to_markdown(rows), to_html(rows)):
        assert "3.4× [3.13, 3.67]" in text
    table = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert len(table) == len(rows)
    assert float(table[1]["slowdown_harmful_worst_low"]) == pytest.approx(3.4 * 0.92)
    assert table[0]["rir_interval"] == "across_seeds"


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
    predicted = outcome(diverged(record("kappa", attacks=[], metrics={"rir": metric(356.0)})))
    assert (predicted.tone, predicted.label) == ("unsure", "partly diverged")


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
    assert "| kappa_opt | partly diverged |" in to_markdown(rows)


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


@pytest.mark.parametrize(("key", "other"), [("scenario", "mnist_pairs"), ("schema", "0.9")])
def test_compare_refuses_what_is_not_comparable(key: str, other: str) -> None:
    a = attacked("kappa", 3.4, 1.03, 356.0)
    with pytest.raises(UserError, match=f"different {key}s"):
        compare(a, a | {key: other})


def test_a_preset_of_a_paper_stands_beside_what_the_paper_reports() -> None:
    for name in PUBLISHED:
        assert (CONF / "immunize" / f"{name}.yaml").is_file()
    name = "kappa_paper_house_price"
    reached = outcome(record(name, attacks=[], metrics={"rir": metric(1.2)}))
    assert "here it is 1.2" in reached.details[-1]
    assert not any("356.2" in line for line in outcome(record(name, scenario="csv")).details)


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

    rows = leaderboard([of("a", "one", "two"), of("b", "two", "one"), of("c", "one")])
    assert [(r["immunizer"], r["rank"]) for r in rows] == [("a", 1), ("b", 2), ("c", 1)]


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
    assert to_markdown(rows).count("### house_price on linear · ") == 3
