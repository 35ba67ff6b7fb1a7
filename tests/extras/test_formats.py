"""Every format against the GNM folders of the same trajectories, and against faults in the data of strangers."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from formats_support import (
    VIDEO_KEY,
    WRITERS,
    cache,
    chunks,
    edit_features,
    put_index_first,
    truncate,
    write_mp4,
    write_tum,
)

import dino_cache
import progress_utils
from dino_cache import (
    CacheSpec,
    DataKeys,
    DinoEncoder,
    Hooks,
    InputError,
    ModelShape,
    build_model,
    format_named,
    open_source,
)
from dino_cache_extras.formats import lerobot
from progress_utils import RefusedError
from support import FIRST, SECOND, BitEncoder, Outcome, Rendered, check_stamps, read_progress, stream_results

TRAJECTORIES = [Rendered(1, 40), Rendered(2, 27), Rendered(3, 33)]
OTHERS = [name for name in WRITERS if name != "gnm"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Kind -> (data folder, names in the order of TRAJECTORIES)."""
    root = tmp_path_factory.mktemp("formats")
    return {kind: (root / kind, write(root / kind, TRAJECTORIES)) for kind, (_, write) in WRITERS.items()}


@pytest.mark.parametrize("frame_stride", [1, 3])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_format_gives_the_chunks_that_gnm_folders_give(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]], kind: str, frame_stride: int
) -> None:
    for which in ("gnm", kind):
        results = cache(written[which][0], tmp_path / which, which, frame_stride=frame_stride)
        assert [str(result.error) for result in results.values() if result.error] == []
    for trajectory, gnm_name, name in zip(TRAJECTORIES, written["gnm"][1], written[kind][1]):
        expected, found = chunks(tmp_path / "gnm", gnm_name), chunks(tmp_path / kind, name)
        assert len(expected) > 1
        assert [span for span, _ in found] == [span for span, _ in expected]
        for (_, right), (_, datasets) in zip(expected, found):
            for key in ("frame_index", "position", "travelled_distance"):
                np.testing.assert_array_equal(datasets[key], right[key])
            np.testing.assert_allclose(datasets["yaw"], right["yaw"], rtol=0, atol=1e-12)  # quaternions round
        check_stamps(tmp_path / kind, name, trajectory.stamp, frame_stride)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_trajectory_is_a_small_value_that_another_process_can_open(
    written: dict[str, tuple[Path, list[str]]], kind: str
) -> None:
    found = list(format_named(WRITERS[kind][0]).find(written[kind][0], CacheSpec()))
    data = pickle.dumps(found)
    assert len(data) < 1000 * len(found)
    copies = pickle.loads(data)
    assert copies == found
    lerobot._LEROBOT_DATASETS.clear()  # as in a process that has not listed them
    poses = open_source(copies[1], DataKeys()).poses(required=True)
    np.testing.assert_array_equal(poses.position, TRAJECTORIES[1].position)


def test_tokens_of_a_real_model_agree_within_the_compression(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]]
) -> None:
    spec = CacheSpec(dino_model_type="small", weights="random", image_size=(28, 42), precision="fp32")
    model = build_model(spec)
    shape = ModelShape(14, 384, 0)
    features = {}
    for kind in ("gnm", "recon", "lerobot v3.0 h264", "video and tum"):
        encoder = DinoEncoder(model if kind == "gnm" else build_model(spec), spec, "cpu")
        encoder.image_size, encoder.tokens = (28, 42), ("cls",)
        skip = written[kind][1][1:]
        how = {"format": WRITERS[kind][0], "skip": skip, "shape": shape, "resize": "stretch"}
        (result,) = stream_results(written[kind][0], tmp_path / kind, encoder, **how)
        assert result.error is None
        (_, datasets), *_ = chunks(tmp_path / kind, written[kind][1][0])
        features[kind] = datasets["cls_token"].astype(float)
    right = features["gnm"]
    assert np.abs(right[0] - right[5]).max() > 0.1  # two frames do differ
    np.testing.assert_array_equal(features["recon"], right)  # the same JPEG bytes
    for kind in ("lerobot v3.0 h264", "video and tum"):
        cosine = (
            (features[kind] * right).sum(1) / np.linalg.norm(features[kind], axis=1) / np.linalg.norm(right, axis=1)
        )
        assert cosine.min() > 0.99


@pytest.mark.parametrize("kind", OTHERS)
def test_frames_and_poses_belong_together_after_a_stop_and_a_resume(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]], kind: str
) -> None:
    (data, names), encoded = written[kind], []
    hooks = Hooks(should_stop=lambda: sum(encoded) >= 56, on_encoded=encoded.append)  # in the second trajectory
    how = {"resize": "stretch", "format": WRITERS[kind][0]}
    first = [result.name for result in stream_results(data, tmp_path / "cache", BitEncoder(), hooks=hooks, **how)]
    assert first == names[:1]
    rest = [result.name for result in stream_results(data, tmp_path / "cache", BitEncoder(), skip=first, **how)]
    assert rest == names[1:]
    for trajectory, name in zip(TRAJECTORIES, names):
        assert check_stamps(tmp_path / "cache", name, trajectory.stamp) >= trajectory.count


@pytest.mark.parametrize("kind", ["gnm", *OTHERS])
def test_a_trajectory_is_located_as_it_was_found(written: dict[str, tuple[Path, list[str]]], kind: str) -> None:
    (data, names), kind = written[kind], format_named(WRITERS[kind][0])
    assert [kind.locate(data, name) for name in names] == list(kind.find(data, CacheSpec()))


@pytest.mark.parametrize("format_name", ["recon", "lerobot", "video"])
def test_a_trajectory_that_is_not_there_is_not_located(tmp_path: Path, format_name: str) -> None:
    with pytest.raises(InputError, match="t1"):
        format_named(format_name).locate(tmp_path, "t1")


# ---------------------------------------------------------------------------------------------------------------------
# Faults: the trajectory fails with its reason, the others are done.
# ---------------------------------------------------------------------------------------------------------------------

V21 = ("data/chunk-000/episode_000000.parquet", f"videos/chunk-000/{VIDEO_KEY}/episode_000000.mp4")


def truncate_after_index(path: Path) -> None:
    put_index_first(path)
    truncate(path, 0.8)


def edit_table(path: Path, edit: Callable[[pyarrow.Table], pyarrow.Table]) -> None:
    pyarrow.parquet.write_table(edit(pyarrow.parquet.read_table(path)), path)


def set_column(path: Path, key: str, change: Callable[[np.ndarray], Any]) -> None:
    def edit(table: pyarrow.Table) -> pyarrow.Table:
        values = change(np.array(table[key].to_pylist()))
        column = pyarrow.array(values.tolist(), table.schema.field(key).type)
        return table.set_column(table.schema.get_field_index(key), key, column)

    edit_table(path, edit)


def changed(values: np.ndarray, row: int, value: Any) -> np.ndarray:
    values[row] = value
    return values


def edit_hdf5(path: Path, edit: Callable[[h5py.File], Any]) -> None:
    with h5py.File(path, "r+") as file:
        edit(file)


def move_away(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "secret.h5", "w") as other:
        file.copy("images", other)
    del file["images"]
    file["images"] = h5py.ExternalLink("secret.h5", "images")


RECON, V, PQ, TUM, CSV = "recon", "lerobot v2.1 h264", "lerobot v2.1 images", "video and tum", "video and csv"
H5, YAW, POSITION = "t1.r01.hdf5", "observation.filtered_heading", "observation.filtered_position"
HARMS: list[tuple[str, Callable[[Path], Any], list[str]]] = [  # the file, a harm to it, what the reason says
    (RECON, truncate, [H5, "truncated"]),
    (RECON, lambda p: p.write_bytes(b"not HDF5" * 100), [H5, "cannot read it"]),
    (RECON, lambda p: p.write_bytes(b""), [H5, "cannot read it"]),
    (RECON, lambda p: edit_hdf5(p, lambda f: f.pop("jackal/yaw")), [H5, "no jackal/yaw", "images/rgb_left"]),
    (RECON, lambda p: put(p, "jackal/yaw", np.zeros(39)), [H5, "jackal/yaw", "(39,)", "(40,)"]),
    (RECON, lambda p: put(p, "jackal/position", np.full((40, 2), np.inf)), ["jackal/position[0, 0]", "inf"]),
    (RECON, lambda p: put(p, "images/rgb_left", np.array([b"x"] * 39)), [H5, "39 images", "40 poses"]),
    (RECON, lambda p: put(p, "images/rgb_left", np.array([b"junk"] * 40)), ["images/rgb_left[0]", "cannot decode"]),
    (RECON, lambda p: put(p, "images/rgb_left", np.zeros(40)), [H5, "float64"]),
    (RECON, lambda p: edit_hdf5(p, lambda f: move_away(f, p.parent)), [H5, "lies in another file"]),
    (V, lambda d: truncate(d / V21[0]), [V21[0], "never finalised"]),
    (V, lambda d: (d / V21[0]).write_bytes(b""), [V21[0], "not a whole parquet file"]),
    (V, lambda d: (d / V21[0]).unlink(), [V21[0], "No such file"]),
    (V, lambda d: edit_table(d / V21[0], lambda t: t.drop_columns([YAW])), [V21[0], f"no column {YAW}", "frame_index"]),
    (V, lambda d: edit_table(d / V21[0], lambda t: t.slice(0, 30)), ["30 rows", "expected 40"]),
    (V, lambda d: set_column(d / V21[0], POSITION, lambda p: changed(p, 7, [np.nan, 0])), [f"{POSITION}[7, 0]", "nan"]),
    (V, lambda d: set_column(d / V21[0], "frame_index", lambda n: n + 1), ["frame_index", "0 to 39"]),
    (V, lambda d: set_column(d / V21[0], "timestamp", lambda t: t + 0.05), ["frame 0", "within 0.025 s"]),
    (V, lambda d: set_column(d / V21[0], "timestamp", lambda t: changed(t, 9, 0.8)), ["do not rise", "row 9"]),
    (V, lambda d: truncate(d / V21[1]), ["episode_000000.mp4", "cannot read the video"]),
    (V, lambda d: truncate_after_index(d / V21[1]), ["episode_000000.mp4", "cannot read the video"]),
    (V, lambda d: (d / V21[1]).write_bytes(b"#EXTM3U\n#EXT-X-VERSION:3\n"), ["cannot read the video"]),
    (V, lambda d: (d / V21[1]).unlink(), [V21[1], "No such file"]),
    (V, lambda d: write_mp4(d / V21[1], FIRST.frames[:31]), ["frame 31", "no such frame", "3.000 s"]),
    (PQ, lambda d: truncate(d / V21[0]), [V21[0], "never finalised"]),
    (
        PQ,
        lambda d: set_column(d / V21[0], VIDEO_KEY, lambda c: changed(c, 5, image(b""))),
        ["frame 5", "no image bytes"],
    ),
    (
        PQ,
        lambda d: set_column(d / V21[0], VIDEO_KEY, lambda c: changed(c, 5, image(b"x"))),
        ["frame 5", "cannot decode"],
    ),
    (TUM, lambda d: truncate(d / "t1.mp4"), ["t1.mp4", "cannot read the video"]),
    (TUM, lambda d: (d / "t1.mp4").write_bytes(b""), ["t1.mp4", "cannot read the video"]),
    (TUM, lambda d: (d / "t1.txt").write_text("# nothing\n"), [" t1.txt:", "no poses"]),
    (TUM, lambda d: (d / "t1.txt").write_text("0 1 2\n1 2 3\n"), [" t1.txt:", "qw"]),
    (TUM, lambda d: (d / "t1.txt").write_bytes(b"\xff\xfe\x00"), [" t1.txt:", "not a text file"]),
    (TUM, lambda d: (d / "t1.txt").write_text(tum(1.6e9, 1.7e9)), ["no frame lies between", "0.000 to 3.900 s"]),
    (TUM, lambda d: (d / "t1.txt").write_text(tum(0, 0)), [" t1.txt:", "do not rise", "pose 1"]),
    (TUM, lambda d: (d / "t1.txt").write_text(tum(0, 9, qw=0)), [" t1.txt:", "quaternion 0"]),
    (
        CSV,
        lambda d: (d / "t1/poses.csv").write_text("t,x,y,az\n0,1,2,0\n"),
        ["t1/poses.csv", "no column", "qw", "are t, x, y, az"],
    ),
    (CSV, lambda d: (d / "t1/poses.csv").write_text("timestamp,x,y,yaw\n0,1,nan,2\n"), ["t1/poses.csv", "y[0]", "nan"]),
]


def put(path: Path, key: str, values: np.ndarray) -> None:
    def edit(file: h5py.File) -> None:
        del file[key]
        file[key] = values

    edit_hdf5(path, edit)


def image(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": "x.png"}


def tum(first_s: float, last_s: float, qw: int = 1) -> str:
    return f"{first_s} 0 0 0 0 0 0 {qw}\n{last_s} 9 0 0 0 0 0 1\n"


@pytest.mark.parametrize(("kind", "harm", "reasons"), HARMS)
def test_a_broken_trajectory_fails_alone_and_says_why(
    tmp_path: Path, kind: str, harm: Callable[[Path], Any], reasons: list[str]
) -> None:
    names = WRITERS[kind][1](tmp_path / "data", [FIRST, SECOND])
    harm(tmp_path / "data" / (H5 if kind == RECON else ""))
    results = cache(tmp_path / "data", tmp_path / "cache", kind)
    message = str(results[names[0]].error)
    assert all(reason in f" {message}" for reason in [names[0], *reasons]), message
    assert results[names[1]].error is None
    assert check_stamps(tmp_path / "cache", names[1], 2) >= 27


# ---------------------------------------------------------------------------------------------------------------------
# From the command line: which format, which keys, what changed.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gnm", "lerobot v3.0 h264", "video and tum"])
def test_data_without_poses_are_cut_by_number_of_frames(
    run_bits: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (name,) = WRITERS[kind][1](tmp_path / "data", [FIRST])
    for path in (*(tmp_path / "data").rglob("traj_data.pkl"), *(tmp_path / "data").rglob("*.txt")):
        path.unlink()
    if kind == "lerobot v3.0 h264":
        edit_features(tmp_path / "data", {"observation.filtered_position": None, "observation.filtered_heading": None})
    refused = run_bits()
    assert refused.code == 2
    assert "chunk_by: frames" in refused.err
    outcome = run_bits({"chunk_by": "frames", "max_chunk_frames": 10, "overlap_frames": 2}, frame_stride=2)
    assert outcome.code == 0, outcome.err
    found = chunks(tmp_path / "cache", name)
    assert [span for span, _ in found] == [(0, 10), (8, 18), (16, 20)]
    columns = {"cls_token", "frame_index"} | ({"timestamp"} if kind != "gnm" else set())
    assert all({*datasets} == columns for _, datasets in found)
    check_stamps(tmp_path / "cache", name, 1, frame_stride=2)
    windows = dino_cache.CacheWindows(tmp_path / "cache", window=4)
    assert {*windows[0]} == {"index", "cls_token", "frame_index"}
    assert windows[1]["frame_index"].tolist() == [2, 4, 6, 8]
    with pytest.raises(RefusedError, match="goal"):
        dino_cache.CacheWindows(tmp_path / "cache", window=4, goal=(1.0, 2.0))
    where = ["--cache-dir", str(tmp_path / "cache")]
    assert progress_utils.main(["export", *where, "--to", "vint", "-o", str(tmp_path / "pt")]) == 2
    assert progress_utils.main(["export", *where, "--to", "flat", "-o", str(tmp_path / "flat.h5")]) == 0
    with h5py.File(tmp_path / "flat.h5") as flat:
        assert "position" not in flat
        assert flat["frame_index"][...].tolist() == list(range(0, 40, 2))
    assert progress_utils.main(["verify", *where, "--deep"]) == 0
    record = read_progress(tmp_path / "cache")
    (tmp_path / "cache/progress.json").unlink()
    assert progress_utils.main(["rebuild", *where, "--yes"]) == 0
    assert read_progress(tmp_path / "cache")["trajectory_records"] == record["trajectory_records"]
    assert record["processing_config"]["chunk_by"] == "frames"


@pytest.mark.parametrize(("module", "kind"), [("av", "video and tum"), ("pyarrow", "lerobot v3.0 h264")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    run_bits: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, kind: str
) -> None:
    WRITERS[kind][1](tmp_path / "data", [FIRST])
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    outcome = run_bits()
    assert outcome.code == 2
    assert all(word in outcome.err for word in (module, "pip install -r requirements-lerobot.txt"))


@pytest.mark.parametrize(
    ("kind", "change", "redone_by_stat", "redone_by_content"),
    [
        ("recon", lambda d: edit_hdf5(d / "t1.r01.hdf5", lambda f: f["jackal/yaw"].write_direct(np.ones(40))), 1, 1),
        ("lerobot v2.1 h264", lambda d: set_column(d / V21[0], "observation.filtered_heading", lambda y: y + 1), 1, 1),
        ("lerobot v2.1 h264", lambda d: write_mp4(d / V21[1], reversed(FIRST.frames)), 1, 1),
        ("lerobot v2.1 h264", lambda d: os.utime(d / V21[1], (1, 1)), 0, 0),
        ("lerobot v2.1 images", lambda d: set_column(d / V21[0], VIDEO_KEY, lambda c: c[::-1]), 0, 1),
        ("video and tum", lambda d: write_tum(d / "t1.txt", FIRST._replace(count=39)), 1, 1),
        ("video and tum", lambda d: os.utime(d / "t1.mp4", (1, 1)), 0, 0),
    ],
)
@pytest.mark.parametrize("checksum", ["stat", "content"])
def test_changed_data_are_done_again(
    tmp_path: Path, kind: str, change: Callable[[Path], Any], redone_by_stat: int, redone_by_content: int, checksum: str
) -> None:
    WRITERS[kind][1](tmp_path / "data", [FIRST])
    before = checksums(tmp_path / "data", kind, checksum)
    change(tmp_path / "data")
    redone = redone_by_stat if checksum == "stat" else redone_by_content
    assert (checksums(tmp_path / "data", kind, checksum) != before) == bool(redone)


def checksums(data: Path, kind: str, checksum: str) -> list[str]:
    trajectories = format_named(WRITERS[kind][0]).find(data, CacheSpec())
    return [open_source(trajectory, DataKeys()).checksum(checksum) for trajectory in trajectories]
