import math

import pytest
import torch
from fake_run import linear

from attacks.probes.linear_probe import LinearProbe
from eval.features.quantities import RFD, SGRC, ConditionNumber, RelativeImmunizationRatio
from lab.core.data import Split, Task
from lab.core.types import Budget


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_condition_number_of_a_diagonal_is_the_squared_ratio() -> None:
    metric = ConditionNumber()
    metric.update(torch.diag(tensor(3, 1)))
    metric.update(torch.diag(tensor(5, 1)))
    assert float(metric.compute()) == pytest.approx((9 + 25) / 2)
    ridge = ConditionNumber("ridge", ridge=1.0)
    assert float(ridge(torch.diag(tensor(3, 1)))) == pytest.approx(10 / 2)


def test_rir_by_hand_and_refuses_impossible_values() -> None:
    metric = RelativeImmunizationRatio()
    metric.update(40, 10, 2, 4)
    assert float(metric.compute()) == pytest.approx(8)
    with pytest.raises(ValueError, match="at least 1"):
        metric.update(0.5, 1, 1, 1)


def test_norm_ratio_by_hand() -> None:
    rows = Split(
        torch.eye(2, dtype=torch.float64), tensor(2, 4)
    )  # w* = (2, 4), and a step halves the way to it
    probe = LinearProbe(optimizer="sgd", lr=1.0)
    found = probe(
        linear(rows.x),
        Task("good", "benign", "regression", rows, rows),
        seed=0,
        budget=Budget(2, 1, 3),
        checkpoint=None,
    )
    assert found.steps == [0, 1, 2]
    assert found.values["norm_ratio"] == pytest.approx([1, 1 / 4, 1 / 16])
    torch.testing.assert_close(found.weights["head"], tensor(1.5, 3)[:, None])


def test_sgrc_by_hand() -> None:
    metric = SGRC()
    metric.update(0.8, 0.6)
    assert float(metric.compute()) == pytest.approx(0.25)
    for bad in ((0.0, 0.5), (1.2, 0.5), (0.5, math.nan)):
        with pytest.raises(ValueError, match=r"accuracy"):
            metric.update(*bad)


def test_rfd_and_its_signed_twin() -> None:
    base, faster = tensor(0.0, 0.5, 1.0), tensor(0.2, 0.75, 1.0)
    plain, signed = RFD(), RFD(signed=True)
    plain.update(base, faster)
    signed.update(base, faster)
    assert float(plain.compute()) == pytest.approx(
        100 * 0.5 / 2
    )  # step 0 is left out: base is 0 there
    assert float(signed.compute()) == pytest.approx(-100 * 0.5 / 2)
    with pytest.raises(ValueError, match="never reaches"):
        plain.update(tensor(0, 0.01), tensor(1, 1))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("metric", [ConditionNumber(), RelativeImmunizationRatio(), SGRC(), RFD()])
def test_an_empty_set_is_an_error(metric) -> None:
    with pytest.raises(ValueError, match="empty set"):
        metric.compute()


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="definition"):
        ConditionNumber("best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="smallest"):
        RFD(smallest=0)
