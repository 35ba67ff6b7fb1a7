"""RECON: names that say too little are refused; poses that are there are stored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from formats_support import chunks, write_recon

from support import FIRST, Outcome


def test_two_files_with_one_name_are_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_recon(tmp_path / "data", [FIRST])
    shutil.copy(tmp_path / "data/t1.r01.hdf5", tmp_path / "data/t1.r02.hdf5")
    outcome = run_bits()
    assert outcome.code == 2
    assert all(word in outcome.err for word in ("t1.r01.hdf5", "t1.r02.hdf5", "rename"))


def test_poses_that_are_there_are_stored_also_in_chunks_by_number_of_frames(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    (name,) = write_recon(tmp_path / "data", [FIRST])
    assert run_bits({"chunk_by": "frames", "max_chunk_frames": 40, "overlap_frames": 0}).code == 0
    ((_, datasets),) = chunks(tmp_path / "cache", name)
    assert {*datasets} == {"cls_token", "frame_index", "position", "yaw"}
    np.testing.assert_array_equal(datasets["position"], FIRST.position)
