"""From two data frames to two feature matrices whose Gram matrices can be compared.

Whatever is done to one task is done to the other: one encoding, one median, one mean, one scale. A
condition number measured after standardising each task by itself would compare two different
coordinate systems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.linalg
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]
_EXACT = 1e-9  # residual of a unit column below which it counts as a combination of others
_CHECKED = (
    1e-7  # largest residual, in units of the pooled scale, of a combination that counts as exact
)
_LISTED = 12  # names that a note spells out


@dataclass(frozen=True)
class Encoded:
    """Columns shared by both tasks: ``x`` [n, d] (rows of the benign task first), ``imputed`` [n,
    d].
    """

    names: tuple[str, ...]
    x: Matrix
    imputed: Mask

    def keep(self, columns: Sequence[int] | Mask) -> Encoded:
        index = np.arange(len(self.names))[np.asarray(columns)]
        return Encoded(
            tuple(self.names[i] for i in index), self.x[:, index], self.imputed[:, index]
        )


def listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def encode(frame: pd.DataFrame, train: Mask) -> tuple[Encoded, list[str]]:
    """Numbers stay numbers, everything else becomes the rank of its level in sorted order.

    This is the label encoding behind the 79 features of KAPPA (arXiv 2505.23760 §5.1). A missing
    level is a level (in the Ames data it means "no alley", "no pool"), the last one. A missing or
    infinite number becomes the median over the training rows of both tasks.

    Args:
        frame: feature columns, both tasks stacked.
        train: [n], True for the training rows of either task.
    """
    columns, masks, notes = [], [], []
    missing_numbers: dict[str, int] = {}
    missing_levels: list[str] = []
    for name in map(str, frame.columns):
        column = frame[name]
        imputed = np.zeros(len(frame), dtype=bool)
        if pd.api.types.is_numeric_dtype(column):
            values = column.to_numpy(dtype=np.float64, na_value=np.nan)
            imputed = ~np.isfinite(values)
            if imputed.any():
                seen = values[train & ~imputed]
                with np.errstate(
                    over="ignore"
                ):  # half the sum of two huge numbers; `standardise` drops such a column
                    values = np.where(imputed, np.median(seen) if seen.size else 0.0, values)
                missing_numbers[name] = int(imputed.sum())
        else:
            absent = column.isna().to_numpy()
            text = column.astype(str).to_numpy(dtype=str)
            levels = np.unique(text[~absent])
            values = np.where(absent, len(levels), np.searchsorted(levels, text)).astype(np.float64)
            if absent.any():
                missing_levels.append(name)
        columns.append(values)
        masks.append(imputed)
    if missing_numbers:
        counts = [f"{name} ({count})" for name, count in missing_numbers.items()]
        notes.append(
            "Missing numbers were replaced by the median of both tasks' training rows, by "
            f"column ({len(counts)}): "
            f"{listing(counts)}."
        )
    if missing_levels:
        notes.append(
            "A missing entry is a level of its own in these categorical columns "
            f"({len(missing_levels)}): "
            f"{listing(missing_levels)}."
        )
    shape = (len(frame), 0)
    x = np.stack(columns, 1) if columns else np.zeros(shape)
    return Encoded(
        tuple(map(str, frame.columns)), x, np.stack(masks, 1) if masks else np.zeros(shape, bool)
    ), notes


def drop_constant(data: Encoded, groups: Sequence[tuple[str, Mask]]) -> tuple[Encoded, list[str]]:
    """Drops columns with one value in a group of rows; ``groups`` pairs a label with its rows
    [n].
    """
    keep = np.ones(len(data.names), dtype=bool)
    notes = []
    for label, rows in groups:
        part = data.x[rows]
        constant = (part.min(0) == part.max(0)) & keep
        if constant.any():
            names = [n for n, c in zip(data.names, constant, strict=True) if c]
            notes.append(
                f"Dropped as constant in the {label} training rows ({len(names)}): "
                f"{listing(names)}."
            )
        keep &= ~constant
    return data.keep(keep), notes


def standardise(data: Encoded, train: Mask) -> tuple[Encoded, list[str]]:
    """One mean and one scale for both tasks, from the cells of the stacked training rows that were
    observed.

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
    notes = []
    if not keep.all():
        names = [n for n, k in zip(data.names, keep, strict=True) if not k]
        notes.append(
            f"Dropped as too large or too small in number to be scaled ({len(names)}): "
            f"{listing(names)}."
        )
    return Encoded(data.names, x, data.imputed).keep(keep), notes


def _combinations(x: Matrix, imputed: Mask, invented: Mask) -> list[int]:
    """Columns that are exact linear combinations of the others wherever none of their terms was
    imputed.

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
    base, found, constant = order[:rank], [], False
    for column in order[rank:]:
        weights, *_ = np.linalg.lstsq(centred[:, base], centred[:, column], rcond=None)
        terms = np.append(base[np.abs(weights) > 1e-6 * np.abs(weights).max(initial=0.0)], column)
        observed = ~imputed[:, terms].any(1)
        residual = x[observed][:, base] @ weights - x[observed, column]
        offset = residual.mean() if residual.size else 0.0
        if np.abs(residual - offset).max(initial=0.0) > _CHECKED:
            continue
        if abs(offset) <= _CHECKED or invented[terms].any() or constant:
            found.append(int(column))
        else:
            constant = True
    return found


def drop_combinations(
    data: Encoded, groups: Sequence[tuple[str, Mask]]
) -> tuple[Encoded, list[str]]:
    """Makes both Gram matrices full rank where the rows suffice.

    A group with fewer rows than columns cannot have a full-rank Gram matrix; only columns that are
    combinations in the stacked rows are dropped then, and the note of `rank_note` says what
    remains. Where even these are no more than the columns, any column is a combination of the
    others by count alone: none is dropped, since which ones would be an accident of the split.
    """
    enough = all(rows.sum() >= len(data.names) for _, rows in groups)
    stacked: Mask = np.logical_or.reduce([rows for _, rows in groups])
    if not enough and stacked.sum() <= len(data.names):
        told = (
            f"{int(stacked.sum())} training rows in all cannot tell which of "
            f"{len(data.names)} columns are"
        )
        return data, [f"{told} linear combinations of others: none was dropped for that."]
    todo = list(groups) if enough else [("stacked", stacked)]
    notes = []
    for label, rows in todo:
        drop = _combinations(data.x[rows], data.imputed[rows], np.asarray(data.imputed.any(0)))
        if drop:
            names = [data.names[i] for i in sorted(drop)]
            notes.append(
                f"Dropped as exact linear combination of other columns in the {label} "
                "training rows "
                f"({len(names)}): {listing(names)}."
            )
            data = data.keep(np.setdiff1d(np.arange(len(data.names)), drop))
    return data, notes


def rank_note(data: Encoded, groups: Sequence[tuple[str, Mask]], ranks: Sequence[int]) -> str:
    """How many features and rows remain, and whether they give full rank; ``ranks`` are those of
    the ``groups``.
    """
    width = len(data.names)
    parts, short = [], []
    for (label, rows), rank in zip(groups, ranks, strict=True):
        parts.append(f"{label}: {int(rows.sum())} training rows, rank {rank}")
        if rank < width:
            short.append(label)
    text = f"{width} features remain ({'; '.join(parts)})."
    if short:
        tasks = " and the ".join(short)
        text += (
            f" The Gram matrix of the {tasks} task is singular: bounds on the ratio may "
            "be infinite."
        )
    return text
