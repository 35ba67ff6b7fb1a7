"""Pictures with a file of poses, in every layout, against the GNM folder of the same trajectory."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from formats_support import cache, chunks

from dino_cache import CacheSpec, DataKeys, Hooks, InputError, format_named, open_source
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
