"""The same rendered trajectories in every format, each written with the format's own libraries.

A frame shows its trajectory's stamp (4 bits) and its number (12 bits) as 4 x 4 flat blocks, black or white, which
survive JPEG and video compression; BitEncoder reads them back from what reached it.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pyarrow
import pyarrow.parquet

from dino_cache import TrajectoryResult
from support import SIZE, BitEncoder, Rendered, encoded, read_chunk, stream_results, write_gnm

FPS = 10
VIDEO_KEY = "observation.images.front"


def write_recon(folder: Path, trajectories: list[Rendered], *, fixed_length: bool = False) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for trajectory in trajectories:
        write_recon_file(folder / f"t{trajectory.stamp}.r01.hdf5", trajectory, fixed_length=fixed_length)
    return [f"t{trajectory.stamp}" for trajectory in trajectories]


def write_recon_file(path: Path, trajectory: Rendered, *, fixed_length: bool = False) -> None:
    with h5py.File(path, "w") as file:
        file["jackal/position"] = np.concatenate([trajectory.position, np.full((trajectory.count, 1), 7.0)], 1)
        file["jackal/yaw"] = trajectory.yaw
        if fixed_length:
            file["images/rgb_left"] = np.array(trajectory.jpegs)
        else:
            images = file.create_dataset("images/rgb_left", (trajectory.count,), h5py.vlen_dtype(np.uint8))
            for number, data in enumerate(trajectory.jpegs):
                images[number] = np.frombuffer(data, np.uint8)


def write_mp4(path: Path, frames: Iterable[np.ndarray], codec: str = "libx264", *, rotation: int = 0) -> None:
    options = {"libx264": {"crf": "16", "preset": "ultrafast", "bf": "2", "x264-params": "b-adapt=0"}}.get(codec, {})
    if codec == "libsvtav1":
        options = {"crf": "30", "preset": "12"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", 12
        if rotation:
            stream.set_display_rotation(rotation)
            frames = (np.rot90(frame, -rotation // 90) for frame in frames)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def put_index_first(path: Path) -> None:
    """As for streaming: such a file opens although its end is missing."""
    old = path.rename(path.with_suffix(".old"))
    with av.open(old) as container, av.open(path, "w", options={"movflags": "faststart"}) as copy:
        stream = copy.add_stream_from_template(container.streams.video[0], opaque=True)
        for packet in container.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    old.unlink()


def write_joined_mp4(path: Path, parts: list[list[np.ndarray]], codec: str) -> None:
    """Each part encoded for itself, and their packets put behind each other, as LeRobot does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as joined:
        stream, done = None, 0
        for number, frames in enumerate(parts):
            part = path.with_suffix(f".{number}.mp4")
            write_mp4(part, frames, codec)
            with av.open(part) as container:
                stream = stream or joined.add_stream_from_template(container.streams.video[0], opaque=True)
                for packet in container.demux(video=0):
                    if packet.dts is not None:
                        offset = round(done / FPS / packet.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                        joined.mux(packet)
            part.unlink()
            done += len(frames)


def lerobot_rows(episode: int, trajectory: Rendered, **more: Any) -> dict[str, Any]:
    numbers = np.arange(trajectory.count)
    return {
        "timestamp": pyarrow.array(numbers / FPS, pyarrow.float32()),
        "frame_index": numbers,
        "episode_index": np.full(trajectory.count, episode),
        "observation.filtered_position": pyarrow.array(
            trajectory.position.tolist(), pyarrow.list_(pyarrow.float32(), 2)
        ),
        "observation.filtered_heading": pyarrow.array(trajectory.yaw, pyarrow.float32()),
        **more,
    }


def write_info(folder: Path, version: str, dtype: str, **changes: Any) -> None:
    chunk = "chunk-{chunk_index:03d}" if version == "v3.0" else "chunk-{episode_chunk:03d}"
    file = "file-{file_index:03d}" if version == "v3.0" else "episode_{episode_index:06d}"
    video = (
        f"videos/{{video_key}}/{chunk}/{file}.mp4" if version == "v3.0" else f"videos/{chunk}/{{video_key}}/{file}.mp4"
    )
    features = {
        VIDEO_KEY: {"dtype": dtype, "shape": [*SIZE, 3]},
        "observation.filtered_position": {"dtype": "float32", "shape": [2]},
        "observation.filtered_heading": {"dtype": "float32", "shape": [1]},
        "action": {"dtype": "float32", "shape": [2]},
    }
    info = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 1000}
    info |= {"data_path": f"data/{chunk}/{file}.parquet", "video_path": video}
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta/info.json").write_text(json.dumps({**info, **changes}))


def write_lerobot(
    folder: Path, trajectories: list[Rendered], version: str, codec: str, *, together: int = 2, row_group: int = 50
) -> list[str]:
    """`codec` of the videos, or "image" for PNG in parquet. In v3.0, `together` episodes share their files."""
    dtype = "image" if codec == "image" else "video"
    write_info(folder, version, dtype)
    together = together if version == "v3.0" else 1
    episodes, entries = list(enumerate(trajectories)), []
    for file, first in enumerate(range(0, len(trajectories), together)):
        group = episodes[first : first + together]
        data, video = lerobot_files(folder, version, file)
        write_lerobot_data(data, group, dtype, row_group)
        if dtype == "video":
            write_joined_mp4(video, [trajectory.frames for _, trajectory in group], codec)
        start = 0
        for index, trajectory in group:
            entries.append(lerobot_entry(index, trajectory.count, file, start))
            start += trajectory.count
    write_episodes(folder, version, entries)
    return [f"episode_{index:06d}" for index in range(len(trajectories))]


def lerobot_files(folder: Path, version: str, file: int) -> tuple[Path, Path]:
    """A parquet file and its video."""
    if version == "v3.0":
        name = f"chunk-000/file-{file:03d}"
        return folder / f"data/{name}.parquet", folder / f"videos/{VIDEO_KEY}/{name}.mp4"
    name = f"episode_{file:06d}"
    return folder / f"data/chunk-000/{name}.parquet", folder / f"videos/chunk-000/{VIDEO_KEY}/{name}.mp4"


def write_lerobot_data(path: Path, group: list[tuple[int, Rendered]], dtype: str, row_group: int = 50) -> None:
    tables = []
    for index, trajectory in group:
        images = [{"bytes": encoded(frame, "PNG"), "path": "x.png"} for frame in trajectory.frames]
        tables.append(
            pyarrow.table(lerobot_rows(index, trajectory, **({VIDEO_KEY: images} if dtype == "image" else {})))
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.concat_tables(tables), path, row_group_size=row_group)


def lerobot_entry(index: int, length: int, file: int, start: int) -> dict[str, Any]:
    entry = {
        "episode_index": index,
        "tasks": ["drive"],
        "length": length,
        "data/chunk_index": 0,
        "data/file_index": file,
    }
    video = {
        "chunk_index": 0,
        "file_index": file,
        "from_timestamp": start / FPS,
        "to_timestamp": (start + length) / FPS,
    }
    return {**entry, **{f"videos/{VIDEO_KEY}/{key}": value for key, value in video.items()}}


def write_episodes(folder: Path, version: str, entries: list[dict[str, Any]]) -> None:
    if version == "v3.0":
        path = folder / "meta/episodes/chunk-000/file-000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)
        return
    lines = [json.dumps({key: entry[key] for key in ("episode_index", "tasks", "length")}) for entry in entries]
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")


def write_videos(folder: Path, trajectories: list[Rendered], kind: str = "tum") -> list[str]:
    """<name>.mp4 with <name>.txt in TUM's form, or folders with video.mp4 and poses.csv."""
    for trajectory in trajectories:
        name = f"t{trajectory.stamp}"
        if kind == "tum":
            write_mp4(folder / f"{name}.mp4", trajectory.frames)
            write_tum(folder / f"{name}.txt", trajectory)
        else:
            write_mp4(folder / name / "video.mp4", trajectory.frames)
            write_csv(folder / name / "poses.csv", trajectory)
    return [f"t{trajectory.stamp}" for trajectory in trajectories]


def write_tum(path: Path, trajectory: Rendered) -> None:
    lines = ["# timestamp tx ty tz qx qy qz qw"]
    for number, ((x, y), yaw) in enumerate(zip(trajectory.position, trajectory.yaw)):
        lines.append(f"{number / FPS} {x} {y} 1.5 0 0 {math.sin(yaw / 2)!r} {math.cos(yaw / 2)!r}")
    path.write_text("\n".join(lines) + "\n")


def write_csv(path: Path, trajectory: Rendered) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Timestamp", "x", "y", "z", "heading"])
        for number, ((x, y), yaw) in enumerate(zip(trajectory.position, trajectory.yaw)):
            writer.writerow([number / FPS, x, y, 0, yaw])


Writer = Callable[[Path, list[Rendered]], list[str]]


def lerobot(version: str, codec: str) -> Writer:
    return lambda folder, trajectories: write_lerobot(folder, trajectories, version, codec)


WRITERS: dict[str, tuple[str, Writer]] = {  # how it is called here -> (format, writer)
    "gnm": ("gnm", write_gnm),
    "recon": ("recon", write_recon),
    "recon, fixed length": ("recon", lambda folder, data: write_recon(folder, data, fixed_length=True)),
    "lerobot v2.1 h264": ("lerobot", lerobot("v2.1", "libx264")),
    "lerobot v3.0 h264": ("lerobot", lerobot("v3.0", "libx264")),
    "lerobot v2.1 images": ("lerobot", lerobot("v2.1", "image")),
    "lerobot v3.0 images": ("lerobot", lerobot("v3.0", "image")),
    "video and tum": ("video", write_videos),
    "video and csv": ("video", lambda folder, data: write_videos(folder, data, "csv")),
}
AV1_ENCODER = next((name for name in ("libsvtav1", "libaom-av1") if name in av.codecs_available), None)
if AV1_ENCODER:
    WRITERS["lerobot v2.1 av1"] = ("lerobot", lerobot("v2.1", AV1_ENCODER))
    WRITERS["lerobot v3.0 av1"] = ("lerobot", lerobot("v3.0", AV1_ENCODER))


def cache(data: Path, cache_dir: Path, kind: str, **settings: Any) -> dict[str, TrajectoryResult]:
    settings = {"resize": "stretch", "format": WRITERS[kind][0], **settings}
    return {result.name: result for result in stream_results(data, cache_dir, BitEncoder(), **settings)}


def chunks(cache_dir: Path, name: str) -> list[tuple[tuple[int, int], dict[str, np.ndarray]]]:
    """(start, stop) and datasets of a trajectory's chunks."""
    read = [read_chunk(path) for path in sorted((cache_dir / name).glob("*.h5"))]
    return [((attributes["start"], attributes["stop"]), datasets) for attributes, datasets in read]


def truncate(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def edit_features(folder: Path, features: dict[str, Any], **changes: Any) -> None:
    info = json.loads((folder / "meta/info.json").read_text())
    kept = {**info["features"], **features}
    info = {**info, "features": {key: value for key, value in kept.items() if value is not None}, **changes}
    (folder / "meta/info.json").write_text(json.dumps(info))
