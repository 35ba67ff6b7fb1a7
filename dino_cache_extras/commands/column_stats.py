"""Statistics of a column that is seen once, block by block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

SAMPLED_ROWS = 4096  # whose values say the quantiles
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
        self._step, self._sample = 1, [np.empty((0, width))]

    def add(self, rows: np.ndarray) -> None:
        """(n, *shape) more of them."""
        rows = rows.reshape(len(rows), self._places, -1)  # (n, places, width)
        numbers = np.arange(len(rows)) + self._rows
        chosen = numbers % self._step == 0
        places = numbers[chosen] // self._step % self._places
        self._sample.append(rows[chosen, places].astype(np.float64))
        self._rows += len(rows)
        while sum(map(len, self._sample)) > SAMPLED_ROWS:
            self._sample = [np.concatenate(self._sample)[::2]]
            self._step *= 2
        most = max(1, VALUES_AT_A_TIME // max(1, rows[:1].size))
        for start in range(0, len(rows), most):
            self._add_values(rows[start : start + most].reshape(-1, rows.shape[-1]).astype(np.float64))

    def _add_values(self, values: np.ndarray) -> None:
        """(n, width) by the rule for two sets of numbers (Chan, Golub and LeVeque, 1979)."""
        there = np.isfinite(values)
        count = there.sum(axis=0)
        known = np.where(there, values, 0.0)
        self._least = np.minimum(self._least, np.where(there, values, np.inf).min(axis=0))
        self._most = np.maximum(self._most, np.where(there, values, -np.inf).max(axis=0))
        mean = known.sum(axis=0) / np.maximum(count, 1)
        squares = (np.where(there, values - mean, 0.0) ** 2).sum(axis=0)
        total = np.maximum(self._count + count, 1)
        apart = mean - self._mean
        self._squares += squares + apart**2 * self._count * count / total
        self._mean += apart * count / total
        self._count += count

    def result(self) -> dict[str, Any]:
        """Name -> nested lists of the statistics' shape; `count`, of rows, has one number. Zeros where a value never
        was there."""
        sample = np.concatenate(self._sample)
        filled = np.where(np.isfinite(sample), sample, np.nan)
        empty = self._count == 0
        filled[:, empty | np.isnan(filled).all(axis=0)] = 0.0
        found = {
            "min": np.where(empty, 0.0, self._least),
            "max": np.where(empty, 0.0, self._most),
            "mean": self._mean,
            "std": np.sqrt(self._squares / np.maximum(self._count, 1)),
        }
        found |= dict(zip(QUANTILES, np.nanquantile(filled, list(QUANTILES.values()), axis=0)))
        shaped = {name: values.reshape(self._shape).tolist() for name, values in found.items()}
        return {**shaped, "count": [self._rows]}
