"""Pictures with a file of poses, in every layout, against the GNM folder of the same trajectory."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from formats_support import cache, chunks

import dino_cache
from dino_cache import CacheSpec, DataKeys, Hooks, InputError, Poses, format_named, open_source
from support import (
    FIRST,
    REAL,
    SECOND,
    BitEncoder,
    Outcome,
    Rendered,
    check_stamps,
    encoded,
    read_progress,
    stream_results,
    write_gnm,
)

HZ = 10
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real recordings are not in {REAL}")


class Drive(NamedTuple):
    """A trajectory to be written in some layout; `pictures` are the bytes of image files."""

    name: str
    position: np.ndarray
    yaw: np.ndarray
    pictures: list[bytes]
    ending: str

    @property
    def count(self) -> int:
        return len(self.yaw)

    @property
    def height(self) -> np.ndarray:
        return np.sin(np.arange(self.count) / 9) * 0.1


def drive_of(trajectory: Rendered) -> Drive:
    pictures = [encoded(frame, "PNG") for frame in trajectory.frames]
    return Drive(f"t{trajectory.stamp}", trajectory.position, trajectory.yaw, pictures, ".png")


def turn(axis: str, angle: float) -> np.ndarray:
    """(3, 3): a right-hand turn about an axis."""
    c, s = np.cos(angle), np.sin(angle)
    rows = {"x": [[1, 0, 0], [0, c, -s], [0, s, c]], "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
            "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]]}  # fmt: skip
    return np.array(rows[axis])


def quaternion(matrix: np.ndarray) -> list[float]:
    """x, y, z, w of a rotation: the eigenvector by Bar-Itzhack, as no formula under test."""
    (a, b, c), (d, e, f), (g, h, i) = matrix
    k = np.array([[a - e - i, b + d, c + g, h - f], [b + d, e - a - i, f + h, c - g],
                  [c + g, f + h, i - a - e, d - b], [h - f, c - g, d - b, a + e + i]]) / 3  # fmt: skip
    return np.linalg.eigh(k)[1][:, -1].tolist()


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def table(rows: Any, separator: str = " ", head: str = "") -> str:
    lines = (separator.join(cell if isinstance(cell, str) else repr(float(cell)) for cell in row) for row in rows)
    return "".join(f"{line}\n" for line in [*([head] if head else []), *lines])


# ---------------------------------------------------------------------------------------------------------------------
# Writers
# ---------------------------------------------------------------------------------------------------------------------


def write_kitti(data: Path, drives: list[Drive]) -> list[str]:
    """World axes of the first camera: x right, y down, z forward."""
    for number, drive in enumerate(drives):
        folder = data / f"sequences/{number:02d}"
        for row, picture in enumerate(drive.pictures):
            put(folder / f"image_2/{row:06d}{drive.ending}", picture)
        put(folder / "times.txt", table([[row / HZ] for row in range(drive.count)]))
        rows = []
        for (x, y), up, yaw in zip(drive.position, drive.height, drive.yaw):
            pose = np.column_stack([turn("y", -yaw) @ turn("x", 0.1), [-y, -up, x]])  # looking 0.1 rad up
            rows.append(pose.reshape(-1))
        put(data / f"poses/{number:02d}.txt", table(rows))
    return [f"{number:02d}" for number in range(len(drives))]


def write_tum(data: Path, drives: list[Drive]) -> list[str]:
    for drive in drives:
        folder, stamps = data / drive.name, [f"{1305031102 + row / HZ:.6f}" for row in range(drive.count)]
        for stamp, picture in zip(stamps, drive.pictures):
            put(folder / f"rgb/{stamp}{drive.ending}", picture)
        rows = [[stamp, f"rgb/{stamp}{drive.ending}"] for stamp in stamps]
        put(folder / "rgb.txt", "# color images\n# file: 'x.bag'\n# timestamp filename\n" + table(rows))
        rows = [[stamp, *pose] for stamp, pose in zip(stamps, xyz_and_quaternions(drive))]
        put(folder / "groundtruth.txt", "# ground truth\n# timestamp tx ty tz qx qy qz qw\n" + table(rows))
    return [drive.name for drive in drives]


def xyz_and_quaternions(drive: Drive) -> list[list[float]]:
    return [
        [x, y, up, 0.0, 0.0, np.sin(yaw / 2), np.cos(yaw / 2)]
        for (x, y), up, yaw in zip(drive.position, drive.height, drive.yaw)
    ]


T_BS = """#Default imu sensor yaml file
sensor_type: camera

# Sensor extrinsics wrt. the body-frame.
T_BS:
  cols: 4
  rows: 4
  data: [0.0, -1.0, 0.0, -0.02,
         1.0, 0.0, 0.0, -0.06,
         0.0, 0.0, 1.0, 0.01,  # z of the camera is z of the body
         0.0, 0.0, 0.0, 1.0]
rate_hz: 20
"""
EUROC_HEAD = (
    "#timestamp, p_RS_R_x [m], p_RS_R_y [m], p_RS_R_z [m], q_RS_w [], q_RS_x [], q_RS_y [], q_RS_z [], "
    "v_RS_R_x [m s^-1]"
)


def write_euroc(
    data: Path, drives: list[Drive], *, sensor: str | None = T_BS, body: np.ndarray | None = None, poses: str = "csv"
) -> list[str]:
    """`body`: axes of a body that looks along the world's x, by columns; EuRoC's has x up, y right, z forward."""
    body = np.array([[0, 0, 1], [0, -1, 0], [1, 0, 0]]) if body is None else body
    for drive in drives:
        folder = data / drive.name / "mav0"
        stamps = [1403636579763555584 + row * 10**9 // HZ for row in range(drive.count)]
        for stamp, picture in zip(stamps, drive.pictures):
            put(folder / f"cam0/data/{stamp}{drive.ending}", picture)
        lines = [f"{stamp},{stamp}{drive.ending}\r\n" for stamp in stamps]
        put(folder / "cam0/data.csv", "#timestamp [ns],filename\r\n" + "".join(lines))
        if sensor is not None:
            put(folder / "cam0/sensor.yaml", sensor)
        lines, tum = [EUROC_HEAD], []
        for stamp, (x, y), up, yaw in zip(stamps, drive.position, drive.height, drive.yaw):
            qx, qy, qz, qw = quaternion(turn("z", yaw) @ body)
            lines.append(f"{stamp},{x!r},{y!r},{up!r},{qw!r},{qx!r},{qy!r},{qz!r},0.0")
            tum.append(f"{stamp / 1e9:.9f} {x!r} {y!r} {up!r} {qx!r} {qy!r} {qz!r} {qw!r}")
        lines, tum = ([line.replace("np.float64(", "").replace(")", "") for line in text] for text in (lines, tum))
        if poses == "csv":
            put(folder / "state_groundtruth_estimate0/data.csv", "\n".join(lines) + "\n")
        else:
            put(data / drive.name / "groundtruth.txt", "\n".join(tum) + "\n")
    return [drive.name for drive in drives]


def write_tartanair(data: Path, drives: list[Drive]) -> list[str]:
    """x north, y east, z down."""
    for drive in drives:
        folder = data / "office/Easy" / drive.name
        for row, picture in enumerate(drive.pictures):
            put(folder / f"image_left/{row:06d}_left{drive.ending}", picture)
            put(folder / f"depth_left/{row:06d}_left_depth.npy", b"")
        rows = [
            [x, -y, -up, *quaternion(turn("z", -yaw) @ turn("y", 0.1))]  # looking 0.1 rad up
            for (x, y), up, yaw in zip(drive.position, drive.height, drive.yaw)
        ]
        put(folder / "pose_left.txt", table(rows))
    return [f"office/Easy/{drive.name}" for drive in drives]


def write_tartandrive(data: Path, drives: list[Drive]) -> list[str]:
    for drive in drives:
        folder = data / drive.name
        for row, picture in enumerate(drive.pictures):
            put(folder / f"image_left/{row:06d}{drive.ending}", picture)
        (folder / "odom").mkdir()
        poses = np.concatenate([xyz_and_quaternions(drive), np.ones((drive.count, 6))], axis=1)
        np.save(folder / "odom/odometry.npy", poses)
        put(folder / "timestamps.txt", table([[1e9 + row / HZ] for row in range(drive.count)]))
    return [drive.name for drive in drives]


def write_custom(data: Path, drives: list[Drive], *, header: str = "timestamp,x,y,yaw", subfolder: str = "images/"):
    """images/ beside poses.csv, at any depth."""
    for drive in drives:
        folder = data / "robot/monday" / drive.name
        for row, picture in enumerate(drive.pictures):
            put(folder / f"{subfolder}{row}{drive.ending}", picture)
        rows = [[row / HZ, *drive.position[row], drive.yaw[row]] for row in range(drive.count)]
        put(folder / "poses.csv", table(rows, ",", header))
    return [f"robot/monday/{drive.name}" for drive in drives]


WRITERS: dict[str, Callable[[Path, list[Drive]], list[str]]] = {
    "kitti": write_kitti,
    "tum": write_tum,
    "euroc": write_euroc,
    "euroc without sensor.yaml": lambda data, drives: write_euroc(data, drives, sensor=None),
    "euroc, body x forward": lambda data, drives: write_euroc(data, drives, sensor=None, body=np.eye(3)),
    "euroc with a tum file": lambda data, drives: write_euroc(data, drives, poses="tum"),
    "tartanair": write_tartanair,
    "tartandrive": write_tartandrive,
    "custom": write_custom,
    "custom, pictures in the folder": lambda data, drives: write_custom(data, drives, subfolder=""),
}
LAYOUT_OF = {kind: kind.partition(",")[0].partition(" ")[0] for kind in WRITERS}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Kind -> (data folder, names) of FIRST and SECOND."""
    root = tmp_path_factory.mktemp("frames")
    drives = [drive_of(FIRST), drive_of(SECOND)]
    written = {kind: (root / kind, write(root / kind, drives)) for kind, write in WRITERS.items()}
    return written | {"gnm": (root / "gnm", write_gnm(root / "gnm", [FIRST, SECOND]))}


def frames_cache(data: Path, cache_dir: Path, **settings: Any) -> dict[str, Any]:
    how = {"resize": "stretch", "format": "frames", **settings}
    return {result.name: result for result in stream_results(data, cache_dir, BitEncoder(), **how)}


def check_alike(cache_dir: Path, name: str, gnm: Path, gnm_name: str, tolerance: float) -> None:
    expected, found = chunks(gnm, gnm_name), chunks(cache_dir, name)
    assert len(expected) > 1
    assert [span for span, _ in found] == [span for span, _ in expected]
    for (_, right), (_, datasets) in zip(expected, found):
        np.testing.assert_array_equal(datasets["frame_index"], right["frame_index"])
        for key in ("position", "travelled_distance"):
            np.testing.assert_allclose(datasets[key], right[key], rtol=0, atol=tolerance)
        apart = np.angle(np.exp(1j * (datasets["yaw"] - right["yaw"])))
        np.testing.assert_allclose(apart, 0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Every layout gives what the GNM folder gives
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_stride", [1, 3])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_layout_gives_the_chunks_that_the_gnm_folder_gives(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]], kind: str, frame_stride: int
) -> None:
    cache(written["gnm"][0], tmp_path / "gnm", "gnm", frame_stride=frame_stride)
    data, names = written[kind]
    results = frames_cache(data, tmp_path / "cache", frame_stride=frame_stride)
    assert {name: str(result.error) for name, result in results.items()} == dict.fromkeys(names, "None")
    for trajectory, name in zip((FIRST, SECOND), names):
        check_alike(tmp_path / "cache", name, tmp_path / "gnm", f"t{trajectory.stamp}", 1e-9)
        assert check_stamps(tmp_path / "cache", name, trajectory.stamp, frame_stride) > trajectory.count / frame_stride


@pytest.mark.parametrize("kind", WRITERS)
def test_frames_and_poses_belong_together_after_a_stop_and_a_resume(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]], kind: str
) -> None:
    (data, names), done = written[kind], []
    hooks = Hooks(should_stop=lambda: sum(done) >= 56, on_encoded=done.append)  # in the second trajectory
    how = {"resize": "stretch", "format": "frames"}
    first = [result.name for result in stream_results(data, tmp_path / "cache", BitEncoder(), hooks=hooks, **how)]
    assert first == names[:1]
    rest = [result.name for result in stream_results(data, tmp_path / "cache", BitEncoder(), skip=first, **how)]
    assert rest == names[1:]
    for trajectory, name in zip((FIRST, SECOND), names):
        assert check_stamps(tmp_path / "cache", name, trajectory.stamp) >= trajectory.count


@pytest.mark.parametrize("kind", WRITERS)
def test_auto_knows_the_layout_says_it_and_a_second_run_has_nothing_to_do(
    run_bits: Callable[..., Outcome], tmp_path: Path, written: dict[str, tuple[Path, list[str]]], kind: str
) -> None:
    shutil.copytree(written[kind][0], tmp_path / "data")
    for count in (1, 2):
        outcome = run_bits()
        assert outcome.code == 0, outcome.err
        assert "robot: format frames (" in outcome.out
        assert f"layout {LAYOUT_OF[kind]} (guessed by " in outcome.out
        assert ("Encoding with" in outcome.out) == (count == 1)
    assert sorted(read_progress(tmp_path / "cache")["completed_trajectories"]) == sorted(written[kind][1])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_trajectory_is_located_as_it_was_found(written: dict[str, tuple[Path, list[str]]], kind: str) -> None:
    (data, names), kind = written[kind], format_named("frames")
    found = list(kind.find(data, CacheSpec()))
    assert [one.name for one in found] == names
    assert [kind.locate(data, name) for name in names] == found
    assert [pickle.loads(pickle.dumps(one)) for one in found] == found
    with pytest.raises(InputError, match="nothing"):
        kind.locate(data, "nothing")


REAL_DRIVES = [
    ("gopro_karma_drone", "flight_10hz"), ("gopro_max_walk", "walk_5hz"), ("hololens_walk", "walk_i000_120"),
]  # fmt: skip


@needs_real
@pytest.mark.parametrize("kind", WRITERS)
def test_real_trajectories_agree_with_their_gnm_folders(tmp_path: Path, kind: str) -> None:
    for dataset, name in REAL_DRIVES:
        folder = REAL / dataset / name
        poses = pickle.loads((folder / "traj_data.pkl").read_bytes())
        yaw = np.asarray(poses["yaw"], np.float64).reshape(-1)
        pictures = [(folder / f"{row}.jpg").read_bytes() for row in range(len(yaw))]
        position = np.asarray(poses["position"], np.float64)[:, :2]
        data = tmp_path / dataset
        (found,) = WRITERS[kind](data, [Drive(name, position, yaw, pictures, ".jpg")])
        (trajectory,) = format_named("frames").find(data, CacheSpec())
        assert trajectory.name == found
        source = open_source(trajectory, DataKeys())
        read = source.poses(required=True)
        assert read.frame_index.tolist() == list(range(len(yaw)))
        np.testing.assert_allclose(read.position, position, rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.angle(np.exp(1j * (read.yaw - yaw))), 0, atol=1e-6)
        reader = source.open_frames(read.frame_index)
        assert [data.tobytes() for data in reader.read(read.frame_index.tolist())] == pictures


# ---------------------------------------------------------------------------------------------------------------------
# Custom: tables of all kinds
# ---------------------------------------------------------------------------------------------------------------------

COUNT = 12
DRIVE = drive_of(Rendered(3, COUNT))._replace(name="t3")
ROWS = np.column_stack([np.arange(COUNT) / HZ, DRIVE.position, DRIVE.yaw])  # timestamp, x, y, yaw


def custom_folder(root: Path, drive: Drive = DRIVE, subfolder: str = "images/") -> Path:
    """A trajectory's folder with pictures alone."""
    for row, picture in enumerate(drive.pictures):
        put(root / f"{drive.name}/{subfolder}{row}{drive.ending}", picture)
    return root / drive.name


def read(root: Path, **settings: Any) -> Poses:
    """The poses of the only trajectory."""
    spec = CacheSpec(**settings)
    (trajectory,) = format_named("frames").find(root, spec)
    return open_source(trajectory, dino_cache.data_keys(spec)).poses(required=True)


def check_drive(poses: Poses, rows: slice = slice(None)) -> None:
    np.testing.assert_allclose(poses.position, DRIVE.position[rows], atol=1e-9)
    np.testing.assert_allclose(poses.yaw, DRIVE.yaw[rows], atol=1e-9)


QUATERNIONS = np.array(xyz_and_quaternions(DRIVE))
TEXTS: dict[str, tuple[str, str, dict[str, Any]]] = {  # what is odd -> file name, content, settings
    "names": ("poses.csv", table(ROWS, ",", "timestamp,x,y,yaw"), {}),
    "capitals": ("Poses.CSV", table(ROWS, ",", "TIMESTAMP,X,Y,Heading"), {}),
    "byte order mark, CRLF": ("poses.csv", "\ufeff" + table(ROWS, ",", "t,x,y,yaw").replace("\n", "\r\n"), {}),
    "tabs": ("poses.txt", table(ROWS, "\t", "t\tx\ty\tyaw"), {}),
    "semicolons": ("poses.csv", table(ROWS, ";", "t;x;y;yaw"), {}),
    "trailing commas": ("poses.csv", table(ROWS, ",", "t,x,y,yaw").replace("\n", ",\n"), {}),
    "comments": ("poses.csv", "# a\n\n" + table(ROWS, ",", "t,x,y,yaw") + "# the end\n", {}),
    "names in a comment": ("poses.txt", table(ROWS[:, 1:], " ", "# x y yaw"), {}),
    "named": ("poses.csv", table(ROWS, ",", "t,pos_x,pos_y,angle"), {"pose_columns": {"yaw": "angle"}}),
    "other columns": ("poses.csv", table(ROWS, ",", "x,px,py,h"),
                      {"pose_columns": {"timestamp": "x", "x": "px", "y": "py", "yaw": "h"}}),
    "by number": ("poses.txt", table(ROWS), {"pose_columns": {"x": 1, "y": 2, "yaw": 3}}),
    "tum": ("poses.txt", table(np.column_stack([ROWS[:, 0], QUATERNIONS])), {}),
    "without times": ("pose.tum", table(QUATERNIONS), {}),
    "not of norm 1": ("poses.txt", table(QUATERNIONS * [1, 1, 1, 3, 3, 3, 3]), {}),
    "degrees": ("odom.csv", table(ROWS * [1, 100, 100, 180 / np.pi], ",", "t,x_cm,y_cm,yaw_deg"),
                {"yaw_unit": "degrees"}),
    "another name": ("slam/final.csv", table(ROWS, ",", "t,x,y,yaw"), {"pose_file": "slam/final.csv"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_tables_of_all_kinds_are_read(tmp_path: Path, kind: str) -> None:
    name, content, settings = TEXTS[kind]
    put(custom_folder(tmp_path) / name, content)
    if kind == "degrees":
        with pytest.raises(InputError, match=r"x_cm is in cm by its name.* set position_scale: 0.01"):
            read(tmp_path, **settings)
        poses = read(tmp_path, position_scale=0.01, **settings)
        check_drive(poses._replace(position=poses.position * 0.01))
        return
    poses = read(tmp_path, **settings)
    check_drive(poses)
    if kind == "names":
        np.testing.assert_allclose(poses.times, ROWS[:, 0])


MATRICES = np.zeros((COUNT, 4, 4))
MATRICES[:, :3, :3] = [turn("z", yaw) for yaw in DRIVE.yaw]
MATRICES[:, :2, 3], MATRICES[:, 3, 3] = DRIVE.position, 1
NAMED = np.rec.fromarrays(ROWS.T, names="timestamp,x,y,yaw")
ARRAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "7 columns": (QUATERNIONS, {}),
    "8 columns, float32": (np.column_stack([ROWS[:, 0], QUATERNIONS]).astype(np.float32), {}),
    "4x4": (MATRICES, {}),
    "3x4": (MATRICES[:, :3], {}),
    "16 columns": (MATRICES.reshape(-1, 16), {}),
    "structured": (NAMED, {}),
    "by number": (ROWS, {"pose_columns": {"x": 1, "y": 2, "yaw": 3, "timestamp": 0}}),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_all_kinds_are_read(tmp_path: Path, kind: str) -> None:
    array, settings = ARRAYS[kind]
    folder = custom_folder(tmp_path)
    np.save(folder / "poses.npy", array)
    tolerance = 1e-6 if "float32" in kind else 1e-9
    poses = read(tmp_path, **settings)
    np.testing.assert_allclose(poses.position, DRIVE.position, atol=tolerance)
    np.testing.assert_allclose(poses.yaw, DRIVE.yaw, atol=tolerance)


@pytest.mark.parametrize(
    ("arrays", "settings"),
    [
        ({"position": DRIVE.position, "yaw": DRIVE.yaw}, {}),
        ({"position": np.column_stack([DRIVE.position, DRIVE.height]), "yaw": DRIVE.yaw[:, None]}, {}),
        ({"p": DRIVE.position, "h": DRIVE.yaw}, {"pose_columns": {"x": "p[0]", "y": "p[1]", "yaw": "h"}}),
        ({"T_world": MATRICES}, {}),
    ],
)
def test_archives_of_arrays_are_read(tmp_path: Path, arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    np.savez(custom_folder(tmp_path) / "poses.npz", **arrays)
    check_drive(read(tmp_path, **settings))


MIRRORED = MATRICES[:, :3] * [[[1], [-1], [1]]]
CLAIM = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999, 99)}".ljust(118)
FAULTS: dict[str, tuple[str, str | bytes, dict[str, Any], list[str]]] = {
    "decimal commas, semicolons": ("poses.csv", table(ROWS, ";", "t;x;y;yaw").replace(".", ","), {}, ["decimal comma"]),
    "decimal commas, blanks": ("poses.txt", table(QUATERNIONS).replace(".", ","), {}, ["decimal comma"]),
    "decimal commas, commas": ("poses.csv", table(ROWS, ",", "t,x,y,yaw").replace(".", ","), {}, ["decimal commas"]),
    "nan": ("poses.csv", table(ROWS, ",", "t,x,y,yaw").replace("0.5", "nan", 1), {}, ["x[2] is nan"]),
    "one row less": ("poses.csv", table(ROWS[1:], ",", "t,x,y,yaw"), {},
                     ["12 pictures", "11 poses", "pose_match: time"]),
    "one row less, no times": ("poses.csv", table(ROWS[1:, 1:], ",", "x,y,yaw"), {}, ["12 pictures", "11 poses"]),
    "times": ("poses.csv", table(ROWS[[0, 2, 1, *range(3, 12)]], ",", "t,x,y,yaw"), {}, ["do not rise: row 2"]),
    "quaternion 0": ("poses.txt", table(QUATERNIONS * [1, 1, 1, 0, 0, 0, 0]), {}, ["quaternion 0"]),
    "no yaw": ("poses.csv", table(ROWS[:, :3], ",", "t,x,y"), {}, ["no column yaw", "qw", "pose_columns"]),
    "no names": ("poses.csv", table(ROWS, ","), {}, ["4 columns without names", "pose_columns"]),
    "no such column": ("poses.csv", table(ROWS, ",", "t,x,y,yaw"), {"pose_columns": {"yaw": "h"}},
                       ["no column h (pose_columns: yaw)", "t, x, y, yaw"]),
    "a word": ("poses.csv", table(ROWS, ",", "t,x,y,yaw").replace("0.5", "half", 1), {}, ["x[2] is 'half'"]),
    "empty": ("poses.csv", "\n# nothing\n", {}, ["is empty"]),
    "names alone": ("poses.csv", "t,x,y,yaw\n", {}, ["holds no poses"]),
    "not text": ("poses.csv", b"\xff\xfe\x00", {}, ["not a text file"]),
    "not an array": ("poses.npy", b"\x93NUMPY junk", {}, ["cannot read poses"]),
    "a pickle": ("poses.npy", pickle.dumps([1]), {}, ["cannot read poses"]),
    "a claim": ("poses.npy", CLAIM, {}, ["cannot read poses", "claims an array"]),
    "mirrored": ("poses.txt", table(MIRRORED.reshape(-1, 12)), {}, ["pose 0 is no rotation"]),
    "doubled": ("poses.csv", table(ROWS[:, [0, 1, 1, 2, 3]], ",", "t,x,tx,y,yaw"), {}, ["two columns for x: x and tx"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_table_fails_its_trajectory_alone(run_bits: Callable[..., Outcome], tmp_path: Path, fault: str) -> None:
    name, content, settings, expected = FAULTS[fault]
    put(custom_folder(tmp_path / "data") / name, content)
    good = custom_folder(tmp_path / "data", drive_of(FIRST))
    put(good / "poses.csv", table(zip(FIRST.position[:, 0], FIRST.position[:, 1], FIRST.yaw), ",", "x,y,h"))
    settings = {"pose_columns": {"yaw": "h"}, **settings} if "h" in str(settings) else settings
    if not settings:
        put(good / "poses.csv", (good / "poses.csv").read_text().replace("x,y,h", "x,y,yaw"))
    outcome = run_bits(settings)
    assert outcome.code == 1, outcome.err
    (failure,) = read_progress(tmp_path / "cache")["failures"].items()
    assert failure[0] == "t3"
    assert all(words in failure[1]["reason"] for words in ["t3", *expected]), failure[1]["reason"]
    assert check_stamps(tmp_path / "cache", "t1", 1) > FIRST.count


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, by row and by time
# ---------------------------------------------------------------------------------------------------------------------


def test_pictures_are_named_by_their_rows(tmp_path: Path) -> None:
    """Rows 0, 3, 6, 9; the others have no pose and are left out."""
    folder = custom_folder(tmp_path)
    rows = [[f"images/{row}.png" if row % 2 else f"{row}.png", *ROWS[row, 1:]] for row in range(0, COUNT, 3)]
    put(folder / "poses.csv", table(rows, ",", "file,x,y,yaw"))
    poses = read(tmp_path)
    assert (poses.frame_index.tolist(), poses.num_without) == ([0, 3, 6, 9], 8)
    check_drive(poses, slice(0, COUNT, 3))
    assert "8 of 12" in poses.notes[0].detail
    for harm, expected in (
        (("0.png", "77.png"), "row 0 of poses.csv names 77.png"),
        (("images/3.png", "9.png"), "order"),
    ):
        put(folder / "poses.csv", table(rows, ",", "file,x,y,yaw").replace(*harm))
        with pytest.raises(InputError, match=expected):
            read(tmp_path)


def test_poses_of_another_rate_are_interpolated_at_pictures_times(tmp_path: Path) -> None:
    """Pictures every 0.1 s, called by their times; poses every 0.04 s from 0.2 s on, by hand: x = 2 t, yaw = t."""
    for row in range(COUNT):
        put(tmp_path / f"data/t/images/{1000 + row / HZ:.2f}.png", DRIVE.pictures[row])
    at = np.arange(0.2, 2.0, 0.04)
    put(tmp_path / "data/t/poses.csv", table(zip(at, 2 * at, 0 * at, at), ",", "t,x,y,yaw"))
    settings = {"frame_pattern": r"(\d+\.\d+)\.png", "time_offset": 1000.0}
    with pytest.raises(InputError, match=r"12 pictures .* 45 poses"):
        read(tmp_path / "data", **settings)
    poses = read(tmp_path / "data", pose_match="time", **settings)
    assert (poses.frame_index.tolist(), poses.num_without) == (list(range(2, COUNT)), 2)
    expected = np.arange(2, COUNT) / HZ
    np.testing.assert_allclose(poses.position[:, 0], 2 * expected, atol=1e-9)
    np.testing.assert_allclose(poses.yaw, expected, atol=1e-9)
    np.testing.assert_allclose(poses.times, 1000 + expected)
    with pytest.raises(InputError, match=r"no frame lies between two poses .* time_offset"):
        read(tmp_path / "data", pose_match="time", frame_pattern=r"(\d+\.\d+)\.png")


def test_frame_numbers_are_times_by_time_scale(tmp_path: Path) -> None:
    put(custom_folder(tmp_path) / "poses.csv", table(ROWS[::2] * [HZ, 1, 1, 1], ",", "t,x,y,yaw"))
    poses = read(tmp_path, pose_match="time", time_scale=1 / HZ)
    assert poses.frame_index.tolist() == list(range(COUNT - 1))
    np.testing.assert_allclose(poses.times, ROWS[:-1, 0])
    check_drive(poses._replace(position=poses.position[::2], yaw=poses.yaw[::2]), slice(0, COUNT - 1, 2))


@pytest.mark.parametrize("with_files", [False, True])
def test_pictures_times_may_stand_in_a_table(tmp_path: Path, with_files: bool) -> None:
    folder = custom_folder(tmp_path)
    put(folder / "poses.csv", table(ROWS, ",", "t,x,y,yaw"))
    if with_files:
        put(folder / "stamps.csv", table([[f"{row}.png", row / HZ] for row in range(1, COUNT)], ",", "file,timestamp"))
    else:
        put(folder / "stamps.csv", table([[row / HZ] for row in range(COUNT)]))
    poses = read(tmp_path, frame_times="stamps.csv")
    first = 1 if with_files else 0
    check_drive(poses, slice(first, None))
    put(folder / "stamps.csv", table([[row / HZ] for row in range(COUNT + 1)]))
    with pytest.raises(InputError, match=r"12 pictures in images but 13 times in stamps.csv"):
        read(tmp_path, frame_times="stamps.csv")


def test_a_gap_between_poses_cuts_and_frames_in_it_are_left_out(tmp_path: Path) -> None:
    (name,) = write_tum(tmp_path, [DRIVE])
    lines = (tmp_path / name / "groundtruth.txt").read_text().splitlines()
    put(tmp_path / name / "groundtruth.txt", "\n".join(lines[:6] + lines[9:]) + "\n")  # poses 4, 5, 6 are missing
    assert read(tmp_path).breaks.tolist() == []  # 0.4 s: over which is interpolated
    poses = read(tmp_path, max_pose_gap_s=0.2)
    assert (poses.frame_index.tolist(), poses.breaks.tolist()) == ([0, 1, 2, 3, 7, 8, 9, 10, 11], [4])
    assert poses.num_without == 3


def test_pictures_in_two_folders_ask_for_image_key(tmp_path: Path) -> None:
    folder = custom_folder(tmp_path, subfolder="rgb/")
    custom_folder(tmp_path, subfolder="depth/")
    put(folder / "poses.csv", table(ROWS, ",", "t,x,y,yaw"))
    with pytest.raises(InputError, match="pictures lie in depth and rgb; set image_key"):
        read(tmp_path)
    check_drive(read(tmp_path, image_key="rgb"))


def test_other_names_of_pictures_ask_for_frame_pattern(tmp_path: Path) -> None:
    for row, picture in enumerate(DRIVE.pictures):
        put(tmp_path / f"t/images/frame_{row + 5:04d}.png", picture)
    put(tmp_path / "t/poses.csv", table(ROWS, ",", "t,x,y,yaw"))
    with pytest.raises(InputError, match=r"frame_0005.png, for one: set frame_pattern"):
        read(tmp_path)
    check_drive(read(tmp_path, frame_pattern=r"frame_(\d+)\.png"))


# ---------------------------------------------------------------------------------------------------------------------
# Faults of the other layouts
# ---------------------------------------------------------------------------------------------------------------------

HARMS: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("kitti", lambda d: (d / "poses/00.txt").unlink(), []),
    ("kitti", lambda d: put(d / "poses/00.txt", "".join((d / "poses/00.txt").open().readlines()[1:])),
     ["00: 12 pictures (image_2/000000.png", "11 poses in 00.txt"]),
    ("kitti", lambda d: put(d / "poses/00.txt", "1 0 0 0 0 1 0 0 0 0 2 0\n" * COUNT), ["pose 0 is no rotation"]),
    ("kitti", lambda d: (d / "sequences/00/image_2/000004.png").unlink(), ["picture 4 is missing"]),
    ("kitti", lambda d: put(d / "sequences/00/times.txt", "0\n" * COUNT), ["times.txt", "do not rise: row 1"]),
    ("kitti", lambda d: put(d / "sequences/00/times.txt", "0\n1\n"), ["12 pictures in image_2 but 2 times"]),
    ("kitti", lambda d: put(d / "sequences/00/poses.txt", "x"), ["poses.txt and in", "set pose_file"]),
    ("tum", lambda d: (d / "t3/rgb/1305031102.500000.png").unlink(), ["1305031102.500000.png", "rgb.txt names"]),
    ("tum", lambda d: put(d / "t3/rgb.txt", "1 /etc/passwd\n2 rgb/../../x\n"), ["rgb.txt", "/etc/passwd"]),
    ("tum", lambda d: put(d / "t3/rgb.txt", "# nothing\n"), ["rgb.txt: names no pictures"]),
    ("tum", lambda d: put(d / "t3/groundtruth.txt", "1 0 0 0 0 0 0 1\n2 1 0 0 0 0 0 1\n"),
     ["no frame lies between", "1305031102.000 to", "time_offset"]),
    ("euroc", lambda d: (d / "t3/mav0/cam0/data/1403636579863555584.png").unlink(), ["863555584.png", "names"]),
    ("euroc", lambda d: put(d / "t3/mav0/cam0/sensor.yaml", "T_BS:\n  data: [1, 2]\n"), ["T_BS has 2 numbers"]),
    ("tartanair", lambda d: (d / "office/Easy/t3/image_left/000003_left.png").unlink(), ["picture 3 is missing"]),
    ("tartandrive", lambda d: np.save(d / "t3/odom/odometry.npy", np.ones((11, 13))), ["12 pictures", "11 poses"]),
    ("tartandrive", lambda d: np.save(d / "t3/odom/odometry.npy", np.ones((12, 9))), ["9 columns without names"]),
    ("tartandrive", lambda d: put(d / "t3/timestamps.txt", "1\n2\n"), ["2 times in timestamps.txt"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "harm", "expected"), HARMS)
def test_a_broken_layout_says_why(tmp_path: Path, kind: str, harm: Callable[[Path], Any], expected: list[str]) -> None:
    (name,) = WRITERS[kind](tmp_path, [DRIVE])
    harm(tmp_path)
    (trajectory,) = format_named("frames").find(tmp_path, CacheSpec())
    assert trajectory.name == name
    with pytest.raises(InputError) as error:
        open_source(trajectory, DataKeys()).poses(required=True)
    expected = expected or ["no file of poses; expected poses.txt", "layout kitti"]
    assert all(words in str(error.value) for words in [name, *expected]), error.value
    assert trajectory.lacks_poses == (not (tmp_path / "poses/00.txt").exists() and kind == "kitti")


def test_a_euroc_body_whose_forward_axis_is_unknown_is_refused(tmp_path: Path) -> None:
    body = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # y up
    write_euroc(tmp_path, [DRIVE], sensor=None, body=body)
    with pytest.raises(InputError, match="cannot tell where the camera looks"):
        read(tmp_path)
    write_euroc(tmp_path, [DRIVE], body=body, sensor=T_BS.replace("0.0, -1.0, 0.0, -0.02", "0, 0, 1, 0").replace(
        "1.0, 0.0, 0.0, -0.06", "-1, 0, 0, 0").replace("0.0, 0.0, 1.0, 0.01,", "0, -1, 0, 0,"))  # fmt: skip
    check_drive(read(tmp_path))  # by the camera's own axes


def test_kitti_takes_the_camera_that_image_key_names(tmp_path: Path) -> None:
    write_kitti(tmp_path, [DRIVE])
    os.rename(tmp_path / "sequences/00/image_2", tmp_path / "sequences/00/image_0")
    check_drive(read(tmp_path))
    shutil.copytree(tmp_path / "sequences/00/image_0", tmp_path / "sequences/00/image_3")
    (trajectory,) = format_named("frames").find(tmp_path, CacheSpec())
    assert open_source(trajectory, DataKeys()).open_frames([0]).name(0) == "00/image_3/000000.png"  # colour first
    other = open_source(trajectory, DataKeys(image_key="image_0")).open_frames([0])
    assert other.name(0) == "00/image_0/000000.png"


def test_a_lone_sequence_of_kitti_holds_its_poses(tmp_path: Path) -> None:
    write_kitti(tmp_path / "from", [DRIVE])
    shutil.move(tmp_path / "from/sequences/00", tmp_path / "data/night/00")
    shutil.move(tmp_path / "from/poses/00.txt", tmp_path / "data/night/00/poses.txt")
    check_drive(read(tmp_path / "data"))
    (trajectory,) = format_named("frames").find(tmp_path / "data", CacheSpec())
    assert trajectory.name == "night/00"


def test_axes_other_than_the_default_replace_the_layouts_own(tmp_path: Path) -> None:
    """KITTI's form with ned axes; and custom, whose own axes are z_up."""
    write_kitti(tmp_path / "kitti", [DRIVE])
    rows = np.concatenate(
        [
            np.stack([turn("z", -yaw) for yaw in DRIVE.yaw]),
            np.stack([DRIVE.position[:, 0], -DRIVE.position[:, 1], 0 * DRIVE.yaw], 1)[..., None],
        ],
        2,
    )
    put(tmp_path / "kitti/poses/00.txt", table(rows.reshape(-1, 12)))
    check_drive(read(tmp_path / "kitti", pose_axes="ned"))
    put(custom_folder(tmp_path / "custom") / "poses.txt", table(MATRICES[:, :3].reshape(-1, 12)))
    check_drive(read(tmp_path / "custom"))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Which layout, which format
# ---------------------------------------------------------------------------------------------------------------------


def test_two_layouts_are_refused_with_both(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    (name,) = write_tum(tmp_path / "data", [DRIVE])
    put(tmp_path / "data" / name / "poses.csv", table(ROWS, ",", "t,x,y,yaw"))
    outcome = run_bits()
    assert outcome.code == 2
    assert "layout tum (t3/rgb.txt) and layout custom (t3/poses.csv and rgb/); set layout" in outcome.err
    assert run_bits({"layout": "tum"}).code == 0
    (tmp_path / "data" / name / "poses.csv").unlink()
    write_tartandrive(tmp_path / "data", [DRIVE._replace(name="t4")])
    outcome = run_bits()
    assert outcome.code == 2
    assert "t3 looks like layout tum" in outcome.err
    assert "t4 looks like layout tartandrive" in outcome.err


def test_the_folder_of_a_trajectory_itself_is_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_custom(tmp_path / "all", [DRIVE])
    shutil.move(tmp_path / "all/robot/monday/t3", tmp_path / "data")
    outcome = run_bits()
    assert outcome.code == 2
    assert (
        "is itself a trajectory (layout custom: poses.csv and images/); data_folder is the folder above" in outcome.err
    )


def test_euroc_below_data_folder_itself_is_called_mav0(tmp_path: Path) -> None:
    write_euroc(tmp_path, [DRIVE])
    (trajectory,) = format_named("frames").find(tmp_path / "t3", CacheSpec())
    assert trajectory.name == "mav0"
    check_drive(open_source(trajectory, DataKeys()).poses(required=True))


def test_settings_of_another_layout_are_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_tum(tmp_path / "data", [DRIVE])
    outcome = run_bits({"layout": "tum", "pose_match": "time"})
    assert outcome.code == 2
    assert "pose_match: time: is for layout: custom, and layout is tum" in outcome.err


@pytest.mark.parametrize("settings", [{}, {"format": "gnm"}])
def test_images_beside_poses_are_not_told_to_do_without_them(
    run_bits: Callable[..., Outcome], tmp_path: Path, settings: dict[str, str]
) -> None:
    write_custom(tmp_path / "data", [DRIVE])
    outcome = run_bits(settings)
    assert outcome.code == (2 if settings else 0)
    assert "for which there is chunk_by: frames" not in outcome.err
    if settings:
        assert "It looks like format: frames (robot/monday/t3/poses.csv and images/)" in outcome.err
    else:
        assert "format frames (robot/monday/t3/poses.csv and images/)" in outcome.out


def test_gnm_folders_left_out_are_said_to_have_their_poses_beside(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_gnm(tmp_path / "data", [FIRST])
    write_custom(tmp_path / "data", [DRIVE])
    outcome = run_bits()
    assert outcome.code == 2
    assert "frames (robot/monday/t3/poses.csv and images/)" in outcome.err
    assert "gnm (t1/traj_data.pkl)" in outcome.err
    outcome = run_bits({"format": "gnm"})
    assert outcome.code == 0
    assert "1 folders hold frames but no pose file, left out: robot/monday/t3/images" in outcome.err
    assert "format: frames reads robot/monday/t3/poses.csv and images/" in outcome.err


def test_poses_apart_from_pictures(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    for drive in (DRIVE, drive_of(FIRST)):
        custom_folder(tmp_path / "data/pictures", drive, subfolder="")
        rows = zip(np.arange(drive.count) / HZ, *drive.position.T, drive.yaw)
        put(tmp_path / f"data/tables/{drive.name}.csv", table(rows, ",", "t,x,y,yaw"))
    outcome = run_bits({"poses_folder": "tables"})
    assert outcome.code == 0, outcome.err
    assert "robot: format frames" in outcome.out
    assert check_stamps(tmp_path / "cache", "pictures/t1", 1) > FIRST.count
    (tmp_path / "data/tables/t1.csv").unlink()
    outcome = run_bits({"poses_folder": "tables"})
    assert "no pose file, left out: pictures/t1" in outcome.err


def test_pictures_alone_are_cut_by_number_of_frames(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_kitti(tmp_path / "data", [drive_of(FIRST)])
    (tmp_path / "data/poses/00.txt").unlink()
    assert run_bits().code == 2
    outcome = run_bits({"chunk_by": "frames", "max_chunk_frames": 10, "overlap_frames": 2})
    assert outcome.code == 0, outcome.err
    assert check_stamps(tmp_path / "cache", "00", 1) > FIRST.count


# ---------------------------------------------------------------------------------------------------------------------
# Changed data
# ---------------------------------------------------------------------------------------------------------------------

CHANGES: list[tuple[str, Callable[[Path], Any], bool, bool]] = [  # noticed by stat, by content
    ("kitti", lambda d: put(d / "poses/00.txt", (d / "poses/00.txt").read_bytes() + b"\n"), True, True),
    ("kitti", lambda d: put(d / "sequences/00/times.txt", table([[row] for row in range(COUNT)])), True, True),
    ("kitti", lambda d: same_size(d / "sequences/00/image_2/000003.png"), False, True),
    ("kitti", lambda d: os.utime(d / "poses/00.txt", (1, 1)), False, False),
    ("euroc", lambda d: put(d / "t3/mav0/cam0/sensor.yaml", T_BS + "\n"), True, True),
    ("custom", lambda d: put(d / "robot/monday/t3/images/3.png", b"x"), True, True),
    ("custom", lambda d: put(d / "robot/monday/t3/notes.md", b"x"), False, False),
]


def same_size(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(("kind", "change", "by_stat", "by_content"), CHANGES)
def test_changed_data_are_noticed(
    tmp_path: Path, kind: str, change: Callable[[Path], Any], by_stat: bool, by_content: bool
) -> None:
    (name,) = WRITERS[kind](tmp_path, [DRIVE])

    def checksums() -> list[str]:
        source = open_source(format_named("frames").locate(tmp_path, name), DataKeys())
        return [source.checksum(kind) for kind in ("stat", "content")]

    before = checksums()
    change(tmp_path)
    assert [new != old for new, old in zip(checksums(), before)] == [by_stat, by_content]


def test_columns_in_the_config_are_recorded_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    settings = {"data_folder": str(tmp_path), "layout": "custom", "pose_columns": {"x": 0, "yaw": "heading"}}
    path.write_text(yaml.safe_dump({"datasets": {"a": settings}}))
    (loaded,) = dino_cache.load_config(path)
    assert loaded.spec.pose_columns == {"x": "0", "yaw": "heading"}
    again = dino_cache.recorded_spec(loaded.spec.to_json())
    assert again.fingerprint("w") == loaded.spec.fingerprint("w") != CacheSpec().fingerprint("w")


@pytest.mark.slow
@pytest.mark.real_readers
@pytest.mark.parametrize("readers", ["threads", "processes"])
def test_pictures_are_read_in_threads_and_in_processes(tmp_path: Path, readers: str) -> None:
    (name,) = write_tum(tmp_path / "data", [drive_of(FIRST)])
    results = frames_cache(tmp_path / "data", tmp_path / "cache", readers=readers)
    assert results[name].error is None
    assert check_stamps(tmp_path / "cache", name, 1) > FIRST.count


# ---------------------------------------------------------------------------------------------------------------------
# Columns that come along
# ---------------------------------------------------------------------------------------------------------------------


def write_speeds(folder: Path, drive: Drive, rows: list[list[float]], name: str) -> None:
    for row, picture in enumerate(drive.pictures):
        put(folder / f"images/{row}{drive.ending}", picture)
    put(folder / name, table(rows, ",", "timestamp,x,y,yaw,speed"))


@pytest.mark.parametrize("frame_stride", [1, 3])
def test_a_column_of_the_poses_comes_along(run_bits: Callable[..., Outcome], tmp_path: Path, frame_stride: int) -> None:
    drive = drive_of(FIRST)
    rows = [[row / HZ, *drive.position[row], drive.yaw[row], row / 4] for row in range(drive.count)]
    write_speeds(tmp_path / "data/t1", drive, rows, "poses.csv")
    assert run_bits({"extra_keys": ["speed"], "frame_stride": frame_stride}).code == 0
    for (start, stop), datasets in chunks(tmp_path / "cache", "t1"):
        np.testing.assert_array_equal(datasets["extra/speed"], np.arange(start, stop) * frame_stride / 4)


def test_a_column_is_interpolated_where_poses_are(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    """Poses at every other picture, the pictures' times their numbers."""
    drive = drive_of(FIRST)
    rows = [[row, *drive.position[row], drive.yaw[row], row / 4] for row in range(0, drive.count, 2)]
    write_speeds(tmp_path / "data/t1", drive, rows, "poses.csv")
    settings = {"layout": "custom", "pose_match": "time", "max_pose_gap_s": 2.0, "extra_keys": ["speed"]}
    assert run_bits(settings).code == 0
    for (start, stop), datasets in chunks(tmp_path / "cache", "t1"):
        np.testing.assert_allclose(datasets["extra/speed"], np.arange(start, stop) / 4, atol=1e-12)


def test_a_column_that_is_not_there_is_named_with_those_that_are(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_custom(tmp_path / "data", [drive_of(FIRST)])
    assert run_bits({"extra_keys": ["speed"]}).code == 1
    (failure,) = read_progress(tmp_path / "cache")["failures"].values()
    assert "has no speed, which extra_keys names; its keys are timestamp, x, y, yaw" in failure["reason"]


def test_several_cameras_are_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_custom(tmp_path / "data", [drive_of(FIRST)])
    outcome = run_bits({"format": "frames", "image_key": {"front": "images", "left": "left"}})
    assert outcome.code == 2
    assert "format frames reads one camera" in outcome.err
