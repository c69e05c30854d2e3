"""Rows of integers without repetitions, many at a time."""

import math
from collections.abc import Sequence

import numpy as np


def distinct_rows(columns: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """The same rows with fewer repetitions, where ids are dense enough to tell without sorting."""
    length = len(columns[0])
    if length < 1 << 12:
        return columns
    lows = [int(column.min()) for column in columns]
    widths = [int(column.max()) - low + 1 for column, low in zip(columns, lows, strict=True)]
    if math.prod(widths) > 4 * length:
        return columns
    keys = columns[0] - lows[0]
    for column, low, width in zip(columns[1:], lows[1:], widths[1:], strict=True):
        keys = keys * width + (column - low)
    present = np.zeros(math.prod(widths), bool)
    present[keys] = True
    return [place + low for place, low in zip(np.unravel_index(np.flatnonzero(present), widths), lows, strict=True)]


def unique_rows(rows: np.ndarray) -> np.ndarray:
    """Each row once, in no order that counts."""
    if len(rows) < 2:
        return rows.copy()
    if rows.shape[1] == 2:  # two ids of 32 bits as one number
        packed = np.sort(rows[:, 0] << 32 | rows[:, 1] & 0xFFFFFFFF)
        packed = packed[np.concatenate([[True], packed[1:] != packed[:-1]])]
        return np.stack([packed >> 32, packed << 32 >> 32], axis=1)
    order = np.lexsort(rows.T)
    rows = rows[order]
    return rows[np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=1)])]
