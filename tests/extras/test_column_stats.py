"""Statistics that a LeRobot export gives of each column."""

import numpy as np
import pytest

from dino_cache_extras.commands import column_stats
from dino_cache_extras.commands.column_stats import ColumnStats


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_they_are_those_of_all_rows_whatever_the_blocks(monkeypatch, block):
    monkeypatch.setattr(column_stats, "SAMPLED_ROWS", 100)
    monkeypatch.setattr(column_stats, "VALUES_AT_A_TIME", 50)
    monkeypatch.setattr(column_stats, "QUANTILE_COLUMNS", 2)
    rows = (1000 + np.random.default_rng(0).standard_normal((400, 2, 2, 3)) * [1, 2, 4]).astype(np.float16)
    stats = ColumnStats((2, 2, 3))
    for start in range(0, len(rows), block):
        stats.add(rows[start : start + block])
    found, values = stats.result(), rows.astype(np.float64).reshape(-1, 3)
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(found[name], getattr(values, name)(axis=0)[None, None], rtol=1e-12)
    assert found["count"] == [400]
    quantiles = np.array([found[name] for name in ("q01", "q10", "q50", "q90", "q99")])
    assert quantiles.shape == (5, 1, 1, 3)
    normal = np.array([-1.28, 0.0, 1.28])[:, None] * [1, 2, 4]
    np.testing.assert_allclose(quantiles[1:4, 0, 0] - 1000, normal, atol=2.5)  # of a sample of at least 50
    assert (np.diff(quantiles, axis=0) > 0).all()


def test_values_that_are_not_finite_are_left_out():
    stats = ColumnStats((2,))
    for rows in ([[1.0, np.nan]], [[np.nan, np.nan], [4.0, np.inf]], [[np.nan, np.nan]]):
        stats.add(np.array(rows))
    found = stats.result()
    assert (found["min"], found["max"], found["mean"]) == ([1.0, 0.0], [4.0, 0.0], [2.5, 0.0])
    assert found["std"] == [1.5, 0.0]
    assert found["q50"] == [2.5, 0.0]
