"""progress_utils.py export: the layouts, read by their own readers' rules, and what is refused."""

import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch

import progress_utils
from dino_cache_extras.commands import export as export_command
from support import make_trajectory, read_chunk, straight_line, tree, write_config

FRAMES = 20  # 0.25 m apart; 2 m chunks that overlap by 0.5 m: frames 0-8, 6-14, 12-19


def with_a_jump() -> np.ndarray:
    """10 frames, 100 m to the side, 3 frames that stand still, 100 m back, 7 frames: two pieces, 3 frames left out."""
    position = straight_line(FRAMES)
    position[10:13] = [2.25, 100.0]
    return position


def with_a_cut() -> np.ndarray:
    """10 frames, 100 m to the side, 10 frames: two pieces, and no frame is left out."""
    position = straight_line(FRAMES)
    position[10:, 1] = 100.0
    return position


class Exported(NamedTuple):
    """A cache of three trajectories, and where it may be exported to."""

    data: Path
    cache: Path
    out: Path
    config: Path

    def export(self, layout: str, *arguments: str) -> int:
        command = ["export", "--cache-dir", str(self.cache), "--to", layout, "-o", str(self.out), *arguments]
        return progress_utils.main(command)


@pytest.fixture
def robot(tmp_path, run_here) -> Exported:
    data = tmp_path / "data"
    make_trajectory(data / "a", FRAMES, stamp=1)
    make_trajectory(data / "lab" / "b", FRAMES, stamp=2, position=with_a_jump())
    make_trajectory(data / "lab" / "c", FRAMES, stamp=3, position=with_a_cut())
    make_trajectory(data / "broken", FRAMES, stamp=4, position=np.full((FRAMES, 2), np.nan))
    config = write_config(tmp_path / "c.yaml", data, tokens=["cls", "patch"])
    assert run_here(config).code == 1
    (tmp_path / "out").mkdir()
    return Exported(data, data / "dino_cache_small", tmp_path / "out" / "robot.h5", config)


# (trajectory, stamp, first frame, stop), in the order in which they were completed
EPISODES = [("a", 1, 0, 20), ("lab/b", 2, 0, 10), ("lab/b", 2, 13, 20), ("lab/c", 3, 0, 10), ("lab/c", 3, 10, 20)]


def read_as_stable_worldmodel(path: Path) -> tuple[dict[str, np.ndarray], list[slice]]:
    """Columns, and the rows of each episode, as its HDF5Dataset takes them: whatever is not ep_len or ep_offset."""
    with h5py.File(path, "r", swmr=True) as file:
        lengths, offsets = file["ep_len"][:], file["ep_offset"][:]
        columns = {key: file[key][...] for key in file if key not in ("ep_len", "ep_offset")}
    return columns, [slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True)]


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 24])
def test_flat_holds_each_frame_once_in_episodes_without_gaps(robot, monkeypatch, capsys, block_bytes):
    monkeypatch.setattr(export_command, "EXPORT_BLOCK_BYTES", block_bytes)
    assert robot.export("flat") == 0
    assert "3 trajectories: 5 episodes, 57 frames" in capsys.readouterr().out
    columns, rows = read_as_stable_worldmodel(robot.out)
    tokens, poses = {"cls_token", "patch_tokens"}, {"position", "yaw", "frame_index", "travelled_distance", "delta"}
    assert columns.keys() == tokens | poses | {"ep_idx", "step_idx"}
    assert {len(column) for column in columns.values()} == {57}
    assert [(r.start, r.stop) for r in rows] == [(0, 20), (20, 30), (30, 37), (37, 47), (47, 57)]
    for episode, ((name, stamp, first, stop), row) in enumerate(zip(EPISODES, rows, strict=True)):
        frames = np.arange(first, stop)
        expected = np.stack([np.full(len(frames), stamp), frames // 256, frames % 256], axis=1)
        np.testing.assert_array_equal(columns["cls_token"][row][:, :3], expected)
        np.testing.assert_array_equal(columns["patch_tokens"][row][:, 1, 2, :3], expected)
        np.testing.assert_array_equal(columns["frame_index"][row], frames)
        position = {"a": straight_line(FRAMES), "lab/b": with_a_jump(), "lab/c": with_a_cut()}[name]
        np.testing.assert_array_equal(columns["position"][row], position[first:stop])
        np.testing.assert_array_equal(columns["yaw"][row], np.linspace(0, 1, FRAMES)[first:stop])
        assert (columns["ep_idx"][row] == episode).all()
        np.testing.assert_array_equal(columns["step_idx"][row], np.arange(len(frames)))
    assert columns["cls_token"].dtype == columns["patch_tokens"].dtype == np.float16
    with h5py.File(robot.out) as file:
        assert list(file.attrs["ep_trajectory"]) == [name for name, *_ in EPISODES]
    assert [path.name for path in robot.out.parent.iterdir()] == ["robot.h5"]


def test_flat_takes_the_tokens_asked_for(robot, capsys):
    assert robot.export("flat", "--tokens", "cls") == 0
    columns, _ = read_as_stable_worldmodel(robot.out)
    assert "cls_token" in columns
    assert "patch_tokens" not in columns
    capsys.readouterr()
    assert robot.export("flat", "--tokens", "register", "--force") == 2
    assert "has no register tokens" in capsys.readouterr().err


def read_as_visualnav_transformer(folder: Path) -> dict[str, dict[str, Any]]:
    """Chunk id -> content, checked as its FeatureDataset checks it."""
    metadata = json.loads((folder / "cache_metadata.json").read_text())
    chunks = {}
    for chunk_id in metadata["chunks"]:
        chunk = torch.load(folder / f"{chunk_id}.pt", map_location="cpu", weights_only=True)
        features = chunk["features"]
        assert (features.dim(), features.shape[1], features.dtype) == (2, metadata["feature_dim"], torch.float16)
        assert len(features) == len(chunk["positions"]) == len(chunk["yaws"]) == len(chunk["indices"])
        chunks[chunk_id] = chunk
    assert len(chunks) == len(metadata["chunks"]) == len(list(folder.glob("*.pt")))
    return chunks


def test_vint_holds_every_chunk_as_it_is(robot):
    assert robot.export("vint") == 0
    metadata = json.loads((robot.out / "cache_metadata.json").read_text())
    expected = {"name": "robot", "max_chunk_distance_m": 2.0, "overlap_distance_m": 0.5, "feature_dim": 4}
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["cache_path"] == "robot.h5"  # the folder's own name
    chunks = read_as_visualnav_transformer(robot.out)
    starts = ["a_00000", "a_00006", "a_00012", "lab__b_00000", "lab__b_00013", "lab__c_00000"]
    assert list(chunks)[:6] == starts
    for chunk_id, (name, index) in zip(
        starts, [("a", 0), ("a", 1), ("a", 2), ("lab/b", 0), ("lab/b", 1), ("lab/c", 0)]
    ):
        _, stored = read_chunk(robot.cache / name / f"chunk_0000{index}.h5")
        chunk = chunks[chunk_id]
        np.testing.assert_array_equal(chunk["features"].numpy(), stored["cls_token"])
        np.testing.assert_array_equal(np.array(chunk["positions"]), stored["position"])
        np.testing.assert_array_equal(np.array(chunk["yaws"]), stored["yaw"])
        np.testing.assert_array_equal(np.array(chunk["indices"]), stored["frame_index"])
    assert chunks["lab__b_00013"]["indices"] == [13, 14, 15, 16, 17, 18, 19]


def test_vint_keeps_trajectories_apart_whose_flat_names_are_the_same_or_too_long(tmp_path, run_here):
    names = ["x/y", "x__y", "X__Y", "/".join(["long" * 40] * 3)]
    for stamp, name in enumerate(names):
        make_trajectory(tmp_path / "data" / name, 5, stamp=stamp)
    assert run_here(write_config(tmp_path / "c.yaml", tmp_path / "data")).code == 0
    command = ["export", "--cache-dir", str(tmp_path / "data" / "dino_cache_small"), "--to", "vint"]
    assert progress_utils.main([*command, "-o", str(tmp_path / "out")]) == 0
    chunks = read_as_visualnav_transformer(tmp_path / "out")
    assert sorted(chunk["features"][0, 0].item() for chunk in chunks.values()) == [0, 1, 2, 3]
    assert len({chunk_id.casefold() for chunk_id in chunks}) == 4


@pytest.mark.parametrize("layout", ["flat", "vint"])
def test_an_output_that_is_there_is_replaced_only_with_force(robot, capsys, layout):
    assert robot.export(layout) == 0
    before = tree(robot.out.parent)
    assert robot.export(layout) == 2
    assert "--force" in capsys.readouterr().err
    assert tree(robot.out.parent) == before
    assert robot.export(layout, "--force") == 0
    assert tree(robot.out.parent).keys() == before.keys()


def test_force_never_deletes_what_no_export_made(robot, capsys):
    robot.out.mkdir()
    (robot.out / "thesis.tex").write_text("all of it")
    for layout in ("vint", "flat"):
        assert robot.export(layout, "--force") == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (robot.out / "thesis.tex").read_text() == "all of it"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("place", ["robot.h5", "robot.h5.partial"])
@pytest.mark.parametrize("name", ["best.pt", "cache_metadata.json", "cache_metadata.json.bak", "a_00000.pt.txt"])
def test_a_folder_with_files_that_no_export_made_stays(robot, capsys, place, name):
    assert robot.export("vint") == 0
    if place.endswith(".partial"):
        robot.out.rename(robot.out.with_name(place))
    folder = robot.out.with_name(place)
    (folder / name).write_bytes(b'{"name": "robot", "chunks": ["a_00000"]}')  # another program's
    before = contents(folder)
    assert robot.export("vint", "--force") == 2
    assert str(folder) in (message := capsys.readouterr().err)
    assert name in message
    assert contents(folder) == before


def test_a_folder_of_checkpoints_stays(robot, capsys):
    robot.out.mkdir()
    (robot.out / "best.pt").write_bytes(b"weights of a week")
    (robot.out / "a_00000.pt").mkdir()  # a name of a chunk's
    assert robot.export("vint", "--force") == 2
    assert "a_00000.pt" in capsys.readouterr().err
    (robot.out / "a_00000.pt").rmdir()
    assert robot.export("vint", "--force") == 2
    assert "best.pt" in capsys.readouterr().err
    assert contents(robot.out) == {"best.pt": b"weights of a week"}


@pytest.mark.parametrize("what", ["text", "hdf5", "folder"])
def test_a_file_that_no_export_made_stays(robot, capsys, what):
    if what == "folder":
        robot.out.with_name("robot.h5.partial").mkdir()
    elif what == "text":
        robot.out.write_bytes(b"all of it")
    else:
        with h5py.File(robot.out, "w") as file:
            file["measurements"] = np.arange(5)
    before = tree(robot.out.parent)
    assert robot.export("flat", "--force") == 2
    assert "robot.h5" in capsys.readouterr().err
    assert tree(robot.out.parent) == before


def test_a_file_that_came_into_the_folder_during_the_export_stays(robot, capsys, monkeypatch):
    assert robot.export("vint") == 0
    write_chunks = export_command._write_vint_chunks

    def meanwhile(*arguments: Any) -> int:
        (robot.out / "notes.txt").write_text("of mine")
        return write_chunks(*arguments)

    monkeypatch.setattr(export_command, "_write_vint_chunks", meanwhile)
    before = contents(robot.out)
    assert robot.export("vint", "--force") == 2
    assert "notes.txt" in capsys.readouterr().err
    assert contents(robot.out) == {**before, "notes.txt": b"of mine"}
    assert [path.name for path in robot.out.parent.iterdir()] == ["robot.h5"]


def test_an_export_of_an_earlier_version_or_of_a_larger_cache_is_replaced(robot):
    assert robot.export("vint") == 0
    metadata = json.loads((robot.out / "cache_metadata.json").read_text())
    assert metadata.pop("made_by") == "dino_cache export"
    metadata["chunks"].append("gone_00000")
    (robot.out / "cache_metadata.json").write_text(json.dumps(metadata))
    (robot.out / "gone_00000.pt").write_bytes(b"of a trajectory that is recorded no more")
    assert robot.export("vint", "--force") == 0
    assert "gone_00000.pt" not in contents(robot.out)
    assert len(read_as_visualnav_transformer(robot.out)) == len(metadata["chunks"]) - 1


def test_what_an_export_left_that_was_killed_in_a_larger_cache_is_not_in_the_way(robot):
    assert robot.export("vint") == 0
    partial = robot.out.rename(robot.out.with_name("robot.h5.partial"))
    (partial / "lab__c_00000.pt").unlink()  # not written yet
    record = json.loads((robot.cache / "progress.json").read_text())
    record["completed_trajectories"].remove("a")
    del record["trajectory_checksums"]["a"], record["trajectory_records"]["a"]
    (robot.cache / "progress.json").write_text(json.dumps(record))
    assert robot.export("vint") == 0
    assert [path.name for path in robot.out.parent.iterdir()] == ["robot.h5"]
    assert "a_00000.pt" not in contents(robot.out)


@pytest.mark.parametrize("layout", ["flat", "vint"])
@pytest.mark.parametrize("damage", ["flipped", "missing", "of another trajectory"])
def test_a_chunk_that_is_not_as_recorded_ends_the_export_and_leaves_what_was_there(robot, capsys, layout, damage):
    assert robot.export(layout) == 0
    before = tree(robot.out.parent)
    path = robot.cache / "lab" / "c" / "chunk_00001.h5"
    if damage == "flipped":
        with h5py.File(path) as file:
            offset = file["cls_token"].id.get_offset()
        data = bytearray(path.read_bytes())
        data[offset + 3] ^= 1
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes((robot.cache / "a" / "chunk_00001.h5").read_bytes())
    capsys.readouterr()
    assert robot.export(layout, "--force") == 2
    message = capsys.readouterr().err
    assert str(path) in message
    assert "verify" in message
    assert tree(robot.out.parent) == before


@pytest.mark.parametrize("layout", ["flat", "vint"])
def test_a_full_disk_ends_the_export_and_leaves_what_was_there(robot, capsys, layout):
    assert robot.export(layout) == 0
    before = tree(robot.out.parent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow beyond
    try:
        code = robot.export(layout, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert tree(robot.out.parent) == before


def test_a_disk_that_cannot_hold_the_export_is_refused_at_once(robot, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    assert robot.export("flat") == 2  # 57 rows of 8 + 48 + 40 + 24 bytes
    assert "takes 6.8 kB and 5.0 kB are free" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=6900))
    assert robot.export("flat") == 0


@pytest.mark.parametrize("layout", ["flat", "vint"])
def test_what_a_killed_export_left_is_not_in_the_way(robot, layout):
    partial = robot.out.with_name("robot.h5.partial")
    if layout == "flat":
        partial.write_bytes(b"half")
    else:
        partial.mkdir()
        (partial / "a_00000.pt").write_bytes(b"half")
    assert robot.export(layout) == 0
    assert [path.name for path in robot.out.parent.iterdir()] == ["robot.h5"]


def test_a_mixed_cache_is_exported_only_if_allowed_and_if_its_rows_fit(robot, run_here, capsys):
    make_trajectory(robot.data / "d", FRAMES, stamp=5)
    settings = {"tokens": ["cls", "patch"], "max_chunk_distance_m": 3.0}
    run_here(write_config(robot.config, robot.data, **settings), "--yes")
    assert robot.export("flat") == 2
    assert "mixed" in capsys.readouterr().err
    assert robot.export("flat", "--allow-mixed") == 0
    _, rows = read_as_stable_worldmodel(robot.out)
    assert len(rows) == 6
    make_trajectory(robot.data / "e", FRAMES, stamp=6)
    run_here(write_config(robot.config, robot.data, **settings, image_size=[28, 56]), "--yes")
    assert robot.export("flat", "--allow-mixed", "--force") == 2
    message = capsys.readouterr().err
    assert "patch_tokens has rows of shape (2, 4, 4), those before have (2, 3, 4)" in message
    assert robot.export("flat", "--allow-mixed", "--force", "--tokens", "cls") == 0
    make_trajectory(robot.data / "f", FRAMES, stamp=7)
    run_here(write_config(robot.config, robot.data, **{**settings, "tokens": ["cls"]}), "--yes")
    assert robot.export("flat", "--allow-mixed", "--force") == 0  # what all of them have
    assert "patch_tokens" not in read_as_stable_worldmodel(robot.out)[0]


def test_what_cannot_be_exported_is_refused(robot, run_here, capsys, tmp_path):
    inside = Exported(robot.data, robot.cache, robot.cache / "robot.h5", robot.config)
    before = tree(robot.cache)
    assert inside.export("flat") == 2
    assert inside.export("vint") == 2
    assert tree(robot.cache) == before
    nowhere = Exported(robot.data, robot.cache, tmp_path / "absent" / "robot.h5", robot.config)
    assert nowhere.export("flat") == 2
    assert str(tmp_path / "absent") in capsys.readouterr().err
    assert robot.export("vint", "--tokens", "patch") == 2
    assert progress_utils.main(["reset", "--cache-dir", str(robot.cache), "--yes"]) == 0
    assert robot.export("flat") == 2
    assert "nothing to export" in capsys.readouterr().err
    assert list(robot.out.parent.iterdir()) == []
