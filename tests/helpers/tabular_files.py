"""Tables as users have them, and the scenario that reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lab.scenarios.tabular import Tabular

HOUSES: dict[str, Any] = {
    "dataset": "ames",
    "benign_target": "LotArea",
    "harmful_target": "SalePrice",
    "split_column": "MSZoning",
    "harmful_values": ["RL"],
    "ignore": ["Id", "rownames", "Order", "PID"],
}


def table(rows: int = 60, seed: int = 0) -> pd.DataFrame:
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


def folder(path: Path, first: pd.DataFrame, second: pd.DataFrame) -> str:
    first.to_csv(path / "D1.csv", index=False)
    second.to_csv(path / "D2.csv", index=False)
    return str(path)


def scenario(path: object, **options: Any) -> Tabular:
    base: dict[str, Any] = {"benign_target": "area", "harmful_target": "price", "ignore": ["Id"]}
    base["path"] = None if path is None else str(path)
    return Tabular(**{**base, **options})
