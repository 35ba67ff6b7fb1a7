"""Data from strangers: pose files that attack, files that are none, names that mislead.

Nothing is executed, nothing waits, memory stays bounded, and nothing is written outside the cache folder. The attacks
of test_gnm.py come as pickle makes them; those here are forged opcode by opcode, or are dear to unpack.
"""

import codecs
import copyreg
import functools
import hashlib
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import dino_cache
import progress_utils
from support import (
    NFC,
    NFD,
    ODD_NAMES,
    ROOT,
    Outcome,
    check_stamps,
    make_trajectory,
    no_hang,
    read_progress,
    straight_line,
    tree,
    write_config,
)
from test_gnm import as_numpy_1_wrote_it, attacks

POSITION, YAW = straight_line(20), np.linspace(0, 1, 20)
PKL, NPZ, JSON = "traj_data.pkl", "traj_data.npz", "traj_data.json"
MOST_MB = 200  # of memory that reading an attack may take for a moment


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with one trajectory, `good`, of stamp 7."""
    make_trajectory(tmp_path / "data" / "good", stamp=7)
    return tmp_path / "data"


def configure(data: Path, cache: Path, split: Path | None = None, **settings: Any) -> Path:
    path = write_config(data.parent / "config.yaml", data, **settings)
    content = yaml.safe_load(path.read_text())
    content["datasets"]["robot"] |= {"cache_dir": str(cache)} | ({"split": str(split)} if split else {})
    path.write_text(yaml.safe_dump(content))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Forged pose files
# ---------------------------------------------------------------------------------------------------------------------

EXTENSIONS = {"posix.mkdir": 0xF1, "os.mkdir": 0xF1F1, "os.makedirs": 0xF1F1F1}  # codes for private use


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode("ascii")


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def items(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + items(*arguments) + b"R"


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def sized(opcode: bytes, size: int) -> bytes:
    """An opcode that claims so many bytes, and has none."""
    return opcode + struct.pack("<Q", size)


def poses(position: bytes) -> bytes:
    """A pickle of poses that are in order but for `position`, given in opcodes."""
    yaw = b"](" + (b"G" + bytes(8)) * len(YAW) + b"e"
    return b"\x80\x05}(" + text("yaw") + yaw + text("position") + position + b"u."


def executing(marker: str) -> dict[str, bytes]:
    """Pickles that make `marker` when loaded without care, EXTENSIONS being registered."""
    path, mkdir = text(marker), name("posix", "mkdir")
    arguments_of_map = items(mkdir, b"](" + path + b"e")
    one, two, four = EXTENSIONS.values()
    values = {
        "EXT1": call(b"\x82" + struct.pack("<B", one), path),
        "EXT2": call(b"\x83" + struct.pack("<H", two), path),
        "EXT4": call(b"\x84" + struct.pack("<i", four), path),
        "NEWOBJ": call(name("builtins", "list"), name("builtins", "map") + arguments_of_map + b"\x81"),
        "NEWOBJ_EX": call(name("builtins", "list"), name("builtins", "map") + arguments_of_map + b"}\x92"),
        "getattr of an import": call(
            call(name("builtins", "getattr"), call(name("builtins", "__import__"), text("os")), text("mkdir")), path
        ),
        "BUILD of a partial": call(
            call(name("functools", "partial"), name("builtins", "print"))
            + items(mkdir, items(path), b"}", b"}") + b"b"
        ),
        "a name from the memo": call(text("posix") + b"\x940" + text("mkdir") + b"\x940h\x00h\x01\x93", path),
        "a numpy function": call(name("numpy", "memmap"), path, text("u1"), text("w+"), b"K\x00", items(b"K\x02")),
        "a dotted numpy name": call(
            text("numpy") + text("lib.format.open_memmap") + b"\x93", path, text("w+"), text("u1"), items(b"K\x02")
        ),
    }  # fmt: skip
    return {title: poses(value) for title, value in values.items()}


def npz(**members: bytes | np.ndarray) -> bytes:
    """An archive of arrays, and of bytes in an array's place."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for key, value in members.items():
            if isinstance(value, np.ndarray):
                member = io.BytesIO()
                np.save(member, value)
                value = member.getvalue()  # noqa: PLW2901
            archive.writestr(f"{key}.npy", value)
    return file.getvalue()


@functools.cache
def costly_or_odd() -> dict[str, tuple[str, bytes]]:
    """Pose files that execute nothing: title -> (file name, bytes). Each would cost a careless reader 400 MB or more,
    or bring it down, or is an object that is no numbers."""
    ndarray, huge = name("numpy", "ndarray"), number(1 << 40)
    reconstruct = name("numpy.core.multiarray", "_reconstruct")
    frombuffer, encode = name("numpy.core.numeric", "_frombuffer"), name("_codecs", "encode")
    f8 = call(name("numpy", "dtype"), text("f8"), b"\x89", b"\x88")
    empty = call(reconstruct, ndarray, items(b"K\x00"), b"C\x01b")

    def state(shape: bytes, values: bytes) -> bytes:
        return empty + items(b"K\x01", shape, f8, b"\x89", b"B" + struct.pack("<I", len(values)) + values) + b"b"

    def held(attribute: str) -> bytes:
        return b"}" + text(attribute) + text("x" * 30_000_000) + b"s"

    opcodes = {
        "a shape of terabytes for _reconstruct": call(reconstruct, ndarray, items(huge), b"C\x01b"),
        "a shape of terabytes in a state": state(items(huge, b"K\x02"), b""),
        "a shape of terabytes for _frombuffer": call(frombuffer, b"C\x00", f8, items(huge, b"K\x02"), text("C")),
        "a shape of minus one": state(items(number(-1), b"K\x02"), bytes(320)),
        "a shape of a thousand dimensions": state(items(*[b"K\x01"] * 1000), bytes(8)),
        "a shape that is a list": state(b"]", bytes(8)),
        "another class for _reconstruct": call(reconstruct, name("numpy", "memmap"), items(b"K\x00"), b"C\x01b"),
        "a state that is a number": empty + b"K\x01b",
        "a type made without its argument": call(
            frombuffer, b"C\x08" + bytes(8), name("numpy", "dtype") + b")\x81", items(b"K\x01"), text("C")
        ),
        "a type of objects": call(
            frombuffer, b"C\x08" + bytes(8), f8.replace(b"f8", b"O8"), items(b"K\x01"), text("C")
        ),
        "a type that is deep": call(name("numpy", "dtype"), b")" + b"\x85" * 100_000),
        "one text in 400 fresh copies": (
            encode + b"\x940" + text("x" * 1_000_000) + text("latin1") + b"\x86\x940](" + b"h\x00h\x01R" * 400 + b"e"
        ),
        "another codec": call(encode, text("x" * 100), text("zlib_codec")),
        "a codec that is a number": call(encode, text("x"), b"K\x01"),
        "BUILD of a function": encode + held("one") + b"b",
        "BUILD of a function, by slots": encode + items(b"N", held("two")) + b"b",
        "BUILD of a class, by slots": ndarray + items(b"N", held("three")) + b"b",
        "PERSID": b"Pposix.mkdir\n",
        "BINPERSID": text("posix.mkdir") + b"Q",
        "PUT far away": b"Np40000000\n",
        "LONG_BINPUT far away": b"Nr" + struct.pack("<I", 40_000_000),
        "LONG4 of gigabytes": b"\x8b\xff\xff\xff\x7f",
        "LONG4 of minus one byte": b"\x8b\xff\xff\xff\xff",
        "INT of a million digits": b"I" + b"9" * 1_000_000 + b"\n",
        "LONG of a million digits": b"L" + b"9" * 1_000_000 + b"L\n",
        "BINBYTES8 of terabytes": sized(b"\x8e", 1 << 40),
        "BINUNICODE8 of terabytes": sized(b"\x8d", 1 << 40),
        "BYTEARRAY8 of terabytes": sized(b"\x96", 1 << 40),
        "FRAME of exabytes": sized(b"\x95", 1 << 60),
        "NEXT_BUFFER": b"\x97",
        "an unknown opcode": b"\xff",
        "more taken than given": b"000000",
        "STACK_GLOBAL of numbers": b"K\x01K\x02\x93",
        "a function": encode,
        "a class": ndarray,
        "a type": f8,
        "an array without a state": empty,
        "a list that holds itself": b"]\x94h\x00a",
        "a dict that holds itself": b"}\x94" + text("x") + b"h\x00s",
        "a tuple of 100000 storeys": b")" + b"\x85" * 100_000,
        "a list of 100000 storeys": b"]" * 100_000 + b"a" * 99_999,
    }
    nested: Any = [0.0] * 10
    for _ in range(9):
        nested = [nested] * 10
    array = np.zeros(100_000)
    objects: dict[str, Any] = {
        "ten lists of ten lists of ...": nested,
        "one array in 600 rows": [array] * 600,
        "one array 600 times in a row": [[array] * 600],
        "one text in 1000 rows": ["x" * 100_000] * 1000,
        "one text in rows of a row": [["x" * 100_000] * 1000],
        "one bytes in 4000 rows": [b"x" * 100_000] * 4000,
        "one bytearray in 100 rows": [bytearray(1_000_000)] * 100,
        "no rows of exabytes": np.zeros((0, 1 << 62), "u1"),
        "an integer of 100000 digits": [[1 << 330_000, 0]] * 20,
        "objects": np.array([[{}, 1]] * 20, dtype=object),
        "records": np.zeros(20, dtype="f8,f8"),
        "a masked array": np.ma.array(POSITION),
        "dates": POSITION.astype("M8[s]"),
    }  # fmt: skip
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({1 << 40}, 2), }}".ljust(117) + "\n"
    claims = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    yaw = YAW.tolist()
    return {
        **{title: (PKL, poses(value)) for title, value in opcodes.items()},
        **{title: (PKL, pickle.dumps({"position": value, "yaw": YAW}, 5)) for title, value in objects.items()},
        "protocol 255": (PKL, b"\x80\xff" + poses(b"N")[2:]),
        "npz that claims terabytes": (NPZ, npz(position=claims, yaw=YAW)),
        "npz with no rows of exabytes": (NPZ, npz(position=objects["no rows of exabytes"], yaw=YAW)),
        "npz of 60000000 small numbers": (NPZ, npz(position=np.zeros((30_000_000, 2), "u1"), yaw=YAW)),
        "npz with a pickle in an array's place": (NPZ, npz(position=attacks("/tmp/marker")["os.system"], yaw=YAW)),
        "JSON with a text among numbers": (
            JSON,
            json.dumps({"position": ["x" * 100_000, *[0] * 1000], "yaw": yaw}).encode(),
        ),
        "JSON with a text worth terabytes": (
            JSON,
            json.dumps({"position": ["x" * 2**20, *[0] * 2**20], "yaw": yaw}).encode(),
        ),
        "JSON with an integer of 100000 digits": (JSON, b'{"yaw": [0], "position": [[' + b"9" * 100_000 + b", 0]]}"),
    }


# Reads every folder given, in a process of its own: a careless reader would be brought down, or bring the machine down.
READER = """
import copyreg, gc, json, os, re, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import dino_cache

for function, code in json.loads(sys.argv[2]).items():
    copyreg.add_extension(*function.split("."), code)
folder, titles = Path(sys.argv[3]), json.loads(sys.argv[4])
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
watched = None


def watch(event, arguments):
    if watched is None or event == "import" and arguments[0].startswith("numpy"):
        return
    reads = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if not reads and re.match(r"(open|import|exec)$|(os|subprocess|pickle|socket|shutil|ctypes|mmap)\\.", event):
        watched.append(f"{event} {arguments}"[:200])


def memory(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def held():
    dicts = [found for found in gc.get_objects() if type(found) is dict]
    return sum(isinstance(value, str) and len(value) == 30_000_000 for found in dicts for value in found.values())


def read(path):
    try:
        dino_cache.read_poses(path, "bad")
    except dino_cache.InputError as error:
        return "InputError", str(error)
    except BaseException as error:
        return type(error).__name__, str(error)
    return "poses", ""


sys.addaudithook(watch)
for path in sorted((folder / "good").iterdir()):
    dino_cache.read_poses(path, "good")
readings = {}
for number, title in enumerate(titles):
    (path,) = (folder / str(number)).iterdir()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now
    before, watched = memory("VmRSS"), (events := [])
    kind, message = read(path)
    watched = None
    readings[title] = dict(kind=kind, message=message[:2000], events=events, cost_mb=memory("VmHWM") - before)
_, position, yaw, *_ = dino_cache.read_poses(folder / "good" / "traj_data.pkl", "good")
readings["held"] = held()
readings["good"] = [position.tolist(), yaw.tolist()]
print(json.dumps(readings))
"""

HOSTILE = list(costly_or_odd())
EXECUTING = list(executing("/tmp/marker"))


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """How reading each hostile file ended: kind, message, cost_mb, events; and the poses read after all."""
    folder = tmp_path_factory.mktemp("hostile")
    executing_files = {title: (PKL, pickled) for title, pickled in executing(str(folder / "marker")).items()}
    files = costly_or_odd() | executing_files
    for number_, (file_name, content) in enumerate(files.values()):
        (folder / str(number_)).mkdir()
        (folder / str(number_) / file_name).write_bytes(content)
    (folder / "good").mkdir()
    (folder / "good" / PKL).write_bytes(pickle.dumps({"position": POSITION, "yaw": YAW}))
    (folder / "good" / NPZ).write_bytes(npz(position=POSITION, yaw=YAW))
    (folder / "good" / JSON).write_text(json.dumps({"position": POSITION.tolist(), "yaw": YAW.tolist()}))
    arguments = [str(ROOT), json.dumps(EXTENSIONS), str(folder), json.dumps(list(files))]
    done = subprocess.run(
        [sys.executable, "-c", READER, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (folder / "marker").exists()
    return json.loads(done.stdout)


@pytest.fixture
def _extensions() -> Iterator[None]:
    for function, code in EXTENSIONS.items():
        copyreg.add_extension(*function.split("."), code)
    yield
    for function, code in EXTENSIONS.items():
        copyreg.remove_extension(*function.split("."), code)


@pytest.mark.usefixtures("_extensions")
@pytest.mark.parametrize("attack", EXECUTING)
def test_a_forged_pickle_executes_nothing(tmp_path: Path, readings: dict[str, Any], attack: str) -> None:
    pickle.loads(executing(str(tmp_path / "marker"))[attack])
    assert (tmp_path / "marker").exists(), "this attack would not work on anyone"
    assert readings[attack]["events"] == []
    assert readings[attack]["kind"] == "InputError"
    assert PKL in readings[attack]["message"]


@pytest.mark.parametrize("title", HOSTILE)
def test_a_hostile_pose_file_is_an_input_error_of_little_memory(readings: dict[str, Any], title: str) -> None:
    reading = readings[title]
    assert reading["kind"] == "InputError", reading
    assert reading["message"].startswith("bad/traj_data.")
    assert reading["events"] == []
    assert reading["cost_mb"] < MOST_MB


def test_what_a_pickle_gives_the_reader_to_hold_is_let_go(readings: dict[str, Any]) -> None:
    """The texts of BUILD, as attributes of functions and classes that outlive the file."""
    assert readings["held"] == 0


def test_poses_are_read_as_ever_after_all_attacks(readings: dict[str, Any]) -> None:
    assert readings["good"] == [POSITION.tolist(), YAW.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Mutated real pose files
# ---------------------------------------------------------------------------------------------------------------------


def real_pose_files() -> list[tuple[str, bytes]]:
    forms = [
        {"position": POSITION, "yaw": YAW},
        {"position": POSITION.astype("f4").tolist(), "yaw": list(YAW)},
        {"position": [*POSITION], "yaw": YAW[:, None], "more": {"a": (1, None, True, 2**70, b"x", {3})}},
    ]
    pickles = [pickle.dumps(form, protocol) for protocol in range(6) for form in forms]
    return [
        *((PKL, pickled) for pickled in pickles),
        *((PKL, as_numpy_1_wrote_it(pickled)) for pickled in pickles[::5]),
        (NPZ, npz(position=POSITION, yaw=YAW)),
        (JSON, json.dumps({"position": POSITION.tolist(), "yaw": YAW.tolist()}).encode()),
    ]


BASES = real_pose_files()
FRAGMENTS = [
    *(bytes([opcode]) for opcode in b"Rb\x81\x92\x93o021teusa()]}N\x85\x88\x94\x97\x98Q"),
    *(b"I01\n", b"K\x02", b"J\xff\xff\xff\xff", b"h\x00", b"h\x03", b"q\x02", b"C\x01x", b"P1\n", b"\x82\xf1"),
    *(name("posix", "mkdir"), name("numpy", "dtype"), name("numpy", "ndarray"), name("_codecs", "encode"), text("O8")),
    *(name("numpy.core.numeric", "_frombuffer"), b"ibuiltins\neval\n"),
]  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "cut", "splice"]),
        st.integers(0, 1 << 16),
        st.integers(0, 1 << 16),
        st.one_of(st.sampled_from(FRAGMENTS), st.binary(min_size=1, max_size=3)),
    ),
    min_size=1,
    max_size=4,
)


def mutate(content: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    for what, here, there, fragment in edits:
        start, (_, other) = here % (len(content) + 1), BASES[there % len(BASES)]
        before, after = content[:start], content[start:]
        content = {
            "flip": before + bytes([after[0] ^ (1 << there % 8)]) + after[1:] if after else before,
            "insert": before + fragment + after,
            "delete": before + after[1 + there % 8 :],
            "cut": before,
            "splice": before + other[here % len(other) :],
        }[what]
    return content


WATCHED: list[str] | None = None


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what no reader of poses has to do. An audit hook stays for the life of the process."""
    if WATCHED is None or (event == "import" and arguments[0].startswith("numpy")):
        return
    if event == "open":
        if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            WATCHED.append(f"open {arguments}")
    elif event.startswith(("os.", "subprocess.", "pickle.", "socket.", "shutil.", "ctypes.")) or event in (
        "exec",
        "import",
    ):
        WATCHED.append(f"{event} {arguments}")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for codec in ["ascii", "latin1", "unicode_escape", "raw_unicode_escape", "cp437", "utf-8-sig"] + [
        f"utf-{bits}{order}" for bits in (8, 16, 32) for order in ("", "-le", "-be") if order == "" or bits > 8
    ]:
        codecs.lookup(codec)  # imported by whoever comes first
    sys.addaudithook(watch)
    return tmp_path_factory.mktemp("mutated")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # pickletools
@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(BASES), EDITS)
def test_a_mutated_pose_file_gives_poses_or_an_input_error_and_nothing_else(
    scratch: Path, base: tuple[str, bytes], edits: list[tuple[str, int, int, bytes]]
) -> None:
    global WATCHED
    path = scratch / base[0]
    path.write_bytes(mutate(base[1], edits))
    WATCHED = []
    try:
        _, position, yaw, *_ = dino_cache.read_poses(path, "t")
    except dino_cache.InputError:
        pass
    else:
        assert position.dtype == yaw.dtype == np.float64
        assert position.shape == (len(yaw), 2)
        assert yaw.shape == (len(position),)
        assert len(yaw) > 0
        assert np.isfinite(position).all()
        assert np.isfinite(yaw).all()
    finally:
        events, WATCHED = WATCHED, None
    assert events == []


# ---------------------------------------------------------------------------------------------------------------------
# Files that are none
# ---------------------------------------------------------------------------------------------------------------------


def two_links(path: Path) -> None:
    path.symlink_to(path.with_suffix(".other"))
    path.with_suffix(".other").symlink_to(path)


def linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe"))


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def sparse_terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


NO_FILES: dict[str, Callable[[Path], Any]] = {
    "two links in a circle": two_links,
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to a pipe": linked_pipe,
    "a socket": listening,
    "a folder": Path.mkdir,
    "a terabyte of zeros": sparse_terabyte,
    "a link to a file of no size that is not empty": lambda path: path.symlink_to("/proc/self/environ"),
}


@pytest.mark.parametrize("checksum", ["stat", "content"])
@pytest.mark.parametrize("file_name", ["3.png", PKL])
def test_what_is_no_regular_file_fails_its_trajectory_and_is_not_waited_for(
    data: Path, tmp_path: Path, run_here: Callable[..., Outcome], file_name: str, checksum: str
) -> None:
    for title, make in NO_FILES.items():
        path = make_trajectory(data / title, 5) / file_name
        path.unlink()
        make(path)
    with no_hang():
        outcome = run_here(configure(data, tmp_path / "cache", checksum=checksum))
    assert outcome.code == 1, outcome.err
    progress = read_progress(tmp_path / "cache")
    assert progress["completed_trajectories"] == ["good"]
    assert sorted(progress["failures"]) == sorted(NO_FILES)
    for title, failure in progress["failures"].items():
        assert f"{title}/{file_name}" in failure["reason"]


@pytest.mark.slow
def test_links_that_lead_everywhere_are_refused_and_not_walked_for_ever(
    data: Path, tmp_path: Path, run_here: Callable[..., Outcome]
) -> None:
    """Twelve folders that each link to the others: 12! paths without a circle."""
    for number_ in range(12):
        (data / f"d{number_}").mkdir()
        for other in range(12):
            (data / f"d{number_}" / f"to{other}").symlink_to(data / f"d{other}")
    with no_hang():
        outcome = run_here(configure(data, tmp_path / "cache"))
    assert outcome.code == 2, outcome.err
    assert "links lead to this folder" in outcome.err


OWN_FILES = [
    *(".lock", ".lock.owner", ".staging", "dino_cache.log", "progress.json", "progress.json.bak"),
    *("progress.json.tmp", "progress.json.bak.tmp"),
]


@pytest.mark.parametrize("own", OWN_FILES)
def test_a_link_in_the_place_of_a_caches_own_file_is_not_written_through(
    data: Path, tmp_path: Path, run_here: Callable[..., Outcome], own: str
) -> None:
    """A cache folder can come with the data, and the data from a stranger."""
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    config = configure(data, cache)
    assert run_here(config).code == 0
    if own == ".staging":
        outside.mkdir()
        (outside / "own.txt").write_text("the user's own")
        (cache / own).rmdir()
    else:
        outside.write_bytes((cache / own).read_bytes() if own == "progress.json" else b"the user's own")
        (cache / own).unlink(missing_ok=True)
    before = tree(tmp_path) if outside.is_file() else tree(outside)
    (cache / own).symlink_to(outside)
    (data / "good" / "19.png").write_bytes((data / "good" / "0.png").read_bytes() + b" ")  # something to do
    edits = (["verify", "--repair", "--yes"], ["reset-failed"], ["rebuild", "--yes"], ["reset", "--yes"])
    codes = [
        run_here(config, "--force-rebuild").code,
        *(progress_utils.main([*edit, "--cache-dir", str(cache)]) for edit in edits),
        run_here(config).code,
    ]
    assert (codes == [2] * 6) == (own in (".lock", ".lock.owner", "dino_cache.log")), codes
    if outside.is_file():
        assert outside.read_bytes() == before["outside"]
    else:
        assert tree(outside) == before


# ---------------------------------------------------------------------------------------------------------------------
# Names that mislead
# ---------------------------------------------------------------------------------------------------------------------


def test_odd_names_are_names_like_any_other(data: Path, tmp_path: Path, run_here: Callable[..., Outcome]) -> None:
    for stamp, odd in enumerate(ODD_NAMES):
        make_trajectory(data / odd, 5, stamp=stamp)
    config, cache = configure(data, tmp_path / "cache"), tmp_path / "cache"
    for _ in range(2):  # the second run finds what the first one left
        outcome = run_here(config)
        assert outcome.code == 0, outcome.err
    assert sorted(read_progress(cache)["completed_trajectories"]) == sorted(["good", *ODD_NAMES])
    for stamp, odd in enumerate(ODD_NAMES):
        assert check_stamps(cache, odd, stamp) == 5


@pytest.mark.parametrize("alike", [("Case", "case"), (NFC, NFD)])
def test_names_that_the_caches_disk_takes_for_one_are_refused(
    data: Path, tmp_path: Path, run_here: Callable[..., Outcome], alike: tuple[str, str]
) -> None:
    for odd in alike:
        make_trajectory(data / odd, 5)
    config = configure(data, tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".LOCK").touch()  # as seen on a disk that does not tell it from .lock
    outcome = run_here(config)
    assert outcome.code == 2
    assert all(odd in outcome.err for odd in alike)
    (tmp_path / "cache" / ".LOCK").unlink()
    assert run_here(config).code == 0


def test_a_name_that_is_too_long_below_the_cache_fails_alone(
    data: Path, tmp_path: Path, run_here: Callable[..., Outcome]
) -> None:
    """Below the data folder the path just fits into the 4096 bytes that Linux takes; below the cache it does not."""
    room = 4095 - len(os.fsencode(data)) - len("/traj_data.pkl")
    long = "/".join(["x" * 200] * (room // 201))
    make_trajectory(data / long, 5)
    config = configure(data, tmp_path / ("cache" * 50))
    for attempt in (1, 2):
        outcome = run_here(config)
        assert outcome.code == 1, outcome.err[-500:]
        progress = read_progress(tmp_path / ("cache" * 50))
        assert progress["completed_trajectories"] == ["good"]
        assert list(progress["failures"]) == [long]
        assert "too long" in progress["failures"][long]["reason"]
        assert progress["failures"][long]["attempts"] == attempt


def test_a_split_takes_names_and_no_paths(data: Path, tmp_path: Path, run_here: Callable[..., Outcome]) -> None:
    outside = make_trajectory(tmp_path / "outside" / "t", 5)
    make_trajectory(data / "sub" / NFC, 5, stamp=1)
    missing = [
        "../outside/t",
        str(outside),
        "sub/../good",
        "./good",
        "good/.",
        "sub//good",
        "GOOD",
        f"sub/{NFD}",
        "*",
        "~",
    ]
    (tmp_path / "split.txt").write_text("\n".join([*missing, f"sub/{NFC}"]), encoding="utf-8")
    outcome = run_here(configure(data, tmp_path / "cache", tmp_path / "split.txt"))
    assert outcome.code == 0, outcome.err
    assert read_progress(tmp_path / "cache")["completed_trajectories"] == [f"sub/{NFC}"]
    assert f"{len(missing)} names of the split are not in the data folder" in outcome.err
    for absent in missing:
        assert absent.strip("/") in outcome.err


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["tokens", "image_size", "weights", "datasets"])
def test_a_configuration_of_lists_of_lists_of_lists_is_refused_in_few_words(
    data: Path, tmp_path: Path, run_here: Callable[..., Outcome], key: str
) -> None:
    config = configure(data, tmp_path / "cache")
    bomb = "[&a [x, x, x, x, x, x, x, x, x, x]"  # ten to the tenth in the end
    for before, anchor in zip("abcdefgh", "bcdefghi"):
        bomb += f", &{anchor} [{', '.join([f'*{before}'] * 10)}]"
    content = yaml.safe_load(config.read_text())
    content.pop(key, None)
    config.write_text(yaml.safe_dump(content) + f"{key}: {bomb}]\n")
    with no_hang():
        outcome = run_here(config)
    assert outcome.code == 2
    assert key in outcome.err
    assert len(outcome.err) < 3000


# ---------------------------------------------------------------------------------------------------------------------
# All of it together
# ---------------------------------------------------------------------------------------------------------------------


def everything_outside(root: Path, cache: Path) -> dict[str, tuple[Any, ...]]:
    """Path -> what can be told of it, for everything below `root` but the cache."""
    seen = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if Path(folder, name) != cache]
        for path in (Path(folder), *(Path(folder, file) for file in files)):
            status = path.lstat()
            is_read = path.is_file() and not path.is_symlink() and status.st_size < 1 << 30
            content = hashlib.sha256(path.read_bytes()).hexdigest() if is_read else None
            mtime = None if path == root else status.st_mtime_ns  # the cache folder itself is made here
            seen[str(path)] = (status.st_mode, status.st_size, mtime, status.st_nlink if is_read else None, content)
    return seen


def test_nothing_is_written_outside_the_cache_whatever_the_data(
    data: Path, tmp_path: Path, run_here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number_, (file_name, content) in enumerate(
        [
            *((PKL, pickled) for pickled in attacks(str(tmp_path / "marker")).values()),
            *((PKL, pickled) for pickled in executing(str(tmp_path / "marker")).values()),
            (NPZ, npz(position=attacks(str(tmp_path / "marker"))["os.system"], yaw=YAW)),
        ]
    ):
        folder = make_trajectory(data / f"attack{number_}", 3)
        (folder / PKL).unlink()
        (folder / file_name).write_bytes(content)
    for title, make in NO_FILES.items():
        path = make_trajectory(data / title, 3) / "2.png"
        path.unlink()
        make(path)
    for odd in (*ODD_NAMES, ".staging/t", "progress.json", "dino_cache.log"):
        make_trajectory(data / odd, 3)
    make_trajectory(tmp_path / "elsewhere" / "t", 3)
    (data / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    cache = tmp_path / "cache"
    config = configure(data, cache)
    before = everything_outside(tmp_path, cache)
    for arguments in ([], ["--force-rebuild"]):
        assert run_here(config, *arguments).code == 1
        assert everything_outside(tmp_path, cache) == before
    assert not (tmp_path / "marker").exists()
