"""Figures of sweeps over options and of the transfer table."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fake_generated import batch_sizes, transferred
from fake_records import attacked, metric, record, sweep

from eval.report.options import by_option, transfer


def run(value: float, **immunize: Any) -> dict:
    config = {"immunize": {"name": "kappa", **immunize}}
    return record("kappa", attacks=[], config=config, metrics={"rir": metric(value)})


def texts(svg: str) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg)


def test_a_sweep_over_two_options_becomes_a_figure_per_metric() -> None:
    (found,) = by_option(batch_sizes())
    assert found["title"] == "kappa by batch_size and spectrum"
    assert [p["title"] for p in found["plots"]] == ["RIR", "RIR ÷ bound"]
    svg = found["plots"][0]["svg"]
    assert {"16", "64", "128", "256", "batch_size"} <= set(texts(svg))


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


def test_transfer_shows_correlations_and_the_cases_behind_them() -> None:
    (found,) = transfer([transferred()], ["kappa_mnist"])
    correlations, _ = found["plots"]
    order = [t for t in texts(correlations["svg"]) if t.startswith(("probe_", "linear_"))]
    assert order == ["probe_lbfgs", "probe_sgd", "linear_probe", "probe_adam", "probe_newton"]
    assert [c["title"] for c in found["clouds"]] == order[:4]  # without the one of no correlation
    assert transfer([transferred(cases=False)], ["kappa_mnist"])[0]["clouds"] == []
    assert transfer([attacked("kappa", 3.4, 1.0, 9.0)], ["kappa"]) == []
