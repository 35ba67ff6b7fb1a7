"""Files of bags: cut anywhere or with changed bytes they fail with a reason, and little of them is read or held."""

from __future__ import annotations

import os
import sqlite3
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bags_support import CAMERA, KINDS, ODOM, compressed, drive_of, odometry, stamps, write, write_mcap_bare, write_ros1

from dino_cache import DataKeys, InputError
from dino_cache_extras.formats import bag_files, bags
from dino_cache_extras.formats.bags import bag_checksum, open_bag
from dino_cache_extras.formats.rosbag import RosbagSource, Trajectory
from support import SECOND, Outcome, no_hang, read_progress


def read_all(path: Path) -> list[bytes]:
    source = RosbagSource(Trajectory("t", path, format="rosbag"), DataKeys())
    poses = source.poses(required=True)
    frames = source.open_frames(poses.frame_index)
    try:
        return [frame.tobytes() for frame in frames.read(poses.frame_index)]
    finally:
        frames.close()


def data_file(path: Path) -> Path:
    """The file of a bag that holds the last messages."""
    return path if path.is_file() else max(file for file in path.iterdir() if file.name != "metadata.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_fails_with_a_reason(tmp_path: Path, kind: str) -> None:
    path = write(kind, tmp_path, "t", drive_of(SECOND))
    file = data_file(path)
    whole = file.read_bytes()
    lengths = {0, 1, 12, 13, 50, 100, 4096, 4117, *np.linspace(0, len(whole) - 1, 40).astype(int).tolist()}
    lengths |= {len(whole) - less for less in (1, 8, 9, 36, 37, 100)}
    for length in sorted(each for each in lengths if 0 <= each < len(whole)):
        file.write_bytes(whole[:length])
        with no_hang(), pytest.raises(InputError) as raised:
            read_all(path)
        assert "t (" in str(raised.value) or "metadata.yaml" in str(raised.value), (length, raised.value)
        bag_checksum(path, "stat")
    file.write_bytes(whole)
    assert read_all(path) == SECOND.jpegs


@pytest.mark.parametrize(
    "kind", ["bag", "bag lz4", "rosbag2 sqlite3", "mcap of ROS2", "mcap without indexes", "mcap without chunks"]
)
def test_changed_bytes_are_another_picture_or_a_reason(tmp_path: Path, kind: str) -> None:
    """Never a crash, a hang or another error; nor, where the frames come, more or fewer of them."""
    path = write(kind, tmp_path, "t", drive_of(SECOND))
    file = data_file(path)
    whole, rng = file.read_bytes(), np.random.default_rng(5)
    failed = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        file.write_bytes(data)
        with no_hang():
            try:
                assert len(read_all(path)) <= SECOND.count
            except InputError:
                failed += 1
    assert failed


def test_a_cut_bag_fails_alone_in_a_run(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write("bag", tmp_path / "data", "whole", drive_of(SECOND))
    for kind in ("bag", "mcap of ROS2", "rosbag2 sqlite3"):
        name = kind.replace(" ", "_")
        file = data_file(write(kind, tmp_path / "data", name, drive_of(SECOND)))
        os.truncate(file, file.stat().st_size // 2)
    assert run_bits().code == 1
    progress = read_progress(tmp_path / "cache")
    assert progress["completed_trajectories"] == ["whole"]
    reasons = {name: failure["reason"] for name, failure in progress["failures"].items()}
    assert "is cut: its index lies at" in reasons["bag"]
    assert "has no end: it was cut" in reasons["mcap_of_ROS2"]
    assert "is cut: it has" in reasons["rosbag2_sqlite3"]
    assert not [*(tmp_path / "cache").glob("bag*/*.h5"), *(tmp_path / "cache").glob("mcap*/*.h5")]


def test_an_unindexed_bag_says_how_to_mend_it(tmp_path: Path) -> None:
    path = write("bag", tmp_path, "t", drive_of(SECOND))
    data = bytearray(path.read_bytes())
    place = data.index(b"index_pos=") + len(b"index_pos=")
    data[place : place + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(InputError, match="has no index: its recording was cut; rosbag reindex makes one"):
        open_bag(path, "t")


def test_a_missing_chunk_in_the_middle_is_noticed(tmp_path: Path) -> None:
    """A hole of whole records, as a disk's errors make them: what is left could be read."""
    path = write("bag", tmp_path, "t", drive_of(SECOND))
    whole = path.read_bytes()
    header = struct.pack("<I", len(b"op=\x05")) + b"op=\x05"
    first, second = (whole.index(header, at) for at in (0, whole.index(header) + 1))
    size = second - first
    data = bytearray(whole[:first] + whole[second:])
    place = data.index(b"index_pos=") + len(b"index_pos=")
    data[place : place + 8] = struct.pack("<Q", struct.unpack_from("<Q", data, place)[0] - size)
    path.write_bytes(data)
    with pytest.raises(InputError, match="is cut or damaged"):
        open_bag(path, "t")


def test_fewer_messages_than_metadata_says_are_noticed(tmp_path: Path) -> None:
    path = write("rosbag2 sqlite3", tmp_path, "t", drive_of(SECOND))
    connection = sqlite3.connect(path / "t.db3")
    connection.execute("DELETE FROM messages WHERE id > 40")
    connection.commit()
    connection.close()
    with pytest.raises(InputError, match=r"metadata.yaml says 27 messages of /.*, its files hold"):
        read_all(path)


def test_messages_in_a_journal_are_not_left_out(tmp_path: Path) -> None:
    path = write("rosbag2 sqlite3", tmp_path, "t", drive_of(SECOND))
    (path / "t.db3-wal").write_bytes(b"x" * 32)
    with pytest.raises(InputError, match=r"its last messages lie in t.db3-wal"):
        read_all(path)


@pytest.mark.parametrize("statement", [
    "ALTER TABLE messages RENAME TO hidden; CREATE VIEW messages AS SELECT * FROM hidden",
    "DROP TABLE topics",
])  # fmt: skip
def test_only_plain_tables_are_read(tmp_path: Path, statement: str) -> None:
    path = write("rosbag2 sqlite3", tmp_path, "t", drive_of(SECOND))
    connection = sqlite3.connect(path / "t.db3")
    connection.executescript(statement)
    connection.close()
    with pytest.raises(InputError, match="is no file of rosbag2: it has no plain table"):
        read_all(path)


def test_a_part_that_metadata_does_not_name_is_not_left_out(tmp_path: Path) -> None:
    path = write("rosbag2 mcap", tmp_path, "t", drive_of(SECOND))
    (path / "t_9.mcap").write_bytes((path / "t.mcap").read_bytes())
    with pytest.raises(InputError, match=r"metadata.yaml does not name t_9.mcap"):
        read_all(path)


def test_a_chunk_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bag_files, "MOST_CHUNK_BYTES", 1000)
    for kind in ("bag lz4", "bag bz2", "mcap of ROS1", "mcap of ROS2"):
        with pytest.raises(InputError, match=r"unpacks to .* bytes; 1000 are read at most"):
            read_all(write(kind, tmp_path, kind.replace(" ", "_"), drive_of(SECOND)))


def test_a_disk_without_room_to_unpack_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bag_files, "FREE_BYTES", 1 << 60)
    path = write("rosbag2 sqlite3, packed file", tmp_path, "t", drive_of(SECOND))
    with pytest.raises(InputError, match="has no room to unpack it; set TMPDIR"):
        read_all(path)


def test_unpacked_files_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    path = write("rosbag2 mcap, packed file, split", tmp_path, "t", drive_of(SECOND))
    assert read_all(path) == SECOND.jpegs
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("kind", ["bag", "mcap of ROS2, plain", "mcap without chunks", "rosbag2 sqlite3"])
def test_stamps_and_poses_are_read_without_the_pictures(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture has 1 MB here, and what is before it and after it far less."""
    events, noise = [], np.random.default_rng(0).bytes(1_000_000)
    for number, stamp in enumerate(stamps(12)):
        events += [odometry(stamp, number, 0, 0), compressed(stamp, b"\xff\xd8" + noise)]
    path = write(kind, tmp_path, "t", events)
    read = []
    monkeypatch.setattr(
        os, "pread", lambda *arguments, pread=os.pread: read.append(len(pread(*arguments))) or pread(*arguments)
    )
    tracemalloc.start()
    source = RosbagSource(Trajectory("t", path, format="rosbag"), DataKeys())
    assert len(source.poses(required=True).position) == 12
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(read) < 2_000_000  # of 12 MB
    assert most < 3_000_000
    assert [len(frame) for frame in source.open_frames(range(12)).read(range(12))] == [1_000_002] * 12


@pytest.mark.parametrize("kind", ["bag lz4", "bag bz2", "mcap of ROS2"])
def test_each_chunk_is_unpacked_once_for_all_frames(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(kind, tmp_path, "t", drive_of(SECOND))
    source = RosbagSource(Trajectory("t", path, format="rosbag"), DataKeys())
    source.poses(required=True)
    source._bag.close()
    unpacked = []

    def count(*arguments: object, unpack: Callable = bag_files.unpack) -> bytes:
        unpacked.append(arguments[3])
        return unpack(*arguments)

    monkeypatch.setattr(bag_files, "unpack", count)
    monkeypatch.setattr(bag_files, "KEPT_CHUNK_BYTES", 1)  # only the last one
    assert len(list(source.open_frames(range(27)).read(range(27)))) == 27
    assert len(unpacked) == len(set(unpacked)) > 1


def test_parts_of_a_split_bag_are_not_all_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bags, "OPEN_PARTS", 1)
    path = write("rosbag2 sqlite3, split", tmp_path, "t", drive_of(SECOND))
    bag = open_bag(path, "t")
    assert len(bag._open) == 1
    places = [message.place for message in bag.messages({CAMERA: 16, ODOM: None})]
    assert [bag.read(place) != b"" for place in (places[0], places[-1], places[0])] == [True] * 3
    assert len(bag._open) == 1


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = write("bag", tmp_path, "t", drive_of(SECOND))
    source = RosbagSource(Trajectory("t", path, format="rosbag"), DataKeys())
    numbers = source.poses(required=True).frame_index
    source._bag.close()
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="changed while it was read"):
        list(source.open_frames(numbers).read(numbers))


def test_what_is_no_bag_by_its_bytes_is_refused(tmp_path: Path) -> None:
    for name, said in (("a.bag", "is no ROS1 bag of version 2.0"), ("a.mcap", "is no MCAP file by its first bytes")):
        (tmp_path / name).write_bytes(b"hello" * 1000)
        with pytest.raises(InputError, match=said):
            open_bag(tmp_path / name, "a")
    os.mkfifo(tmp_path / "pipe.bag")
    with pytest.raises(InputError, match="not a regular file"):
        open_bag(tmp_path / "pipe.bag", "pipe")


@pytest.mark.parametrize(("change", "said"), [
    ({"storage_identifier": "my_own"}, "its storage is 'my_own'; sqlite3 and mcap are read"),
    ({"compression_format": "lz9", "compression_mode": "FILE"}, "it is packed by 'lz9'; zstd is read"),
    ({"relative_file_paths": None}, "is damaged or cut: TypeError"),
    ({"relative_file_paths": []}, "names no files"),
    ({"topics_with_message_count": 3}, "is damaged or cut: TypeError"),
])  # fmt: skip
def test_metadata_that_says_something_else(tmp_path: Path, change: dict, said: str) -> None:
    import yaml

    path = write("rosbag2 sqlite3", tmp_path, "t", drive_of(SECOND))
    content = yaml.safe_load((path / "metadata.yaml").read_text())
    content["rosbag2_bagfile_information"] |= change
    (path / "metadata.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=said):
        open_bag(path, "t")


def test_an_index_that_does_not_fit_its_messages_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.mcap"
    write_mcap_bare(path, drive_of(SECOND), compression=__import__("mcap").writer.CompressionType.NONE)
    data = bytearray(path.read_bytes())
    entry = struct.pack("<Q", drive_of(SECOND)[-1].log_ns)
    place = data.rindex(
        entry, 0, data.index(b"\x0f\x04\x00\x00\x00\x00\x00\x00\x00")
    )  # of the last index, before the end
    data[place : place + 8] = struct.pack("<Q", drive_of(SECOND)[-1].log_ns + 1)
    path.write_bytes(data)
    with pytest.raises(InputError, match="its index says channel and time"):
        read_all(path)


def test_a_chunk_whose_checksum_is_another_is_refused(tmp_path: Path) -> None:
    path = write("mcap of ROS2", tmp_path, "t", drive_of(SECOND))
    data = bytearray(path.read_bytes())
    chunk = data.index(b"\x06", 9 + struct.unpack_from("<Q", data, 9)[0] + 8)  # the first record behind the header
    data[chunk + 9 + 24] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"chunk 0 is damaged: its checksum is another"):
        read_all(path)


def test_a_type_that_a_bag_defines_otherwise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.bag"
    write_ros1(path, drive_of(SECOND), chunk_bytes=1 << 20)
    data = path.read_bytes()
    assert data.count(b"string child_frame_id") >= 1
    path.write_bytes(data.replace(b"string child_frame_id", b"uint32 child_frame_id"))
    with pytest.raises(InputError, match="its nav_msgs/Odometry is not ROS's: the bag defines it otherwise"):
        read_all(path)
