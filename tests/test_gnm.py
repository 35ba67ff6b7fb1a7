"""What is found below a data folder, what is read from it, what fails and why, and when data counts as changed."""

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dino_cache import (
    FRAME_PATTERN,
    InputError,
    Trajectory,
    find_trajectories,
    list_trajectory,
    read_poses,
    trajectory_checksum,
)
from progress_utils import RefusedError
from support import (
    ROOT,
    Outcome,
    check_stamps,
    chunk_files,
    make_trajectory,
    no_hang,
    read_chunk,
    read_progress,
    straight_line,
    write_config,
    write_frame,
    write_poses,
)

COUNT = 20  # frames of make_trajectory
POSITION, YAW = straight_line(COUNT), np.linspace(0, 1, COUNT)
NOT_UTF8 = os.fsdecode(b"caf\xe9")  # as Latin-1 wrote it


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An empty data folder, below one that holds the config and nothing else."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def run_data(data: Path, run_here: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Run with settings over the data folder, its cache in ../cache; `split` goes where it belongs."""

    def run(split: Path | None = None, **settings: Any) -> Outcome:
        config = write_config(data.parent / "config.yaml", data, **settings)
        content = yaml.safe_load(config.read_text())
        content["datasets"]["robot"] |= {"cache_dir": "cache"} | ({"split": str(split)} if split else {})
        config.write_text(yaml.safe_dump(content))
        return run_here(config)

    return run


def names(data: Path) -> list[str]:
    return [trajectory.name for trajectory in find_trajectories(data)]


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def make_poses(folder: Path) -> Path:
    """A folder that is a trajectory to the walk, which looks at no frame."""
    folder.mkdir(parents=True)
    write_poses(folder, POSITION, YAW)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The walk.
# ---------------------------------------------------------------------------------------------------------------------


def test_trajectories_are_found_at_any_depth_and_named_by_their_path(data: Path) -> None:
    for name in ("b", "a/deep/er/2", "a/deep/er/10", "jackal_2019-10-20-16-09-18_0_r04", "\u00fcber uns/\u30ed\u30dc"):
        make_poses(data / name)
    assert sorted(names(data)) == [
        "a/deep/er/10", "a/deep/er/2", "b", "jackal_2019-10-20-16-09-18_0_r04", "\u00fcber uns/\u30ed\u30dc",
    ]  # fmt: skip


@pytest.mark.parametrize("pose_file", ["traj_data.pkl", "traj_data.json", "traj_data.npz"])
def test_any_pose_file_makes_a_trajectory_and_nothing_below_it_is_searched(data: Path, pose_file: str) -> None:
    make_poses(data / "outer" / "inner")
    assert names(data) == ["outer/inner"]
    (data / "outer" / pose_file).touch()
    assert names(data) == ["outer"]


@pytest.mark.parametrize("pose_file", ["traj_data.pkl", "traj_data.json", "traj_data.npz"])
def test_a_data_folder_that_is_itself_a_trajectory_is_refused(data: Path, run_data: Callable, pose_file: str) -> None:
    make_trajectory(data / "t")
    (data / pose_file).touch()
    outcome = run_data()
    assert outcome.code == 2
    assert str(data) in outcome.err
    assert pose_file in outcome.err
    assert "folder above" in outcome.err
    assert chunk_files(data.parent) == []


def test_stray_files_are_neither_trajectories_nor_frames(data: Path, run_data: Callable) -> None:
    folder = make_trajectory(data / "t", COUNT, stamp=5)
    for stray in ("dataset_dist_0.pkl", "dataset_metadata.json", ".DS_Store", "t2.jpg", "traj_names.txt"):
        (data / stray).write_bytes(b"stray")
    for stray in (
        "diff_3.jpg",
        "3.jpg.bak",
        "3.txt",
        "._3.jpg",
        "x3.jpg",
        "3a.jpg",
        "-3.jpg",
        ".DS_Store",
        "Thumbs.db",
    ):
        (folder / stray).write_bytes(b"stray")
    (folder / "rgb_left").mkdir()
    (data / "dataset_robot.lmdb").mkdir()
    (data / "dataset_robot.lmdb" / "data.mdb").touch()
    outcome = run_data()
    assert outcome.code == 0, outcome.err
    assert {path.parent.name for path in chunk_files(data.parent / "cache")} == {"t"}
    assert check_stamps(data.parent / "cache", "t", 5) >= COUNT


def test_a_cache_inside_its_data_folder_is_never_read_as_data(data: Path, run_here: Callable[..., Outcome]) -> None:
    make_trajectory(data / "t")
    config = write_config(data.parent / "config.yaml", data)  # whose cache_dir is below data_folder
    assert run_here(config).code == 0
    assert names(data) == ["t"]
    (data / "dino_cache_small" / "progress.json").unlink()
    assert names(data) == ["t"]


def test_folders_with_frames_and_no_pose_file_are_named_and_fail_nothing(data: Path, run_data: Callable) -> None:
    make_trajectory(data / "t")
    for name in ("a/bare", "a/bare/deeper", "plots"):
        write_frame(make_folder(data / name) / "0.png", 0, 0)
    write_frame(make_folder(data / "figures") / "overview.png", 0, 0)
    outcome = run_data()
    assert outcome.code == 0
    assert "3 folders hold frames but no pose file, left out: a/bare, a/bare/deeper, plots" in outcome.err
    (data.parent / "split.txt").write_text("a/bare\n")  # asked for by name, it is a broken trajectory
    assert run_data(split=data.parent / "split.txt").code == 1
    assert "no pose file" in read_progress(data.parent / "cache")["failures"]["a/bare"]["reason"]


def test_lost_and_found_is_the_filesystems_and_never_searched(data: Path) -> None:
    make_poses(data / "lost+found" / "t")
    make_poses(data / "t")
    assert names(data) == ["t"]


def test_another_programs_progress_json_hides_no_trajectory(data: Path) -> None:
    for folder in (data, data / "downloaded"):
        make_poses(folder / "t")
        (folder / "progress.json").write_text('{"downloaded": 17}')
    assert sorted(names(data)) == ["downloaded/t", "t"]


def test_links_to_folders_are_followed_but_never_in_circles(data: Path, tmp_path: Path) -> None:
    make_poses(data / "a" / "t")
    (data / "a" / "up").symlink_to(data)
    (data / "a" / "here").symlink_to(".")
    (data / "itself").symlink_to("itself")
    (data / "nowhere").symlink_to("gone")
    (data / "b").mkdir()
    (data / "b" / "to_c").symlink_to(data / "c")
    (data / "c").mkdir()
    (data / "c" / "to_b").symlink_to(data / "b")
    (data / "elsewhere").symlink_to(make_poses(tmp_path / "other_disk" / "t").parent)
    with no_hang():
        assert sorted(names(data)) == ["a/t", "elsewhere/t"]


def test_a_data_folder_without_trajectories_is_refused(data: Path, run_data: Callable) -> None:
    (data / "only_frames").mkdir()
    write_frame(data / "only_frames" / "0.png", 0, 0)
    outcome = run_data()
    assert outcome.code == 2
    assert str(data) in outcome.err
    with pytest.raises(RefusedError, match="gone"):
        names(data / "gone")


# ---------------------------------------------------------------------------------------------------------------------
# Split files.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"a\nn/c\n",
        b"a\nn/c",
        b"\r\na\r\n\r\nn/c\r\n",
        b"  a \n\t\nn/c\n\n\n",
        b"n/c\na\na\n",
        b"n/c/\na/\n",
        b"\xef\xbb\xbfa\nn/c\n",
    ],
    ids=["plain", "no last newline", "CRLF and blank lines", "spaces", "twice", "slashes", "byte order mark"],
)
def test_a_split_selects_its_names(data: Path, run_data: Callable, text: bytes) -> None:
    for stamp, name in enumerate(("a", "b", "n/c", "n/d")):
        make_trajectory(data / name, COUNT, stamp=stamp)
    split = data.parent / "traj_names.txt"
    split.write_bytes(text)
    outcome = run_data(split)
    assert outcome.code == 0, outcome.err
    assert read_progress(data.parent / "cache")["completed_trajectories"] == ["a", "n/c"]
    assert "not in the data folder" not in outcome.err


def test_names_of_a_split_that_are_missing_are_reported(data: Path, run_data: Callable) -> None:
    make_trajectory(data / "a")
    split = data.parent / "traj_names.txt"
    split.write_text("gone_1\na\ngone/2\n")
    outcome = run_data(split)
    assert outcome.code == 0
    assert "2 names of the split" in outcome.err
    assert "gone_1" in outcome.err
    assert "gone/2" in outcome.err


@pytest.mark.parametrize("content", [b"gone\n", b"\n", b"caf\xe9\n", None], ids=["none", "empty", "Latin-1", "no file"])
def test_a_split_that_selects_nothing_is_refused(data: Path, run_data: Callable, content: bytes | None) -> None:
    make_trajectory(data / "a")
    split = data.parent / "traj_names.txt"
    if content is not None:
        split.write_bytes(content)
    outcome = run_data(split)
    assert outcome.code == 2
    assert str(split) in outcome.err
    assert chunk_files(data.parent) == []


# ---------------------------------------------------------------------------------------------------------------------
# Frames.
# ---------------------------------------------------------------------------------------------------------------------


def rename_frames(folder: Path, new_name: Callable[[int], str]) -> None:
    """PNG stays PNG whatever the name says; decoding goes by the content."""
    numbers = range(len(list(folder.glob("*.png"))))
    for number in numbers:
        (folder / f"{number}.png").rename(folder / f"old {number}")
    for number in numbers:
        (folder / f"old {number}").rename(folder / new_name(number))


@pytest.mark.parametrize(
    ("new_name", "settings"),
    [
        (lambda n: f"{n}.png", {}),
        (lambda n: f"{n}.jpg", {}),
        (lambda n: f"{n}.{('jpg', 'jpeg', 'png')[n % 3]}", {}),
        (lambda n: f"{n + 1}.png", {}),
        (lambda n: f"{n:03d}.png", {}),
        (lambda n: f"frame_{n + 1:06d}.jpg", {"frame_pattern": r"frame_(\d+)\.jpg"}),
        (lambda n: f"cam0-{n}-left.png", {"frame_pattern": r"cam0-(\d+)-.*"}),
        (lambda n: f"{n}", {"frame_pattern": r"(\d+)"}),
    ],
    ids=["png", "jpg", "all three", "counting from 1", "padded", "pattern from 1", "pattern", "no extension"],
)
def test_frames_go_by_number_never_by_text(
    data: Path, run_data: Callable, new_name: Callable[[int], str], settings: dict[str, str]
) -> None:
    """Frame 10 comes after 9, and pose 10 is its pose."""
    rename_frames(make_trajectory(data / "t", COUNT, stamp=7), new_name)
    outcome = run_data(**settings)
    assert outcome.code == 0, outcome.err
    assert check_stamps(data.parent / "cache", "t", 7) >= COUNT
    for path in chunk_files(data.parent / "cache"):
        _, datasets = read_chunk(path)
        np.testing.assert_array_equal(datasets["position"], POSITION[datasets["frame_index"]])
        np.testing.assert_array_equal(datasets["yaw"], YAW[datasets["frame_index"]])


def test_a_file_without_a_number_is_no_frame(data: Path, run_data: Callable) -> None:
    folder = make_trajectory(data / "t", COUNT, stamp=7)
    rename_frames(folder, lambda n: f"frame{n}.png")
    write_frame(folder / "frame.png", 0, 0)
    outcome = run_data(frame_pattern=r"frame(\d+)?\.png")
    assert outcome.code == 0, outcome.err
    assert check_stamps(data.parent / "cache", "t", 7) >= COUNT


# ---------------------------------------------------------------------------------------------------------------------
# Poses.
# ---------------------------------------------------------------------------------------------------------------------


def write_npz(folder: Path, **arrays: Any) -> None:
    (folder / "traj_data.pkl").unlink()
    np.savez(folder / "traj_data.npz", **arrays)


def write_json(folder: Path, text: str) -> None:
    (folder / "traj_data.pkl").unlink()
    (folder / "traj_data.json").write_text(text)


def as_json(position: Any, yaw: Any) -> str:
    return json.dumps({"position": np.asarray(position).tolist(), "yaw": np.asarray(yaw).tolist()})


HEIGHT = np.full((COUNT, 1), 0.5)
POSES: dict[str, Callable[[Path], None]] = {
    "arrays": lambda folder: write_poses(folder, POSITION, YAW),
    "lists": lambda folder: write_poses(folder, POSITION.tolist(), YAW.tolist()),
    "tuples": lambda folder: write_poses(folder, tuple(map(tuple, POSITION.tolist())), tuple(YAW.tolist())),
    "a list of arrays": lambda folder: write_poses(folder, list(POSITION), list(YAW)),  # arrays and numpy scalars
    "three columns": lambda folder: write_poses(folder, np.hstack([POSITION, HEIGHT]), YAW),
    "unknown heights": lambda folder: write_poses(folder, np.hstack([POSITION, HEIGHT * math.nan]), YAW),
    "lists of seven": lambda folder: write_poses(folder, np.hstack([POSITION, *5 * [HEIGHT]]).tolist(), YAW),
    "yaw (T, 1)": lambda folder: write_poses(folder, POSITION, YAW[:, None]),
    "yaw [[a], [b]]": lambda folder: write_poses(folder, POSITION, YAW[:, None].tolist()),
    "Fortran order": lambda folder: write_poses(folder, np.asfortranarray(POSITION), YAW),
    "big-endian": lambda folder: write_poses(folder, POSITION.astype(">f8"), YAW.astype(">f8")),
    "JSON": lambda folder: write_json(folder, as_json(POSITION, YAW)),
    "JSON with more": lambda folder: write_json(folder, as_json(np.hstack([POSITION, HEIGHT]), YAW[:, None])),
    "npz": lambda folder: write_npz(folder, position=POSITION, yaw=YAW),
    "npz with more": lambda folder: write_npz(
        folder, position=np.hstack([POSITION, HEIGHT]), yaw=YAW[:, None], time=np.arange(9)
    ),
}


@pytest.mark.parametrize("form", POSES)
def test_poses_are_read_in_every_form(data: Path, run_data: Callable, form: str) -> None:
    POSES[form](make_trajectory(data / "t"))
    outcome = run_data(overlap_distance_m=0)
    assert outcome.code == 0, outcome.err
    chunks = [read_chunk(path)[1] for path in chunk_files(data.parent / "cache")]
    for chunk in chunks:
        assert chunk["position"].dtype == chunk["yaw"].dtype == np.float64
        np.testing.assert_array_equal(chunk["position"], POSITION[chunk["frame_index"]])
        np.testing.assert_array_equal(chunk["yaw"], YAW[chunk["frame_index"]])
    assert {int(index) for chunk in chunks for index in chunk["frame_index"]} == set(range(COUNT))


@pytest.mark.parametrize("dtype", ["f2", "f4", "i4", "u1"])
def test_poses_of_other_number_types_become_float64_of_the_same_value(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0, 1], [0, 2], [0.1, 3]]).astype(dtype)
    write_poses(tmp_path, values, values[:, 1])
    _, position, yaw, *_ = read_poses(tmp_path / "traj_data.pkl", "t")
    assert position.dtype == yaw.dtype == np.float64
    assert position.tolist() == [[float(x), float(y)] for x, y in values]
    assert yaw.tolist() == [1.0, 2.0, 3.0]


def as_numpy_1_wrote_it(data: bytes) -> bytes:
    """A small pickle of numpy 2, its modules renamed from numpy._core to numpy.core."""
    if data[2:3] == pickle.FRAME:  # protocols 4 and 5; a frame says its length, and may be left out
        data = data[:2] + data[11:]
    renamed = re.sub(  # protocols 4 and 5 say the name's length before it
        rb"\x8c(.)numpy\._core\.",
        lambda match: b"\x8c" + bytes([match[1][0] - 1]) + b"numpy.core.",
        data,
        flags=re.DOTALL,
    )
    return renamed.replace(b"numpy._core.", b"numpy.core.")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("numpy_major", [1, 2])
def test_pickles_of_every_protocol_and_of_both_numpys_are_read(tmp_path: Path, numpy_major: int, protocol: int) -> None:
    poses = {"position": POSITION.astype(np.float32), "yaw": list(YAW), "fortran": np.asfortranarray(POSITION)}
    data = pickle.dumps(poses, protocol=protocol)
    if numpy_major == 1:
        data = as_numpy_1_wrote_it(data)
    assert (b"numpy._core." in data, b"numpy.core." in data) == (numpy_major == 2, numpy_major == 1)
    (tmp_path / "traj_data.pkl").write_bytes(data)
    _, position, yaw, *_ = read_poses(tmp_path / "traj_data.pkl", "t")
    np.testing.assert_array_equal(position, POSITION.astype(np.float32))
    np.testing.assert_array_equal(yaw, YAW)


# ---------------------------------------------------------------------------------------------------------------------
# Failures: a reason that names file and value, and only that trajectory fails.
# ---------------------------------------------------------------------------------------------------------------------


def with_value(array: np.ndarray, index: Any, value: float) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


PKL, JSON = "bad/traj_data.pkl", "bad/traj_data.json"
Q = straight_line(COUNT, step_m=1 / 128)  # 19 / 128 = 0.148 m in all
FAILURES: dict[str, tuple[Callable[[Path], object], list[str]]] = {  # how to break it, what the reason names
    # the pose file
    "empty": (lambda bad: (bad / "traj_data.pkl").write_bytes(b""), [PKL]),
    "cut off": (lambda bad: os.truncate(bad / "traj_data.pkl", 150), [PKL]),
    "text": (lambda bad: (bad / "traj_data.pkl").write_text("x y yaw\n0 0 0\n"), [PKL]),
    "random bytes": (lambda bad: (bad / "traj_data.pkl").write_bytes(bytes(range(255, 0, -1))), [PKL]),
    "text as npz": (lambda bad: replace_by(bad / "traj_data.pkl", lambda p: p.with_suffix(".npz").write_text("x")),
                    ["bad/traj_data.npz"]),
    "half a JSON": (lambda bad: write_json(bad, as_json(POSITION, YAW)[:100]), [JSON]),
    "deep JSON": (lambda bad: write_json(bad, "[" * 100_000), [JSON]),
    "a folder": (lambda bad: replace_by(bad / "traj_data.pkl", Path.mkdir), [PKL]),
    "a broken link": (lambda bad: replace_by(bad / "traj_data.pkl", lambda p: p.symlink_to("gone")), [PKL]),
    "a link to itself": (lambda bad: replace_by(bad / "traj_data.pkl", lambda p: p.symlink_to(p.name)), [PKL]),
    # its content
    "a list": (lambda bad: (bad / "traj_data.pkl").write_bytes(pickle.dumps([1])), [PKL, "list"]),
    "no yaw": (lambda bad: (bad / "traj_data.pkl").write_bytes(pickle.dumps({"position": POSITION, "pose": 1})),
               [PKL, "yaw", "pose"]),
    "JSON without position": (lambda bad: write_json(bad, '{"yaw": [0]}'), [JSON, "position"]),
    "npz without yaw": (lambda bad: write_npz(bad, position=POSITION), ["bad/traj_data.npz", "yaw"]),
    "nothing": (lambda bad: write_poses(bad, None, YAW), [PKL, "position"]),
    "text values": (lambda bad: write_poses(bad, POSITION.astype(str), YAW), [PKL, "position", "<U"]),
    "truth values": (lambda bad: write_poses(bad, POSITION, YAW > 0), [PKL, "yaw", "bool"]),
    "complex values": (lambda bad: write_poses(bad, POSITION * 1j, YAW), [PKL, "position", "complex"]),
    "object values": (lambda bad: write_poses(bad, POSITION.astype(object), YAW), [PKL, "position", "object"]),
    "an integer beyond all": (lambda bad: write_json(bad, as_json(POSITION, YAW).replace("0.25", "1" + "0" * 400)),
                              [JSON, "position"]),
    # shapes
    "position (T,)": (lambda bad: write_poses(bad, POSITION[:, 0], YAW), [PKL, "position", "(20,)"]),
    "position (T, 1)": (lambda bad: write_poses(bad, POSITION[:, :1], YAW), [PKL, "position", "(20, 1)"]),
    "position (T, 2, 1)": (lambda bad: write_poses(bad, POSITION[..., None], YAW), [PKL, "position", "(20, 2, 1)"]),
    "rows of unequal length": (lambda bad: write_poses(bad, [[0, 0], [1], *POSITION[2:].tolist()], YAW),
                               [PKL, "position"]),
    "yaw (T, 2)": (lambda bad: write_poses(bad, POSITION, np.stack([YAW, YAW], 1)), [PKL, "yaw", "(20, 2)"]),
    "yaw of one less": (lambda bad: write_poses(bad, POSITION, YAW[:-1]), [PKL, "yaw", "(19,)", "20"]),
    "a single yaw": (lambda bad: write_poses(bad, POSITION, 0.0), [PKL, "yaw", "()"]),
    "no poses": (lambda bad: write_poses(bad, POSITION[:0], YAW[:0]), [PKL]),
    # values
    "NaN": (lambda bad: write_poses(bad, with_value(POSITION, (7, 1), math.nan), YAW),
            [PKL, "position", "7, 1", "nan"]),
    "inf": (lambda bad: write_poses(bad, with_value(POSITION, (0, 0), math.inf), YAW),
            [PKL, "position", "0, 0", "inf"]),
    "yaw -inf": (lambda bad: write_poses(bad, POSITION, with_value(YAW, 19, -math.inf)), [PKL, "yaw", "19", "-inf"]),
    "NaN in JSON": (lambda bad: write_json(bad, as_json(POSITION, with_value(YAW, 3, math.nan))),
                    [JSON, "yaw", "3", "nan"]),
    "a glitch": (lambda bad: write_poses(bad, with_value(POSITION, (7, 1), -1.01e8), YAW),
                 [PKL, "position", "7, 1", "-101000000.0", "1e+08"]),
    # frames and poses
    "one frame too few": (lambda bad: (bad / "19.png").unlink(), ["bad", "19 frames", "20 poses", "traj_data.pkl"]),
    "one frame too many": (lambda bad: write_frame(bad / "20.png", 0, 20), ["bad", "21 frames", "20 poses"]),
    "no frames": (lambda bad: [path.unlink() for path in bad.glob("*.png")], ["bad", "no frames"]),
    "a missing number": (lambda bad: (bad / "7.png").unlink(), ["bad", "frame 7 ", "missing"]),
    "missing though the count is right": (lambda bad: (bad / "7.png").rename(bad / "20.png"), ["bad", "frame 7 "]),
    "counting from 2": (lambda bad: rename_frames(bad, lambda n: f"{n + 2:02d}.png"), ["bad", "02.png"]),
    "a number twice": (lambda bad: write_frame(bad / "7.jpg", 0, 7), ["bad", "7.jpg", "7.png", "frame 7"]),
    "a number twice, padded": (lambda bad: (bad / "8.png").rename(bad / "07.png"), ["bad", "07.png", "frame 7"]),
    "a frame that is a folder": (lambda bad: replace_by(bad / "7.png", Path.mkdir), ["bad/7.png"]),
    "a frame that links nowhere": (lambda bad: replace_by(bad / "7.png", lambda p: p.symlink_to("gone")),
                                   ["bad/7.png"]),
    "a frame that links to itself": (lambda bad: replace_by(bad / "7.png", lambda p: p.symlink_to(p)), ["bad/7.png"]),
    "a frame that is a pipe": (lambda bad: replace_by(bad / "7.png", os.mkfifo), ["bad/7.png"]),
    # movement
    "standing still": (lambda bad: write_poses(bad, np.ones((COUNT, 2)), YAW), ["bad", "movement", "0 m", "0.3"]),
    "hardly moving": (lambda bad: write_poses(bad, Q, YAW), ["bad", "movement", "0.148 m", "0.3"]),
    "nothing but jumps": (lambda bad: write_poses(bad, POSITION * 100, YAW), ["bad", "movement", "0.3"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAILURES)
def test_a_fault_fails_its_trajectory_alone_with_a_reason_that_names_it(
    data: Path, run_data: Callable, fault: str
) -> None:
    break_it, named = FAILURES[fault]
    break_it(make_trajectory(data / "bad", COUNT, stamp=1))
    make_trajectory(data / "good", COUNT, stamp=2)
    outcome = run_data()
    assert outcome.code == 1
    progress = read_progress(data.parent / "cache")
    assert progress["completed_trajectories"] == ["good"]
    assert progress["failed_trajectories"] == ["bad"]
    reason = progress["failures"]["bad"]["reason"]
    assert [word for word in named if word not in reason] == [], reason
    assert reason in outcome.err
    assert check_stamps(data.parent / "cache", "good", 2) >= COUNT
    assert not (data.parent / "cache" / "bad").exists()


@pytest.mark.parametrize(("least_m", "code"), [(4.75, 0), (math.nextafter(4.75, 9), 1), (math.nextafter(4.75, 0), 0)])
def test_moving_exactly_the_minimum_is_enough(data: Path, run_data: Callable, least_m: float, code: int) -> None:
    make_trajectory(data / "t")  # 19 steps of 0.25 m
    make_trajectory(data / "far", position=straight_line(COUNT, 0.5))
    outcome = run_data(min_chunk_distance_m=least_m, max_chunk_distance_m=9.0)
    assert outcome.code == code, outcome.err
    assert read_progress(data.parent / "cache")["failed_trajectories"] == ["t"] * code


RESERVED = [
    *("progress.json", "progress.json.bak", "progress.json.reset-20220110-153045/t", "Progress.JSON", "dino_cache.log"),
    *(".lock", ".lock.owner", ".staging", ".staging/t"),
]


@pytest.mark.parametrize("name", RESERVED)
def test_a_name_that_collides_with_the_caches_own_files_fails(data: Path, run_data: Callable, name: str) -> None:
    make_trajectory(data / "good", COUNT, stamp=2)
    make_trajectory(data / "nested" / "good", COUNT, stamp=3)
    make_trajectory(data / name)
    assert run_data().code == 1
    progress = read_progress(data.parent / "cache")
    assert sorted(progress["completed_trajectories"]) == ["good", "nested/good"]
    assert list(progress["failures"]) == [name]
    assert name in progress["failures"][name]["reason"]


@pytest.mark.parametrize("name", ["progress.jsonl", ".lockers/t", "dino_cache.log2", "a/progress.json", "t.tmp"])
def test_a_name_that_only_resembles_the_caches_own_files_is_fine(data: Path, run_data: Callable, name: str) -> None:
    make_trajectory(data / name, COUNT, stamp=2)
    assert run_data().code == 0
    os.utime(data / name / "traj_data.pkl", (1, 1))
    assert run_data().code == 0  # nor does a later run's tidying touch it
    assert check_stamps(data.parent / "cache", name, 2) >= COUNT


def make_or_skip(folder: Path) -> Path:
    try:
        return make_trajectory(folder, COUNT)
    except OSError:
        pytest.skip("this filesystem takes no such name")


def test_a_name_that_is_not_utf8_fails_and_can_be_recorded(data: Path, run_data: Callable) -> None:
    make_trajectory(data / "good", COUNT, stamp=2)
    make_or_skip(data / NOT_UTF8)
    assert run_data().code == 1
    progress = read_progress(data.parent / "cache")
    assert progress["completed_trajectories"] == ["good"]
    (name,) = progress["failed_trajectories"]
    assert name.startswith("caf")
    assert "UTF-8" in progress["failures"][name]["reason"]


def test_a_frames_name_that_is_not_utf8_fails_at_most_its_trajectory(data: Path, run_data: Callable) -> None:
    make_trajectory(data / "good", COUNT, stamp=2)
    rename_frames(make_trajectory(data / "bad", COUNT), lambda n: f"{NOT_UTF8}_{n}.png")
    rename_frames(data / "good", lambda n: f"_{n}.png")
    os.truncate(data / "bad" / f"{NOT_UTF8}_7.png", 40)
    assert run_data(frame_pattern=r".*_(\d+)\.png").code == 1
    progress = read_progress(data.parent / "cache")
    assert progress["completed_trajectories"] == ["good"]
    assert list(progress["failures"]) == ["bad"]
    assert "_7.png" in progress["failures"]["bad"]["reason"]


@pytest.mark.parametrize("kind", ["stat", "content"])
def test_a_pipe_in_the_pose_files_place_fails_without_waiting_on_it(tmp_path: Path, kind: str) -> None:
    folder = make_trajectory(tmp_path / "t", 3)
    replace_by(folder / "traj_data.pkl", os.mkfifo)
    with no_hang(), pytest.raises(InputError, match=r"traj_data\.pkl: not a regular file"):
        read_poses(folder / "traj_data.pkl", "t")
    with no_hang(), pytest.raises(InputError, match=r"traj_data\.pkl: not a regular file"):
        checksum(folder, kind)


def test_files_without_permission_fail_their_trajectories_alone(data: Path, run_data: Callable) -> None:
    for name in ("good", "poses", "frame", "folder"):
        make_trajectory(data / name)
    (data / "poses" / "traj_data.pkl").chmod(0)
    (data / "frame" / "7.png").chmod(0)
    (data / "folder").chmod(0)
    if os.access(data / "poses" / "traj_data.pkl", os.R_OK):
        pytest.skip("root may read everything")
    outcome = run_data()
    (data / "folder").chmod(0o755)
    assert outcome.code == 1
    progress = read_progress(data.parent / "cache")
    assert progress["completed_trajectories"] == ["good"]
    assert sorted(progress["failures"]) == ["folder", "frame", "poses"]
    assert "7.png" in progress["failures"]["frame"]["reason"]


# ---------------------------------------------------------------------------------------------------------------------
# Pose pickles come from strangers: nothing but numbers is built from them, and nothing is executed.
# ---------------------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`; unpickling makes it."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


class WithState:
    """Pickles as an object of a harmless class whose state is a call."""

    def __init__(self, state: Any):
        self.state = state

    def __reduce__(self) -> tuple:
        return np.dtype, ("f8",), self.state


def attacks(marker: str) -> dict[str, bytes]:
    """Pickles that make the folder `marker` when they are loaded without care."""
    command, code = f"mkdir '{marker}'", f"__import__('os').mkdir({marker!r})"
    text = marker.encode()
    position = {"position": POSITION.tolist(), "yaw": YAW.tolist()}
    return {
        **{f"protocol {p}": pickle.dumps({**position, "x": Call(os.mkdir, marker)}, protocol=p) for p in range(6)},
        "os.system": pickle.dumps({**position, "x": Call(os.system, command)}),
        "subprocess": pickle.dumps({"position": Call(subprocess.check_call, ["mkdir", marker])}),
        "eval": pickle.dumps({"yaw": Call(eval, code)}),
        "exec": pickle.dumps(Call(exec, code)),
        "numpy that runs code": (
            b"\x80\x02cnumpy.testing._private.utils\nrunstring\n"
            + b"X" + struct.pack("<I", len(code)) + code.encode() + b"}\x86R."
        ),
        "pickle in a pickle": pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.mkdir, marker)))),
        "getattr": b"cbuiltins\ngetattr\n(cposixpath\nos\nVmkdir\ntR(V" + text + b"\ntR.",
        "dotted name": b"\x80\x04\x8c\x09posixpath\x8c\x08os.mkdir\x93\x8c" + bytes([len(text)]) + text + b"\x85R.",
        "INST": b"(V" + text + b"\niposix\nmkdir\n.",
        "OBJ": b"(cposix\nmkdir\nV" + text + b"\no.",
        "state of a dtype": pickle.dumps(WithState((3, "<", None, None, None, -1, -1, Call(os.mkdir, marker)))),
    }  # fmt: skip


ATTACKS = list(attacks("/tmp/marker"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_pickle_fails_its_trajectory_and_executes_nothing(
    data: Path, tmp_path: Path, run_data: Callable, attack: str
) -> None:
    marker = tmp_path / "marker"
    pickled = attacks(str(marker))[attack]
    with contextlib.suppress(TypeError):  # some do their work and then fail
        pickle.loads(pickled)
    assert marker.is_dir(), "this attack would not work on anyone"
    marker.rmdir()

    make_trajectory(data / "good", COUNT, stamp=2)
    (make_trajectory(data / "bad") / "traj_data.pkl").write_bytes(pickled)
    outcome = run_data()
    assert not marker.exists()
    assert outcome.code == 1
    progress = read_progress(data.parent / "cache")
    assert progress["completed_trajectories"] == ["good"]
    assert PKL in progress["failures"]["bad"]["reason"]


def test_objects_in_an_npz_are_not_unpickled(data: Path, tmp_path: Path, run_data: Callable) -> None:
    marker = tmp_path / "marker"
    make_trajectory(data / "good", COUNT, stamp=2)
    folder = make_trajectory(data / "bad")
    write_npz(folder, position=np.array([Call(os.mkdir, str(marker))], dtype=object), yaw=YAW)
    np.load(folder / "traj_data.npz", allow_pickle=True)["position"]
    marker.rmdir()
    assert run_data().code == 1
    assert not marker.exists()
    assert "bad/traj_data.npz" in read_progress(data.parent / "cache")["failures"]["bad"]["reason"]


def forged_pointers() -> bytes:
    """A float64 pickle whose shape is an array of Python objects at an address of the writer's choice.

    A dtype's pickled state holds its flags. With those of `object` cleared, an array of it is filled from raw bytes.
    """
    address = b"\x8e" + struct.pack("<Q", 8) + b"A" * 8
    flagless_objects = (
        b"cnumpy\ndtype\n(X\x01\0\0\0O\x89\x88tR(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    shape = (
        b"cnumpy.core.multiarray\n_reconstruct\n(NK\0NtR(K\x01(K\x01t" + flagless_objects + b"\x89" + address + b"tb"
    )
    numbers = b"cnumpy.core.numeric\n_frombuffer\n(C\x08AAAAAAAAX\x02\0\0\0f8" + shape + b"X\x01\0\0\0CtR"
    return b"\x80\x04}X\x08\0\0\0position" + numbers + b"s."


def deep_key() -> bytes:
    """A key that is a tuple in a tuple in a tuple, too deep to print."""
    return b"\x80\x04})" + b"\x85" * 5000 + b"K\x01s."


# In a process of its own: the worst of them brings a careless reader down.
READ_POSES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import dino_cache
try:
    dino_cache.read_poses(Path(sys.argv[2]), "bad")
except dino_cache.InputError as error:
    print("InputError:", error)
"""


@pytest.mark.parametrize("make", [forged_pointers, deep_key], ids=lambda make: make.__name__)
def test_a_forged_pickle_is_an_input_error_and_no_crash(tmp_path: Path, make: Callable[[], bytes]) -> None:
    path = tmp_path / "traj_data.pkl"
    path.write_bytes(make())
    command = [sys.executable, "-c", READ_POSES, str(ROOT), str(path)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith(f"InputError: {PKL}")


# ---------------------------------------------------------------------------------------------------------------------
# Checksums: when a trajectory's data counts as changed.
# ---------------------------------------------------------------------------------------------------------------------


def checksum(folder: Path, kind: str) -> str:
    return trajectory_checksum(list_trajectory(Trajectory("t", folder), FRAME_PATTERN), kind)


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("change", "seen_by_stat", "seen_by_content"),
    [
        pytest.param(lambda t: [os.utime(path, (1, 1)) for path in t.iterdir()], False, False, id="touched"),
        pytest.param(lambda t: (t / "notes.txt").write_text("x"), False, False, id="another file"),
        pytest.param(lambda t: (t / "diff_3.jpg").write_text("x"), False, False, id="a stray image"),
        pytest.param(lambda t: flip_last_byte(t / "3.png"), False, True, id="a frame's bytes, not its size"),
        pytest.param(lambda t: append(t / "3.png"), True, True, id="a frame's size"),
        pytest.param(lambda t: (t / "3.png").rename(t / "3.jpg"), True, True, id="a frame's name"),
        pytest.param(lambda t: (t / "4.png").unlink(), True, True, id="a frame less"),
        pytest.param(lambda t: shutil.copy(t / "4.png", t / "5.png"), True, True, id="a frame more"),
        pytest.param(lambda t: flip_last_byte(t / "traj_data.pkl"), True, True, id="the poses' bytes, not their size"),
        pytest.param(lambda t: append(t / "traj_data.pkl"), True, True, id="the poses' size"),
    ],
)
def test_a_change_is_seen_by_the_checksum(
    tmp_path: Path, change: Callable[[Path], object], seen_by_stat: bool, seen_by_content: bool
) -> None:
    folder = make_trajectory(tmp_path / "t", 5)
    before = checksum(folder, "stat"), checksum(folder, "content")
    change(folder)
    assert (checksum(folder, "stat") != before[0], checksum(folder, "content") != before[1]) == (
        seen_by_stat, seen_by_content,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["stat", "content"])
def test_a_checksum_is_16_hex_digits_and_the_same_for_a_copy(tmp_path: Path, kind: str) -> None:
    folder = make_trajectory(tmp_path / "t", 5)
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "u")
    assert re.fullmatch("[0-9a-f]{16}", checksum(folder, kind))
    assert checksum(copy, kind) == checksum(folder, kind)


@pytest.mark.parametrize(
    ("kind", "change", "redone"),
    [
        ("stat", lambda frame: os.utime(frame, (1, 1)), 0),
        ("stat", flip_last_byte, 0),
        ("stat", append, 1),
        ("content", lambda frame: os.utime(frame, (1, 1)), 0),
        ("content", flip_last_byte, 1),
    ],
)
def test_a_frame_that_frame_stride_skips_counts_too(
    data: Path, run_data: Callable, encoders: list, kind: str, change: Callable[[Path], object], redone: int
) -> None:
    folder = make_trajectory(data / "t", COUNT, stamp=4)
    assert run_data(checksum=kind, frame_stride=2).code == 0
    change(folder / "3.png")
    outcome = run_data(checksum=kind, frame_stride=2)
    assert outcome.code == 0, outcome.err
    assert len(encoders) == 1 + redone
    assert ("Redoing t: its data changed" in outcome.err) == bool(redone)
    assert check_stamps(data.parent / "cache", "t", 4, frame_stride=2) >= COUNT // 2
