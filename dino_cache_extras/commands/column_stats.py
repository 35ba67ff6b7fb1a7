"""Statistics of a column that is seen once, block by block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

SAMPLED_ROWS = 4096  # whose values say the quantiles
QUANTILE_COLUMNS = 256  # of a sample at a time
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
VALUES_AT_A_TIME = 1 << 19  # as float64 they take four times as much
PATCH_DIMENSIONS = 3  # (h, w, D): statistics of all places together, (1, 1, D)


class ColumnStats:
    """Least, most, mean, standard deviation and quantiles of (n, *shape) rows; what is NaN is left out.

    Of rows (h, w, D) they are of each of the D channels, over all places. All are exact to rounding but the quantiles,
    which are of at most SAMPLED_ROWS rows, every k-th of all, and of one place in each.
    """

    def __init__(self, shape: tuple[int, ...]):
        pooled = len(shape) == PATCH_DIMENSIONS
        self._shape = (1, 1, shape[-1]) if pooled else shape
        self._places = math.prod(shape[:-1]) if pooled else 1
        width = math.prod(self._shape)
        self._count, self._mean, self._squares = np.zeros(width), np.zeros(width), np.zeros(width)
        self._least, self._most = np.full(width, np.inf), np.full(width, -np.inf)
        self._rows = 0
        self._step = 1
        self._sample: list[np.ndarray] = []  # as they are stored: as float64 they would take four times as much

    def add(self, rows: np.ndarray) -> None:
        """(n, *shape) more of them."""
        rows = rows.reshape(len(rows), self._places, -1)  # (n, places, width)
        numbers = np.arange(len(rows)) + self._rows
        chosen = numbers % self._step == 0
        places = numbers[chosen] // self._step % self._places
        self._sample.append(rows[chosen, places])
        self._rows += len(rows)
        while sum(map(len, self._sample)) > SAMPLED_ROWS:
            self._sample = [np.concatenate(self._sample)[::2]]
            self._step *= 2
        most = max(1, VALUES_AT_A_TIME // max(1, rows[:1].size))
        for start in range(0, len(rows), most):
            self._add_values(rows[start : start + most].reshape(-1, rows.shape[-1]).astype(np.float64))

    def _add_values(self, values: np.ndarray) -> None:
        """(n, width), which are overwritten, by the rule for two sets of numbers (Chan, Golub and LeVeque, 1979)."""
        least, most, sums = values.min(axis=0), values.max(axis=0), values.sum(axis=0)
        count: Any = len(values)
        if not np.isfinite(sums).all():
            there = np.isfinite(values)
            least = np.where(there, values, np.inf).min(axis=0)
            most = np.where(there, values, -np.inf).max(axis=0)
            count, sums = there.sum(axis=0), np.where(there, values, 0.0).sum(axis=0)
        mean = sums / np.maximum(count, 1)
        values -= mean
        values[~np.isfinite(values)] = 0.0
        squares = np.einsum("ij,ij->j", values, values)
        self._least, self._most = np.minimum(self._least, least), np.maximum(self._most, most)
        total = np.maximum(self._count + count, 1)
        apart = mean - self._mean
        self._squares += squares + apart**2 * self._count * count / total
        self._mean += apart * count / total
        self._count += count

    def result(self) -> dict[str, Any]:
        """Name -> nested lists of the statistics' shape; `count`, of rows, has one number. Zeros where a value never
        was there."""
        empty = self._count == 0
        found = {
            "min": np.where(empty, 0.0, self._least),
            "max": np.where(empty, 0.0, self._most),
            "mean": self._mean,
            "std": np.sqrt(self._squares / np.maximum(self._count, 1)),
        }
        found |= dict(zip(QUANTILES, self._quantiles()))
        shaped = {name: values.reshape(self._shape).tolist() for name, values in found.items()}
        return {**shaped, "count": [self._rows]}

    def _quantiles(self) -> np.ndarray:
        """(5, width) of the sampled rows."""
        sample = np.concatenate(self._sample)
        found = np.zeros((len(QUANTILES), sample.shape[1]))
        for start in range(0, sample.shape[1], QUANTILE_COLUMNS):
            values = sample[:, start : start + QUANTILE_COLUMNS].astype(np.float64)
            values[~np.isfinite(values)] = np.nan
            values[:, np.isnan(values).all(axis=0)] = 0.0
            found[:, start : start + QUANTILE_COLUMNS] = np.nanquantile(values, list(QUANTILES.values()), axis=0)
        return found
