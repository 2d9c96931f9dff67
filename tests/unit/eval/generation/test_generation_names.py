"""Names and shapes of what the diffusion metrics return: JSON-able, no two families
write one name.
"""

import json
import re

import pytest
from fake_generations import FakeRun, FakeScorers, case, shares

from eval.generation.concept_verdict import ConceptVerdict
from eval.generation.relearning import Relearning
from eval.generation.similarity import Generation
from eval.generation.utility import Utility
from lab.core.record import scores_json
from lab.core.types import BASELINE


@pytest.fixture(scope="module")
def scores():
    def make(model_name, attack, name, seed):
        result = shares(0, 2, 8, 10, 10) if model_name == BASELINE else shares(0, 0, 2, 6, 10)
        result.samples["reworded"] = result.samples["name"]
        return result

    run = FakeRun(
        make,
        case_list=(case(families=("name", "reworded")),),
        seeds=(0, 1),
        attacks=("lora", "full"),
    )
    scorers = FakeScorers()
    metrics = [
        Generation(scorers=scorers),
        Generation(scorers=scorers, preprocessing="legacy", similarities=["clip"]),
        Relearning(scorers=scorers),
        Utility(scorers=scorers, count=4, guidances=[7.5], negative="x", compositions=["green"]),
        ConceptVerdict(scorers=scorers, count=4),
    ]
    return [metric(run) for metric in metrics]


def test_no_name_is_used_twice_and_everything_is_json(scores):
    body = scores_json(
        scores
    )  # raises for two families with one name, and for a missing value without a reason
    json.dumps(body, allow_nan=False)
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in body["metrics"])
    for curve in body["curves"].values():
        series = [values for values in curve.values() if isinstance(values, list)]
        assert {len(values) for values in series} == {len(curve["step"])}
