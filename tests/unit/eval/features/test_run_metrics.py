import re

import pytest
from fake_run import EYE, FakeRun, classes, fake, linear, rates
from pydantic import ValidationError

from eval.features.conditioning import Conditioning
from eval.features.convergence import Convergence
from eval.features.geometry import Geometry
from eval.features.probe_accuracy import ProbeAccuracy
from eval.features.tangent import Tangent
from eval.features.verdict import Verdict
from lab.core.sources import ROOT
from lab.core.types import BASELINE, IMMUNIZED, Scores


def test_every_trajectory_is_read_once() -> None:
    models = {BASELINE: linear(EYE), IMMUNIZED: linear(EYE)}
    for metric in (Conditioning(), Geometry(), Convergence(), ProbeAccuracy(), Verdict()):
        reads: list[tuple] = []

        def read(*labels, reads=reads):
            reads.append(labels)
            return rates(0.9, 0.8)(*labels)

        metric(FakeRun(classes(), models, read))
        assert len(reads) == len(set(reads)) == (12 if metric.needs_attack else 0)


@pytest.mark.parametrize(
    ("metric", "option", "value"),
    [
        (Conditioning, "definition", "rnak"),
        (Geometry, "energy", 0.0),
        (Convergence, "rfd_smallest", 0.0),
        (Tangent, "rows", 1),
        (ProbeAccuracy, "target_share", 2.0),
        (Verdict, "min_slowdown", 0.5),
    ],
)
def test_wrong_options_are_refused(metric, option: str, value: object) -> None:
    with pytest.raises(ValidationError, match=option):
        metric(**{option: value})


def test_every_metric_name_is_documented() -> None:
    text = (ROOT / "docs/reference/metrics.md").read_text()
    wild = {"ROLE": "(harmful|benign)", "ATTACK": "[a-z0-9_]+", "K": r"\d+"}
    patterns = [
        re.compile(re.sub("ROLE|ATTACK|K", lambda m: wild[m[0]], name))
        for name in re.findall(r"`([a-zA-Z0-9_]+)`", text)
    ]
    run = fake(cases=classes(), trajectories=rates(0.9, 0.8))
    ridge = Conditioning(definition="ridge", ridge=1.0)
    first = (Conditioning(), ridge, Geometry(), Tangent())
    scores = [m(run) for m in (*first, Convergence(), ProbeAccuracy(), Verdict())]
    names = {n for s in scores for n in s.metrics}
    assert len(names) > 60
    assert [n for n in names if not any(p.fullmatch(n) for p in patterns)] == []
    assert all(isinstance(s, Scores) for s in scores)
