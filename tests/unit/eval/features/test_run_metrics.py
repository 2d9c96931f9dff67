import pytest
from fake_run import EYE, FakeRun, classes, linear, rates
from pydantic import ValidationError

from eval.features.conditioning import Conditioning
from eval.features.convergence import Convergence
from eval.features.geometry import Geometry
from eval.features.probe_accuracy import ProbeAccuracy
from eval.features.tangent import Tangent
from eval.features.verdict import Verdict
from lab.core.types import BASELINE, IMMUNIZED


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
