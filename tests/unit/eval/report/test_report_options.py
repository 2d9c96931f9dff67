"""Figures of sweeps over options and of the transfer table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_generated import batch_sizes, transferred
from fake_records import metric, record, sweep

from eval.report.html import render
from eval.report.options import by_option, transfer


def run(value: float, **immunize: Any) -> dict:
    config = {"immunize": {"name": "kappa", **immunize}}
    return record("kappa", attacks=[], config=config, metrics={"rir": metric(value)})


@pytest.mark.parametrize(
    "records",
    [
        sweep(),  # every immunizer once
        [run(1.0, lr=0.1), run(2.0, lr=0.2)],  # two points are no figure
        [run(1.0, lr=0.1), run(1.5, lr=0.1), run(2.0, lr=0.2)],  # twice the same settings
    ],
)
def test_what_makes_no_figure(records: list[dict]) -> None:
    assert by_option(records) == []


def test_figures_of_sweeps_are_in_the_page(tmp_path: Path) -> None:
    text = render([*batch_sizes(), transferred()], tmp_path / "r.html").read_text()
    assert "kappa by batch_size and spectrum" in text
    assert "Does RIR predict the slow-down?" in text
    assert transfer([transferred(cases=False)], ["kappa_mnist"])[0]["clouds"] == []
