"""House prices and users' own CSV files: splits, shared preprocessing, ranks, clear errors."""

import numpy as np
import pandas as pd
import pytest
import torch

from lab.core.errors import UserError
from lab.core.sources import ROOT
from lab.scenarios.tabular import Features, Tabular, ames, drop_combinations, prepare

PUBLISHED = ROOT.parent / "shared" / "data" / "house_price"
HOUSES = {
    "dataset": "ames",
    "benign_target": "LotArea",
    "harmful_target": "SalePrice",
    "split_column": "MSZoning",
    "harmful_values": ["RL"],
    "ignore": ["Id", "rownames", "Order", "PID"],
}


def table(rows=60, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=rows), rng.normal(size=rows)
    return pd.DataFrame(
        {
            "Id": np.arange(rows),
            "a": a,
            "b": b,
            "total": a + b,
            "colour": np.array(["red", "green"])[np.arange(rows) % 2],
            "area": rng.normal(size=rows),
            "price": rng.normal(size=rows),
        }
    )


def folder(path, first, second):
    first.to_csv(path / "D1.csv", index=False)
    second.to_csv(path / "D2.csv", index=False)
    return str(path)


def scenario(path, **options):
    base = {
        "benign_target": "area",
        "harmful_target": "price",
        "ignore": ["Id"],
        "path": None if path is None else str(path),
    }
    return Tabular(**{**base, **options})


def test_ames_is_split_by_zone_and_has_full_rank() -> None:
    (case,) = Tabular(**HOUSES).load(0).cases
    zone = ames()["MSZoning"] == "RL"
    benign, harmful = case.benign, case.harmful[0]
    assert (benign.name, harmful.name) == ("LotArea", "SalePrice")
    assert len(benign.train) + len(benign.test) == int((~zone).sum()) == 657
    assert len(harmful.train) + len(harmful.test) == int(zone.sum()) == 2273
    assert len(benign.test) == round(0.2 * 657)
    d = benign.train.x.shape[1]
    for task in case.tasks:
        singular = torch.linalg.svdvals(task.train.x)
        assert (singular > 1e-2 * singular[0]).sum() == d  # not merely above rounding
        assert task.train.y.mean().abs() < 1e-12
        assert abs(task.train.y.std(correction=0) - 1) < 1e-12


def test_pooled_standardisation_and_no_target_among_the_features(tmp_path) -> None:
    first, second = table(), table(90, 1)
    second[["a", "total"]] += 5.0
    first["price"] = first["area"]  # a leak, were it a feature
    case = scenario(folder(tmp_path, first, second)).load(0).cases[0]
    x = torch.cat([task.train.x for task in case.tasks])
    assert x.shape == (48 + 72, 3)  # a or b or total is a combination, colour; neither target
    assert torch.allclose(x.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(x.std(0, correction=0), torch.ones(3, dtype=torch.float64))
    assert (
        case.benign.train.x.mean(0).abs().max() > 0.3
    )  # one mean for both: the shift between them survives
    y = case.benign.train.y
    fitted = x[:48] @ torch.linalg.lstsq(x[:48], y[:, None]).solution
    assert ((fitted[:, 0] - y) ** 2).mean() > 0.5


def test_scalings_are_those_of_the_training_rows() -> None:
    def train(scaling: str, **more: bool) -> list[np.ndarray]:
        (case,) = Tabular(**{**HOUSES, "scaling": scaling, **more}).load(0).cases
        return [task.train.x.numpy() for task in case.tasks]

    plain = train("standard")
    for own, each in zip(plain, train("by_task"), strict=True):
        assert np.allclose(each.mean(0), 0, atol=1e-12)
        assert np.allclose(each.std(0), 1)
        assert np.allclose([np.corrcoef(a, b)[0, 1] for a, b in zip(own.T, each.T, strict=True)], 1)
    low, high = (f(np.concatenate(train("min_max")), axis=0) for f in (np.min, np.max))
    assert np.allclose(low, 0)
    assert np.allclose(high, 1)
    for own, unit in zip(plain, train("unit_rows"), strict=True):
        assert np.allclose(np.linalg.norm(unit, axis=1), 1)
        assert np.allclose((own * unit).sum(1), np.linalg.norm(own, axis=1))
    raw = np.concatenate(train("none"))
    assert ((raw.min(0) > 1800) & (raw.max(0) < 2100)).sum() >= 2  # years: built and remodelled
    assert all(np.array_equal(x[:, -1], np.ones(len(x))) for x in train("none", intercept=True))


def test_missing_constant_and_collinear_columns_are_told(tmp_path) -> None:
    first, second = table(), table(90, 1)
    first["flat"], second["flat"] = 1.0, np.arange(90.0)
    second["late"], first["late"] = "x", np.where(np.arange(60) % 3, "x", "y")
    first["mine"], first.loc[3, "area"] = 1.5, np.nan
    first.loc[[5, 6], ["a", "total"]] = np.nan
    first.loc[7, "a"] = np.inf
    second.loc[:9, "colour"] = None
    data = scenario(folder(tmp_path, first, second)).load(0)
    text = "\n".join(data.notes)
    assert "Dropped as constant in the benign training rows (1): flat." in text
    assert "Dropped as constant in the harmful training rows (1): late." in text
    assert "exact linear combination of other columns in the benign training rows (1)" in text
    assert len(data.cases[0].benign.train) == 47


def test_an_imputed_cell_does_not_hide_a_sum() -> None:
    """total = a + b in every observed row; the medians of one invented row do not add up."""
    frame = table(50)[["a", "b", "total"]]
    frame.loc[4, ["a", "b", "total"]] = [np.nan, np.nan, 9.0]
    rows = np.ones(50, dtype=bool)
    assert np.linalg.matrix_rank(prepare(frame, rows).x) == 3
    frame.loc[4, "total"] = np.nan
    assert drop_combinations(prepare(frame, rows), {"benign": rows}).x.shape[1] == 2


def test_a_constant_offset_counts_once() -> None:
    """Two columns that are affine, not linear, in others: the first stays (it spans the constant),
    one goes.
    """
    frame = table(50)[["a", "b"]]
    x = frame.assign(c=frame["a"] + frame["b"] + 1.0, d=frame["a"] - frame["b"] + 2.0)
    kept = drop_combinations(Features(x, x.isna()), {"benign": np.ones(50, dtype=bool)})
    assert kept.x.shape[1] == np.linalg.matrix_rank(x) == np.linalg.matrix_rank(kept.x) == 3


def test_too_few_rows_to_tell_combinations_drop_no_column(tmp_path) -> None:
    """Which columns pivoted QR would name is an accident of the split; seeds must see the same
    features.
    """
    rng = np.random.default_rng(0)
    names = [*(f"f{i}" for i in range(40)), "area", "price"]
    tables = [pd.DataFrame(rng.normal(size=(15, 42)), columns=names) for _ in range(2)]
    loaded = [scenario(folder(tmp_path, *tables)).load(seed) for seed in (0, 1)]
    assert [one.cases[0].benign.train.x.shape[1] for one in loaded] == [40, 40]


def test_test_rows_do_not_move_medians_or_scales() -> None:
    frame = pd.DataFrame({"n": [1.0, 2.0, 3.0, np.nan, 1000.0]})
    train = np.array([True, True, True, True, False])
    assert prepare(frame, train).x["n"][[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("factor", [1e200, 1e308, 1e-200])
def test_columns_that_cannot_be_scaled_are_dropped_by_name(tmp_path, factor: float) -> None:
    frame = table().assign(wide=np.linspace(-1.0, 1.0, 60) * factor)
    frame.loc[0, "wide"] = np.nan
    data = scenario(folder(tmp_path, frame, frame)).load(0)
    assert data.cases[0].benign.train.x.shape[1] == 3
    assert all(torch.isfinite(s.x).all() for t in data.cases[0].tasks for s in (t.train, t.test))


def test_one_csv_with_a_split_column(tmp_path) -> None:
    frame = table(80)
    frame["Zone.Code"] = ["x", "y", "z", "x"] * 20
    frame.to_csv(tmp_path / "all.csv", index=False)
    options = {"split_column": "zone_code", "harmful_values": ["y", "z"]}
    case = scenario(tmp_path / "all.csv", **options).load(0).cases[0]
    assert len(case.benign.train) + len(case.benign.test) == 40
    same = scenario(tmp_path / "all.csv", harmful_target="area", **options).load(0).cases[0]
    assert [task.name for task in same.tasks] == ["area_benign", "area_harmful"]


@pytest.mark.skipif(
    not PUBLISHED.is_dir(),
    reason="the published CSVs lie in ../shared/data/house_price, absent here",
)
def test_published_csvs() -> None:
    data = Tabular(**{**HOUSES, "path": str(PUBLISHED)}).load(0)
    benign, harmful = data.cases[0].benign, data.cases[0].harmful[0]
    assert len(benign.train) + len(benign.test) == 309
    assert len(harmful.train) + len(harmful.test) == 1151
    d = benign.train.x.shape[1]
    assert (
        int(torch.linalg.matrix_rank(benign.train.x))
        == int(torch.linalg.matrix_rank(harmful.train.x))
        == d
    )


# ---- users' own files


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("path", {"path": "nowhere"}),
        ("path", {"harmful_file": "D3.csv"}),
        ("benign_target", {"benign_target": "colour"}),
        ("harmful_values", {"path": "D1.csv", "split_column": "colour", "harmful_values": ["x"]}),
    ],
)
def test_bad_input_names_the_key(tmp_path, key: str, options: dict) -> None:
    folder(tmp_path, table(), table())
    path = tmp_path / options.pop("path", "")
    with pytest.raises(UserError) as refused:
        scenario(path, **options).load(0)
    assert refused.value.key == f"scenario.{key}"
