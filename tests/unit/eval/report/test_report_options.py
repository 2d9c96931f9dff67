"""Figures of sweeps over options and of the transfer table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_generated import batch_sizes, transferred
from fake_records import attacked, metric, record, sealed, sweep

from eval.report.charts import Dots, _near, against_option, spread
from eval.report.html import render
from eval.report.options import _axes, _options, by_option, transfer


def run(value: float, **immunize: Any) -> dict:
    config = {"immunize": {"name": "kappa", **immunize}}
    return record("kappa", attacks=[], config=config, metrics={"rir": metric(value)})


def texts(svg: str) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg)


def test_a_sweep_over_two_options_becomes_a_figure_per_metric() -> None:
    (found,) = by_option(batch_sizes())
    assert found["title"] == "kappa by batch_size and spectrum"
    assert found["note"] == "12 runs."
    assert [text for _, text in found["legend"]] == [
        "spectrum batch",
        "spectrum running",
        "spectrum full",
    ]
    assert [p["title"] for p in found["plots"]] == ["RIR", "RIR ÷ bound"]
    svg = found["plots"][0]["svg"]
    assert {"16", "64", "128", "256", "batch_size"} <= set(texts(svg))
    assert all(f"var(--s{i})" in svg for i in (1, 2, 3))
    # twelve intervals of their own, four for each of three series
    strokes = re.findall(
        r'<path d="M [\d.]+ [\d.]+ \nL [\d.]+ [\d.]+ \n"[^>]*stroke-opacity: 0.75', svg
    )
    assert len(strokes) == 12


def test_a_single_numeric_option_needs_no_legend_and_a_named_one_its_names() -> None:
    (numeric,) = by_option([run(v, lr=e) for v, e in ((2.0, 0.1), (3.0, 0.2), (4.0, 0.3))])
    assert numeric["legend"] == []
    assert {"0.1", "0.2", "0.3", "lr"} <= set(texts(numeric["plots"][0]["svg"]))
    (named,) = by_option(
        [run(v, scale=s) for v, s in ((2.0, "none"), (3.0, "initial"), (4.0, "current"))]
    )
    assert {"none", "initial", "current", "scale"} <= set(texts(named["plots"][0]["svg"]))
    (flags,) = by_option([run(v, flag=f) for v, f in ((2.0, True), (3.0, None), (4.0, [1, 2]))])
    assert {"on", "none", "1, 2"} <= set(texts(flags["plots"][0]["svg"]))


def test_settings_that_change_together_are_one_option() -> None:
    runs = [run(float(i), name_of=f"n{i}", lr=0.1 * i) for i in (1, 2, 3)]
    (option,) = _options(runs)
    assert option.key == "immunize.lr"  # the number stands for both


def test_the_number_goes_on_the_axis() -> None:
    runs = [run(1.0, spectrum=s, lr=e) for s in "abc" for e in (0.1, 0.2)]
    x, series = _axes(_options(runs))
    assert (x.name, series.name) == ("lr", "spectrum")


@pytest.mark.parametrize(
    "records",
    [
        sweep(),  # every immunizer once
        [run(1.0, lr=0.1), run(2.0, lr=0.2)],  # two points are no figure
        [run(1.0, lr=0.1)] * 3,  # nothing differs
        [
            run(1.0 + i, lr=i, scale=s, epochs=i * k) for i in (1, 2) for s in "ab" for k in (3, 5)
        ],  # three options
        [run(1.0, lr=0.1), run(1.5, lr=0.1), run(2.0, lr=0.2)],  # twice the same settings
    ],
)
def test_what_makes_no_figure(records: list[dict]) -> None:
    assert by_option(records) == []


def test_missing_values_are_counted_and_a_metric_without_any_is_left_out() -> None:
    runs = [run(v, lr=e) for v, e in ((2.0, 0.1), (3.0, 0.2), (4.0, 0.3))]
    runs[1]["metrics"]["rir"] = metric(None, note="the numerical rank moved")
    (found,) = by_option([sealed(r) for r in runs])
    assert found["plots"][0]["note"] == "1 of 3 runs have no value."
    for one in runs:
        one["metrics"]["rir"] = metric(None, note="the numerical rank moved")
    assert by_option([sealed(r) for r in runs]) == []


def test_axes_are_logarithmic_where_numbers_spread() -> None:
    assert spread([16, 64, 256])
    assert not spread([1.0, 2.0, 3.0])
    assert not spread([0.0, 1.0, 1000.0])
    dots = Dots(
        "a", 1, [1.0, 2.0, 3.0], [1.0, 100.0, None], [None, 90.0, None], [None, 120.0, None]
    )
    svg = against_option([dots], [], title="t", x="x", y="y")
    assert {"1", "10", "100"} <= set(texts(svg))
    assert (
        against_option([Dots("a", 1, [1.0], [None], [None], [None])], [], title="t", x="x", y="y")
        == ""
    )


def test_a_reference_line_does_not_squash_the_values() -> None:
    assert _near(1.0, [1.5, 3.0])
    assert not _near(1.0, [0.03, 0.1])


def test_transfer_shows_correlations_and_the_cases_behind_them() -> None:
    (found,) = transfer([transferred()], ["kappa_mnist"])
    correlations, felt = found["plots"]
    order = [t for t in texts(correlations["svg"]) if t.startswith(("probe_", "linear_"))]
    assert order == ["probe_lbfgs", "probe_sgd", "linear_probe", "probe_adam", "probe_newton"]
    assert "No correlation for probe_newton" in correlations["note"]
    assert "median harmful ÷ benign slow-down" in texts(felt["svg"])
    assert [c["title"] for c in found["clouds"]] == [
        "probe_lbfgs",
        "probe_sgd",
        "linear_probe",
        "probe_adam",
    ]
    assert found["clouds"][0]["note"] == "ρ 0.56, 30 cases."
    assert {"RIR", "harmful ÷ benign slow-down"} <= set(texts(found["clouds"][0]["svg"]))
    assert transfer([transferred(cases=False)], ["kappa_mnist"])[0]["clouds"] == []
    assert transfer([attacked("kappa", 3.4, 1.0, 9.0)], ["kappa"]) == []


def test_figures_of_sweeps_are_in_the_page(tmp_path: Path) -> None:
    text = render([*batch_sizes(), transferred()], tmp_path / "r.html").read_text()
    for part in (
        "kappa by batch_size and spectrum",
        "12 verdicts in words",
        "Does RIR predict the slow-down?",
        "The cases behind it, 4 attackers",
    ):
        assert part in text
    assert text.index("kappa by batch_size") < text.index("12 verdicts in words")
