"""What a concept immunizer logged stands in the report's section on immunizing, not among the
attacks.
"""

from fake_records import attacked

from eval.report.figures import comparison_curves, trajectories
from eval.report.words import heading


def test_curves_over_immunization_steps_stand_apart_from_attacks():
    record = attacked("mima", 3.4, 1.03, 300.0)
    curve = {
        "step": [0, 1, 2],
        "mima": [0.1, 0.2, 0.4],
        "x": "immunization step",
        "y": "loss",
        "log": "",
    }
    record["curves"]["immunize_outer_loss"] = curve
    index = {"mima": 1}
    shown = [plot["title"] for plot in comparison_curves([record], ["mima"], index)]
    assert heading("immunize_outer_loss") == "immunization (outer loss)"
    assert shown.count("immunization (outer loss)") == 1
    assert not any(
        "upper loss" in p["title"] for part in trajectories([record], ["mima"], index) for p in part
    )
