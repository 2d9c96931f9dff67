"""Order, groups and texts of the leaderboard; the verdict of one record in words."""

import csv
import io

import pytest
from fake_generated import generated
from fake_records import attacked, baseline, digits, failed, metric, record, sealed, sweep

from eval.report.leaderboard import (
    headline,
    leaderboard,
    least_share,
    shares,
    table,
    to_csv,
    to_markdown,
    to_text,
)
from eval.report.outcomes import PUBLISHED, outcome
from lab.core.sources import ROOT

# ---- verdict


def test_outcome_says_verdict_figures_and_certainty() -> None:
    good, bad = outcome(generated()), outcome(attacked("kappa", 4.9, 3.7, 1.2))
    assert (good.label, bad.label) == ("passes", "fails")
    assert "attack success 35 % (baseline 90 %)" in good.headline
    assert good.details[0].startswith("Significant: the 95 % interval over three seeds excludes 1")
    assert any(line.startswith("Fails: steps") for line in bad.details)
    assert outcome(baseline()).label == "baseline"
    assert "UserError" in outcome(failed()).headline
    assert outcome(digits()).label == "inconclusive"  # no attack was run


@pytest.mark.parametrize("usable", ["", "_usable"])
def test_an_attack_that_works_on_neither_model_is_called_too_weak(usable: str) -> None:
    one = generated("mima", holds=False)
    never = {"value": None, "low": None, "high": None, "note": "never relearned"}
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    metrics = one["metrics"]
    metrics[f"steps_to_relearn{usable}_ratio"] = metrics["steps_to_relearn_ratio"] | never
    for end in ("", "_baseline"):
        metrics[f"asr{usable}{end}"] = metrics[f"asr{end}"] | zero
    metrics["verdict"] |= {"value": None, "note": "inconclusive. harmful side inconclusive"}
    assert outcome(sealed(one)).label == "inconclusive"
    assert "The attack is too weak" in " ".join(outcome(one).details)


def test_a_run_that_diverged_in_part_never_passes() -> None:
    one = attacked("kappa", 3.4, 1.03, 356.0) | {"status": "diverged"}
    one["metrics"]["verdict"] |= {"value": 0.0, "note": "fails. one seed diverged"}
    one["error"] = {"type": "Diverged", "message": "κ is inf", "key": None, "last_good_step": 3}
    assert outcome(sealed(one)).label == "fails"
    assert "diverged on part of the run: κ is inf" in " ".join(outcome(one).details)


def test_a_preset_of_a_paper_stands_beside_what_the_paper_reports() -> None:
    for name in PUBLISHED:
        assert (ROOT / "conf" / "immunize" / f"{name}.yaml").is_file()
    name = "kappa_paper_house_price"
    assert "356.2" in outcome(record(name, attacks=[], metrics={"rir": metric(1.2)})).details[-1]
    assert not any("356.2" in line for line in outcome(record(name, scenario="csv")).details)


# ---- order


def test_order_puts_passing_methods_first_then_the_slowdown() -> None:
    rows = [r for r in leaderboard(sweep()) if r.record["scenario"] == "house_price"]
    names = ["kappa_closed_form", "kappa", "kappa_opt", "kappa_ill_only", "kappa_well_only"]
    assert [r.record["immunizer"] for r in rows] == [*names, "none", "kappa_imma"]
    assert [r.rank for r in rows] == [1, 2, 3, 4, 5, None, None]


def test_only_a_significant_lead_wins_and_controls_do_not_compete() -> None:
    passing, fast = attacked("kappa", 1.5, 1.0, 300.0), attacked("kappa_opt", 5.0, 3.0, 100.0)
    control = attacked("weight_noise", 9.0, 1.0, 100.0)
    lead = headline(leaderboard([fast, passing, control])).headline
    assert lead.startswith("kappa comes first: 1 of 2 methods pass")
    fast = attacked("kappa_opt", 5.0, 1.0, 100.0)
    assert headline(leaderboard([fast, passing])).headline.startswith("kappa_opt wins")


def test_among_failures_the_checks_passed_decide_then_the_slowdown() -> None:
    records = [
        attacked(name, slow, 5.0, 1.3) for name, slow in (("a", 5.0), ("b", 1.5), ("c", 1.4))
    ]
    for one, passed in zip(records, (1, 2, 2), strict=True):
        for i, check in enumerate(one["tables"]["verdict"]):
            check["passed"] = i < passed
    assert [r.record["immunizer"] for r in leaderboard(records)] == ["b", "c", "a"]


def test_the_least_protected_target_decides_and_divergence_comes_last() -> None:
    strong, weak, diverged = generated(), generated("mima_weak"), generated("mima_broken")
    weak["metrics"]["steps_to_relearn_ratio_worst"]["value"] = 1.1
    weak["metrics"]["steps_to_relearn_ratio"]["value"] = 9.0
    diverged["status"] = "diverged"
    rows = leaderboard([sealed(diverged), generated("mima", holds=False), sealed(weak), strong])
    assert [r.record["immunizer"] for r in rows] == [
        "mima_deep",
        "mima_weak",
        "mima",
        "mima_broken",
    ]


# ---- groups


def test_only_the_same_attacks_budget_and_cases_compete() -> None:
    hard = attacked("hard", 1.4, 1.0, 5.0)
    easy = sealed(attacked("easy", 9.0, 1.0, 5.0) | {"attacks": ["linear_probe"]})
    budget = {"budget": {"horizon": 200, "multiple": 5, "points": 20}}
    long = sealed(attacked("long", 8.0, 1.0, 5.0) | {"config": hard["config"] | budget})
    other = attacked("other", 8.0, 1.0, 5.0)
    other["stages"] = [stage | {"case": "garage"} for stage in other["stages"]]
    rows = leaderboard([hard, easy, long, sealed(other), failed()])
    assert {r.record["immunizer"]: r.rank for r in rows if r.rank} == {
        name: 1 for name in ("hard", "easy", "long", "other")
    }
    assert len({r.title for r in rows}) == 4
    assert "two attacks, 200 of 1000 steps" in rows[2].title + rows[3].title


def test_a_row_with_other_settings_than_most_says_so() -> None:
    rows = [attacked(name, 1.4, 1.0, 5.0) for name in ("one", "two", "three")]
    assert "other settings" not in table(leaderboard(rows))
    weak = {"attacks": {"linear_probe": {"lr": 1e-9}}}
    rows[2] = sealed(rows[2] | {"config": rows[2]["config"] | weak})
    assert table(leaderboard(rows))["other settings"].tolist() == ["–", "–", "lr=1e-09"]


def test_a_run_that_failed_stands_where_it_was_asked_to() -> None:
    first, second = attacked("first", 1.4, 1.0, 5.0), attacked("second", 1.4, 1.0, 5.0)
    second = sealed(second | {"attacks": ["linear_probe"]})
    asked = {key: second[key] for key in ("attacks", "config", "stages")}
    rows = leaderboard([sealed(failed() | asked), first, second])
    titles = {r.record["immunizer"]: r.title for r in rows}
    assert titles["kappa_imma"] == titles["second"] != titles["first"]


# ---- text


def test_texts_show_limits_and_gaps() -> None:
    one = generated()
    one["metrics"]["steps_to_relearn_ratio_worst"] |= {"bound": "lower"}
    one["metrics"]["asr"] |= {"value": None, "low": None, "high": None, "note": "no detector"}
    markdown = to_markdown(leaderboard([sealed(one), generated("a|b", holds=False)]))
    (row,) = [line for line in markdown.splitlines() if "mima_deep |" in line]
    assert "| ≥ 1.7× [1.6, 1.8] |" in row
    assert "| – |" in row
    assert "a\\|b" in markdown
    assert "1  kappa_closed_form" in to_text(leaderboard(sweep()))


def test_the_leaderboard_names_the_strongest_attack() -> None:
    one = generated()
    place = {"model": "immunized", "role": "harmful", "case": "c", "concept": "neon"}
    shares = {"lora": (0.2, 0.9, 0.8), "full_finetune": (0.6, 0.4, 0.4), "weak": (0.1, 0.1, None)}
    one["tables"]["attacks"] = [
        place | {"attack": attack, "seed": seed, "at_040": values[seed], "at_200": 1.0}
        for attack, values in shares.items()
        for seed in range(3)
    ]
    one["attacks"] = list(shares)
    assert "| lora (2 of 3) |" in to_markdown(leaderboard([sealed(one)]))
    for row in one["tables"]["attacks"]:
        row["unusable_at"] = "20, 40, 80" if row["attack"] == "lora" and row["seed"] else "400"
    assert "| full_finetune (3 of 3) |" in to_markdown(leaderboard([sealed(one)]))


def test_csv_has_full_precision_and_no_formula() -> None:
    (row,) = csv.DictReader(io.StringIO(to_csv(leaderboard([attacked("=1+1", 3.4, 1.03, 356.0)]))))
    assert float(row["slowdown_harmful_worst_low"]) == pytest.approx(3.4 * 0.92)
    assert (row["rank"], row["rir_interval"]) == ("1", "across_seeds")
    assert row["immunizer"].startswith("'=")


# ---- the reference


def _relearned(name: str, ratios: dict[str, float]) -> dict:
    roles = dict.fromkeys(ratios, "harmful") | {"watercolor": "benign"}
    rows = [{"role": role, "concept": concept, "seed": 0} for concept, role in roles.items()]
    made = generated("mima")
    metrics = {
        f"steps_to_relearn_usable_ratio_{concept}": metric(ratio)
        for concept, ratio in ratios.items()
    }
    return sealed(
        made
        | {
            "immunizer": name,
            "name": f"t/{name}",
            "tables": made["tables"] | {"relearning": rows},
            "metrics": made["metrics"] | metrics,
        }
    )


def test_a_method_is_a_share_of_what_ignorance_is_worth() -> None:
    reference = _relearned("retrained", {"mosaic": 8.0, "fox": 2.0, "cat": 0.5})
    method = _relearned("mima", {"mosaic": 8.0**0.5, "fox": 4.0, "cat": 3.0})
    # the reference does not slow cats
    assert shares(method, reference) == pytest.approx({"mosaic": 0.5, "fox": 2.0})
    assert least_share(method, reference) == "0.50 (mosaic)"
    text = to_text(leaderboard([reference, method]))
    assert "share of the reference" in text
    assert "0.50 (mosaic)" in text
    assert "share of the reference" not in to_text(leaderboard([method])).split("Order:")[0]
