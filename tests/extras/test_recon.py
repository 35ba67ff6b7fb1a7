"""RECON: names that say too little are refused; poses that are there are stored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from formats_support import chunks, write_recon

from support import FIRST, SECOND, Outcome, read_progress


def test_two_files_with_one_name_are_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_recon(tmp_path / "data", [FIRST])
    shutil.copy(tmp_path / "data/t1.r01.hdf5", tmp_path / "data/t1.r02.hdf5")
    outcome = run_bits()
    assert outcome.code == 2
    assert all(word in outcome.err for word in ("t1.r01.hdf5", "t1.r02.hdf5", "rename"))


@pytest.mark.parametrize("values", [["0.1"] * 40, [b"x" * 100] * 40, [np.ones(2)] * 40])
def test_poses_that_are_no_numbers_are_the_same_data_in_every_run(
    run_bits: Callable[..., Outcome], tmp_path: Path, values: list[Any]
) -> None:
    write_recon(tmp_path / "data", [FIRST, SECOND])
    with h5py.File(tmp_path / "data/t1.r01.hdf5", "r+") as file:
        del file["jackal/yaw"]
        kind = h5py.vlen_dtype(float) if isinstance(values[0], np.ndarray) else h5py.string_dtype()
        yaw = file.create_dataset("jackal/yaw", (40,), kind)
        for row, value in enumerate(values):
            yaw[row] = value
    for attempts in (1, 2, 3, 3):
        outcome = run_bits()
        assert outcome.code == 1
        assert "Redoing" not in outcome.err
        failure = read_progress(tmp_path / "cache")["failures"]["t1"]
        assert failure["attempts"] == attempts
        assert "jackal/yaw" in failure["reason"]
        assert "expected numbers" in failure["reason"]
    assert read_progress(tmp_path / "cache")["completed_trajectories"] == ["t2"]


def test_poses_that_are_there_are_stored_also_in_chunks_by_number_of_frames(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    (name,) = write_recon(tmp_path / "data", [FIRST])
    assert run_bits({"chunk_by": "frames", "max_chunk_frames": 40, "overlap_frames": 0}).code == 0
    ((_, datasets),) = chunks(tmp_path / "cache", name)
    assert {*datasets} == {"cls_token", "frame_index", "position", "yaw", "delta"}
    np.testing.assert_array_equal(datasets["position"], FIRST.position)
