"""What a folder is taken for, and by which sign."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from formats_support import WRITERS, write_recon

from support import FIRST, SECOND, Outcome, check_stamps, chunk_files, write_gnm

SIGNS = {
    "gnm": "gnm (t1/traj_data.pkl)", "recon": "recon (t1.r01.hdf5)", "lerobot": "lerobot (meta/info.json)",
    "video": "video (t1.mp4 and t1.txt)",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gnm", "recon", "lerobot v2.1 h264", "lerobot v3.0 h264", "video and tum"])
def test_auto_says_what_it_took_a_folder_for_and_a_second_run_has_nothing_to_do(
    run_bits: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    format, write = WRITERS[kind]
    (name,) = write(tmp_path / "data", [FIRST])
    for count in (1, 2):
        outcome = run_bits()
        assert outcome.code == 0, outcome.err
        assert f"robot: format {SIGNS[format]}" in outcome.out
        assert ("Encoding with" in outcome.out) == (count == 1)
    check_stamps(tmp_path / "cache", name, 1)
    assert run_bits({"format": format}, checksum="content").code == 0  # the same data, recorded by content
    again = run_bits({"format": format}, checksum="content")
    assert again.code == 0
    assert "Redoing" not in again.err


def test_a_folder_that_could_be_two_formats_or_none_is_refused(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/notes.txt").write_text("x")
    outcome = run_bits()
    assert outcome.code == 2
    assert all(word in outcome.err for word in ("traj_data.pkl", "*.hdf5", "meta/info.json", ".mp4")), outcome.err
    write_recon(tmp_path / "data", [FIRST])
    write_gnm(tmp_path / "data", [SECOND])
    outcome = run_bits()
    assert outcome.code == 2
    assert "recon (t1.r01.hdf5) and gnm (t2/traj_data.pkl)" in outcome.err
    assert run_bits({"format": "gnm"}).code == 0
    assert chunk_files(tmp_path / "cache")[0].parent.name == "t2"
