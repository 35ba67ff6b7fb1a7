"""progress_utils.py report: what the page says, that it needs nothing else, and that names in it stay text."""

import base64
import html
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import PIL.Image
import pytest
import torch
from formats_support import WRITERS, write_recon, write_videos

import dino_cache
import progress_utils
from dino_cache_extras import chunk_files
from dino_cache_extras.commands import report as report_command
from dino_cache_extras.commands import report_facts
from dino_cache_extras.commands.report_failures import failure_causes, known_cause
from progress_utils import cache_lock
from support import (
    ROOT,
    BitEncoder,
    Rendered,
    make_trajectory,
    read_progress,
    straight_line,
    tree,
    write_config,
    write_frame,
    write_gnm,
)

FRAMES = 40  # 0.25 m apart, five full batches of 8


class Lab:
    """A dataset, its cache, and the page that is made of it."""

    def __init__(self, folder: Path, run: Callable[..., object]):
        self.data, self.cache, self.page = folder / "data", folder / "data" / "dino_cache_small", folder / "r.html"
        self._config, self._run = folder / "c.yaml", run

    def run(self, **settings: object) -> None:
        self._run(write_config(self._config, self.data, **settings))

    def report(self, *arguments: str, code: int = 0) -> str:
        command = ["report", "--cache-dir", str(self.cache), "-o", str(self.page), *arguments]
        assert progress_utils.main(command) == code
        return self.page.read_text() if code == 0 else ""


@pytest.fixture
def lab(tmp_path, run_here) -> Lab:
    return Lab(tmp_path, run_here)


VOID = ("meta", "img", "br")  # elements that have no end


class Page(HTMLParser):
    """The elements of a page: (tag, attributes); AssertionError where a tag is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag


def words(page: str) -> str:
    """What a reader sees of a page, without its figures."""
    page = re.sub(r"<(svg|style).*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def test_the_page_says_what_the_cache_holds(lab):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    jump = straight_line(FRAMES)
    jump[20:, 1] = 50.0
    make_trajectory(lab.data / "b", FRAMES, stamp=2, position=jump)
    make_trajectory(lab.data / "c", FRAMES, stamp=3, position=np.full((FRAMES, 2), np.nan))
    lab.run()
    text = words(lab.report())
    chunks = read_progress(lab.cache)["total_chunks"]
    for fact in (
        "2 completed trajectories of 3 (66.7%)",
        "1 failed trajectories",
        "80 frames each counted once",
        f"{chunks} chunks",
        "1 pose jumps trajectories with one or more",
        "none time left idle",
        "c/traj_data.pkl: position[0, 0] is nan",
        "The weights are random",
        "b 6 chunks, 1 pose jump",
        "max_chunk_distance_m 2.0",
        f"data folder {lab.data}",
    ):
        assert fact in text, fact


def test_the_page_needs_no_network_no_script_and_no_other_file(lab):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    lab.run(tokens=["cls", "patch"])
    page = lab.report()
    elements = Page(page).elements
    assert {"svg", "img", "table"} <= {tag for tag, _ in elements}
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in elements}
    for _, attributes in elements:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/", "#"))
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(page) < 500_000


HOSTILE = "<img src=x onerror=alert(1)>&\"' $x^2$ <script>\x1b[31m"


def test_names_and_reasons_stay_text(lab):
    make_trajectory(lab.data / HOSTILE, FRAMES, stamp=1)
    make_trajectory(lab.data / ("broken" + HOSTILE), 3, position=np.zeros((3, 2)))
    lab.run(tokens=["cls", "patch"])
    page = lab.report()
    elements = Page(page).elements
    assert all(attributes.get("src", "data:").startswith("data:") for _, attributes in elements)
    assert "script" not in {tag for tag, _ in elements}
    assert HOSTILE.replace("\x1b", "\\x1b") in words(page)
    assert "\x1b" not in page


@pytest.mark.parametrize("tokens", [["cls"], ["patch"]], ids=str)
def test_a_frozen_and_a_shuffled_camera_are_named_and_a_good_one_is_not(lab, tokens):
    for stamp, name in enumerate(("good", "frozen", "shuffled", "stands"), start=100):
        position = straight_line(FRAMES)
        if name == "stands":
            position[10:20] = position[10]  # no camera can see anything new
        make_trajectory(lab.data / name, FRAMES, stamp=stamp, position=position)
    for number in range(10, 20):
        for name, stamp in (("frozen", 101), ("stands", 103)):
            write_frame(lab.data / name / f"{number}.png", stamp, 10)
    for number, shown in enumerate(np.random.default_rng(1).permutation(FRAMES)):
        write_frame(lab.data / "shuffled" / f"{number}.png", 102, int(shown))
    lab.run(tokens=tokens)
    cards = {}
    for card in lab.report().split("<figure"):
        if "cosine similarity" in card:
            cards[re.search(r"<b>(\w+)</b>", card)[1]] = words(card.split("</figure>")[0])
    assert "frozen camera? frames 10 to 19 are alike" in cards["frozen"]
    assert "out of order?" in cards["shuffled"]
    assert not any("?" in cards[name] for name in ("good", "stands"))
    assert "out of order?" not in cards["frozen"]
    assert "frozen" not in cards["shuffled"].removeprefix(" shuffled")


def pictures(page: str) -> list[tuple[int, np.ndarray | None, np.ndarray]]:
    """(frame's number in the caption, frame, patches) of each pair of pictures, as (h, w, 3) integers."""
    found = []
    for card in page.split('<div class="pair">')[1:]:
        images = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]*)", card.split("</figure>")[0])]
        arrays = [np.asarray(PIL.Image.open(io.BytesIO(data))).astype(int) for data in images]
        number = int(re.search(r"frame (\d+), 2 x 3 patches", card)[1])
        found.append((number, arrays[0] if len(arrays) > 1 else None, arrays[-1]))
    return found


def test_patch_tokens_stand_beside_the_frame_that_they_are_of(lab):
    for stamp in (1, 2, 3, 4):
        make_trajectory(lab.data / f"t{stamp}", FRAMES, stamp=stamp * 50)
    lab.run(tokens=["patch"], frame_stride=2)
    shown = pictures(lab.report())
    assert len(shown) == 6
    seen = set()
    for number, frame, patches in shown:
        assert number in (12, 26)  # a third and two thirds of 20 kept frames: 6 and 13
        assert frame.shape == (28, 42, 3)
        assert np.abs(frame[..., 2] - number).max() <= 8  # blue is the frame's number, red 50 times the trajectory's
        stamp = round(frame[..., 0].mean() / 50)
        assert np.abs(frame[..., 0] - 50 * stamp).max() <= 8
        assert patches.shape == (2, 3, 3)
        assert (patches == patches[0, 0]).all()  # all patches of a stamped frame are one
        seen.add((stamp, tuple(patches[0, 0])))
    assert len({stamp for stamp, _ in seen}) == 3
    assert len(seen) == 6  # and no two of these frames are


def bits_of(frame: np.ndarray) -> tuple[int, int]:
    """Stamp and number that a frame (28, 42, 3) shows."""
    ((stamp, high, low),) = BitEncoder().stamps(torch.from_numpy(frame).permute(2, 0, 1)[None]).tolist()
    return stamp, high * 256 + low


@pytest.mark.parametrize(
    "kind", ["recon", "lerobot v3.0 h264", "lerobot v2.1 images", "video and tum", "video and csv"]
)
def test_frames_of_every_format_stand_beside_their_patch_tokens(lab, run_bits, tmp_path, kind):
    names = WRITERS[kind][1](lab.data, [Rendered(1, 40), Rendered(2, 27)])
    assert run_bits(frame_stride=2, tokens=["patch"]).code == 0
    lab.cache = tmp_path / "cache"
    page = lab.report()
    shown = [(bits_of(frame), number) for number, frame, _ in pictures(page)]
    assert shown == [((1, 12), 12), ((1, 26), 26), ((2, 8), 8), ((2, 18), 18)]  # of 20 and 14 kept frames
    assert re.findall(r"<figcaption><b>(\w+)</b> frame", page) == [names[0]] * 2 + [names[1]] * 2


def test_frames_are_those_of_the_camera_and_the_format_of_the_run(lab, run_bits, tmp_path):
    write_recon(lab.data, [Rendered(1, 40)])
    write_recon(tmp_path / "other", [Rendered(7, 40)])
    with h5py.File(tmp_path / "other" / "t7.r01.hdf5") as other, h5py.File(lab.data / "t1.r01.hdf5", "r+") as file:
        other.copy("images/rgb_left", file["images"], "rear")
    write_gnm(lab.data, [Rendered(2, 40)])  # so that the folder could be of two formats
    assert run_bits({"format": "recon", "image_key": "images/rear"}, tokens=["patch"]).code == 0
    lab.cache = tmp_path / "cache"
    assert [bits_of(frame) for _, frame, _ in pictures(lab.report())] == [(7, 13), (7, 26)]


def test_frames_that_would_be_long_to_find_are_not_shown_and_the_page_says_so(lab, run_bits, tmp_path, monkeypatch):
    write_videos(lab.data, [Rendered(1, 40)])
    assert run_bits(tokens=["patch"]).code == 0
    lab.cache = tmp_path / "cache"
    monkeypatch.setattr(report_command, "REPORT_FRAME_FILE_BYTES", 1000)
    page = lab.report()
    assert [frame for _, frame, _ in pictures(page)] == [None, None]
    assert "Frames of t1 are not shown" in words(page)


def test_frames_are_found_where_they_moved_to_and_the_page_says_if_not(lab, tmp_path):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    lab.run(tokens=["cls", "patch"])
    cache = shutil.copytree(lab.cache, tmp_path / "cache")
    moved = lab.data.rename(tmp_path / "moved")
    lab.cache = cache
    page = lab.report()
    assert [frame for _, frame, _ in pictures(page)] == [None, None]
    assert "--data-folder" in words(page)
    page = lab.report("--data-folder", str(moved))
    assert all(frame is not None for _, frame, _ in pictures(page))
    assert "--data-folder" not in words(page)


def test_a_large_cache_is_sampled_always_the_same_way_and_the_page_says_so(lab, monkeypatch):
    monkeypatch.setattr(report_facts, "REPORT_CHUNKS", 10)
    monkeypatch.setattr(report_facts, "REPORT_TRAJECTORIES", 2)
    monkeypatch.setattr(report_command, "REPORT_TRAJECTORIES", 2)
    for number in range(7):
        make_trajectory(lab.data / f"t{number}", 20, stamp=number)
    lab.run(tokens=["cls", "patch"])
    opened = []
    header = chunk_files.read_chunk_header
    monkeypatch.setattr(chunk_files, "read_chunk_header", lambda *a, **k: opened.append(a) or header(*a, **k))
    page = lab.report()
    assert len(opened) <= 10 + 2 * 3 + 4
    assert "A seeded sample of 2 of 7." in words(page)
    assert "Travelled distance of 7 of 21 chunks" in words(page)  # every third
    assert "Length of all chunks" in words(page)
    again = lab.report()
    stamp = re.compile(r"dino_cache report of [^<]*")
    assert stamp.sub("", again) == stamp.sub("", page)


def set_working_time(cache: Path, seconds: float) -> None:
    progress = progress_utils.Progress.load(cache)
    progress.elapsed_s = seconds
    progress.save()


def test_the_rate_is_that_of_the_last_night(lab, monkeypatch):
    """A chunk every 10 s: 40 frames of two trajectories; the first chunk has 9 of them."""
    clock = SimpleNamespace(now=1_700_000_000)

    def gmtime() -> time.struct_time:
        clock.now += 10
        return time.gmtime(clock.now)

    monkeypatch.setattr(dino_cache, "time", SimpleNamespace(**{**vars(time), "gmtime": gmtime}))
    make_trajectory(lab.data / "a", 20, stamp=1)
    lab.run()
    clock.now += 86400
    make_trajectory(lab.data / "b", 20, stamp=2)
    make_trajectory(lab.data / "c", 20, stamp=3)
    lab.run()
    set_working_time(lab.cache, 120.0)  # of all runs: the clock of the chunks is not that of the log
    page = words(lab.report())
    assert "0.6 frames/s rate mean of the last night" in page  # (40 - 9) / 50 s
    begin, end = (time.strftime("%H:%M", time.localtime(clock.now - before)) for before in (50, 0))
    assert re.search(f"Rate of the last night, \\w+ \\d+ \\w+ {begin} to {end}", page)


def test_the_time_left_is_that_of_the_run_at_work(lab, monkeypatch):
    make_trajectory(lab.data / "a", 20, stamp=1)
    lab.run()
    monkeypatch.setattr(progress_utils, "HEARTBEAT_INTERVAL_S", 0.0)
    with cache_lock(lab.cache):
        state = progress_utils.RunState(1, 8, 3, 360.0, 180_000, 25.0, "b")
        progress_utils.Heartbeat(lab.cache).beat(lambda: state)
        assert "2.0 h time left running" in words(lab.report())


def test_failures_of_one_cause_are_one_group():
    reasons = {
        "lab/t1": "lab/t1/0.jpg: cannot decode 4000 bytes: premature end",
        "lab/t2": "lab/t2/117.jpg: cannot decode 3 bytes: premature end",
        "lab/t3": "lab/t3/traj_data.pkl: position[2, 1] is nan",
        "lab/t4": "lab/t4/traj_data.pkl: position[17, 0] is nan",
        "lab/t5": "lab/t5/traj_data.pkl: position[0, 0] is nan",
        "lab/t6": "lab/t6: insufficient movement: 0.01 m in all",
    }
    what = {"error_type": "InputError", "attempts": 1, "time": 0.0, "checksum": None, "checksum_kind": "stat"}
    causes = failure_causes({name: {"reason": reason, **what} for name, reason in reasons.items()})
    assert [[name for name, _ in members] for members in causes.values()] == [
        ["lab/t3", "lab/t4", "lab/t5"],
        ["lab/t1", "lab/t2"],
        ["lab/t6"],
    ]
    assert next(iter(causes)) == "*.pkl: position[#, #] is nan"


def test_a_damaged_chunk_is_named_and_the_rest_is_shown(lab):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    make_trajectory(lab.data / "b", FRAMES, stamp=2)
    lab.run()
    path = lab.cache / "b" / "chunk_00001.h5"
    path.write_bytes(b"damaged")
    text = words(lab.report())
    assert f"{path}: has no seal" in text
    assert "a 6 chunks" in text


def test_a_trajectory_of_one_frame_has_a_map(lab):
    make_trajectory(lab.data / "a", 1, stamp=1)
    lab.run(min_chunk_distance_m=0.0, tokens=["cls", "patch"])
    assert "a 1 chunk" in words(lab.report())


def test_a_cache_without_completed_trajectories_has_a_report(lab):
    make_trajectory(lab.data / "a", 3, position=np.zeros((3, 2)))
    lab.run()
    text = words(lab.report())
    assert "0 completed trajectories" in text
    assert "insufficient movement" in text


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_without_a_library_the_install_command_is_named_and_nothing_is_written(lab, monkeypatch, capsys, library):
    make_trajectory(lab.data / "a", 20, stamp=1)
    lab.run()
    before = tree(lab.cache)
    monkeypatch.setitem(sys.modules, library, None)
    lab.report(code=2)
    assert "pip install -r requirements-report.txt" in capsys.readouterr().err
    assert not lab.page.exists()
    assert tree(lab.cache) == before


# ---------------------------------------------------------------------------------------------------------------------
# The verdict, failures in plain words, what was left out
# ---------------------------------------------------------------------------------------------------------------------


def first_lines(page: str) -> str:
    """The verdict with its commands, as a reader sees it."""
    return words(re.search(r'<div class="verdict.*?</div>', page, flags=re.DOTALL)[0])


def test_the_page_begins_with_a_verdict_and_what_to_type(lab):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    make_trajectory(lab.data / "b", FRAMES, stamp=2)
    lab.run()
    said = first_lines(lab.report())
    assert "OK 2 of 2 trajectories completed, 0 failed, 0 left" in said
    assert f"python progress_utils.py verify --cache-dir {lab.cache} --deep" in said
    make_trajectory(lab.data / "c", 3, position=np.zeros((3, 2)))
    lab.run()
    said = first_lines(lab.report())
    assert "PARTIAL 2 of 3 trajectories completed, 1 failed, 0 left" in said
    assert f"python progress_utils.py reset-failed --cache-dir {lab.cache}" in said
    assert "python dino_cache.py --config my.yaml --dataset robot" in said
    with cache_lock(lab.cache):
        assert f"python progress_utils.py show --cache-dir {lab.cache} --watch" in first_lines(lab.report())
    progress_utils.main(["reset-failed", "--cache-dir", str(lab.cache)])
    owner = {"pid": 1, "host": "<h>", "started": "today"}
    (lab.cache / progress_utils.LOCK_OWNER_FILE).write_text(json.dumps(owner))  # as one that was killed leaves it
    said = first_lines(lab.report())
    assert (
        "STOPPED a run was killed (pid 1 on <h>, since today); 2 of 3 trajectories completed, 0 failed, 1 left" in said
    )
    assert "python dino_cache.py --config my.yaml --dataset robot" in said
    (lab.cache / "a" / "chunk_00002.h5").write_bytes(b"damaged")
    said = first_lines(lab.report())
    assert "DAMAGED 1 of the chunk files looked into is not as recorded" in said
    assert f"verify --cache-dir {lab.cache} --deep" in said


def test_the_verdict_on_nothing_and_on_work_that_is_left(lab, tmp_path, run_here):
    make_trajectory(lab.data / "a", 3, position=np.zeros((3, 2)))
    lab.run()
    assert "FAILED 0 of 1 trajectories completed, 1 failed, 0 left" in first_lines(lab.report())
    (lab.data / "a").rename(tmp_path / "parked")
    for name in ("b", "c"):
        make_trajectory(lab.data / name, FRAMES, stamp=2)
    assert run_here(tmp_path / "c.yaml", "--limit", "1").code in (1, 5)
    progress_utils.main(["reset-failed", "--cache-dir", str(lab.cache)])
    said = first_lines(lab.report())
    assert "STOPPED 1 of 2 trajectories completed, 0 failed, 1 left" in said
    assert "python dino_cache.py --config my.yaml" in said
    assert progress_utils.main(["reset", "--yes", "--cache-dir", str(lab.cache)]) == 0
    said = first_lines(lab.report())
    assert said.split()[0] in ("EMPTY", "STOPPED")
    assert "python dino_cache.py" in said


def failure_cards(page: str) -> dict[str, str]:
    """Title -> text of each cause on the page."""
    parts = re.findall(r'<div class="failure">(.*?)</div>', page, flags=re.DOTALL)
    return {words(re.search(r"<h3>(.*?)</h3>", part, flags=re.DOTALL)[1]): words(part) for part in parts}


def test_failures_have_plain_causes_and_what_mends_them(lab):
    for stamp, name in enumerate(("parked", "mm", "cut", "empty", "nan", "nan2"), start=1):
        make_trajectory(lab.data / name, FRAMES, stamp=stamp)
    shutil.rmtree(lab.data / "parked"), shutil.rmtree(lab.data / "mm")
    make_trajectory(lab.data / "parked", FRAMES, position=np.zeros((FRAMES, 2)))
    make_trajectory(lab.data / "mm", FRAMES, position=1000 * straight_line(FRAMES))
    for name in ("nan", "nan2"):
        shutil.rmtree(lab.data / name)
        make_trajectory(lab.data / name, FRAMES, position=np.full((FRAMES, 2), np.nan))
    picture = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(picture, "JPEG")
    (lab.data / "cut/7.png").unlink()
    (lab.data / "cut/7.jpg").write_bytes(picture.getvalue()[: picture.tell() // 2])
    (lab.data / "empty/7.png").write_bytes(b"")
    lab.run()
    cards = failure_cards(lab.report())
    assert next(iter(cards)) == "2 Values missing in the poses (NaN)"
    for title, remedy in (
        ("1 Positions in millimetres?", "set position_scale (0.001 for millimetres"),
        ("1 Parked robot", "take it out with a split"),
        ("1 Cut JPEG", "Copy the picture again from the robot"),
        ("1 Empty picture", "Copy the picture again"),
        ("2 Values missing in the poses (NaN)", "the rows that it names"),
    ):
        assert remedy in cards[title], title
    assert len(cards) == 5
    assert "nan/traj_data.pkl: position[0, 0] is nan" in cards["2 Values missing in the poses (NaN)"]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("t: insufficient movement: 2 steps are longer than max_chunk_distance_m 2.0 and", "positions jump?"),
        ("t: insufficient movement: 12 steps are longer than max_chunk_distance_m 2.0 and", "millimetres?"),
        ("t: insufficient movement: 0.01 m in all, less than min_chunk_distance_m 0.3", "Parked robot"),
        ("t/0.jpg: cannot be read: [Errno 28] No space left on device", "No space"),
        ("t/0.jpg: cannot be read: [Errno 13] Permission denied: '/data/t/0.jpg'", "No access"),
        ("t/0.jpg: cannot be read: [Errno 5] Input/output error", "Disk or mount"),
        ("t: no pose file; expected one of traj_data.pkl, traj_data.npz", "No poses"),
        ("t: 40 frames (0.jpg ... 39.jpg) but 41 poses in traj_data.pkl", "differ in number"),
        ("t: frame 3 is missing between 2.jpg and 4.jpg", "A frame is missing"),
        ("t: the first frame is 7.jpg; numbers must begin at 0 or 1", "numbered or named otherwise"),
        ("t/traj_data.pkl: position[3, 0] is 2e9; expected metres, at most 1e+08", "outside the world"),
        ("t/traj_data.pkl: position[3, 0] is inf", "Values missing"),
        ("t/traj_data.pkl: has no yaw; its keys are position, heading", "called otherwise"),
        ("t/traj_data.pkl: yaw_deg is in degrees by its name, and yaw_unit is radians; set", "contradict"),
        ("t/t.csv: 3 of 40 poses lie inside the video: they are at 0 to 1 s, its frames at", "do not fit"),
        ("t/0.png: cannot decode 700 bytes: Truncated File Read", "Cut picture"),
        ("t/0.jpg: cannot decode 20 bytes: not a JPEG, PNG, WebP or BMP image", "Not a picture"),
        ("t/0.png: cannot decode 9 bytes: it claims 99999x99999 px; more than 8 pixels are refused", "refused"),
        ("t/t.mp4: cannot read the video: InvalidDataError: moov atom not found", "Cut video"),
        ("t/t.bag: is cut or damaged: 3 chunks; rosbag reindex may mend it", "Cut bag"),
        ("t: features of frame 3 are not finite", "not finite"),
        ("t: something else went wrong with permission", None),
        ("t/0.jpg: there is no room on the shelf", None),
    ],
)
def test_a_reason_has_its_cause_or_none(reason, expected):
    cause = known_cause(reason, "t")
    assert cause is None if expected is None else expected in cause.words
    assert cause is None or cause.remedy


@pytest.mark.parametrize("name", ["Permission denied", "lab/No space left", ": cannot decode 0 bytes"])
def test_a_trajectorys_name_is_no_cause(name):
    assert known_cause(f"{name}: something new", name) is None
    assert known_cause(f"/data/{name}/poses.csv: something new", name) is None
    assert known_cause(f"{name}/traj_data.pkl: position[0, 0] is nan", name).words.startswith("Values missing")


FAULT = {"error_type": "InputError", "attempts": 1, "time": 1.7e9, "checksum": None, "checksum_kind": "stat"}


def record_failures(cache: Path, reasons: dict[str, str]) -> None:
    progress = progress_utils.Progress.load(cache)
    for name, reason in reasons.items():
        progress.fail(name, {"reason": reason, **FAULT})
    progress.save()


def test_an_unknown_reason_is_shown_as_it_is(lab):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    lab.run()
    record_failures(lab.cache, {"x": "x: the moon was <in> the way, 17 times"})
    (card,) = failure_cards(lab.report()).items()
    assert card[0] == "1 InputError: the moon was <in> the way, # times"
    assert "x: the moon was <in> the way, 17 times" in card[1]
    assert "No known cause" in card[1]


def test_ten_thousand_failures_are_counted_and_some_shown(lab):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    lab.run()
    letters = "abcdefghij"
    reasons = {f"p{number}": f"p{number}: insufficient movement: 0 m in all" for number in range(9_900)}
    for number in range(100):  # each a cause of its own, since digits do not count
        own = letters[number // 10] + letters[number % 10]
        reasons[f"u{number}"] = f"u{number}: an odd thing of kind {own} " + "and so on " * 1000
    record_failures(lab.cache, reasons)
    page = lab.report()
    text = words(page)
    assert "10,000 failed, by cause" in text
    assert "9,900 Parked robot" in text
    assert "... and 9,880 more; progress_utils.py show --all lists them" in text
    assert "... and 71 more causes" in text
    assert len(page) < 500_000


def test_folders_without_poses_are_named_while_the_last_run_left_them_out(lab):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    make_trajectory(lab.data / "<b>bold", FRAMES, stamp=2)
    poses = next((lab.data / "<b>bold").glob("traj_data*"))
    kept = poses.read_bytes()
    poses.unlink()
    lab.run()
    assert "1 folders hold frames but no pose file, left out: <b>bold" in words(lab.report())
    poses.write_bytes(kept)
    lab.run()
    assert "left out" not in words(lab.report())


# ---------------------------------------------------------------------------------------------------------------------
# Runs and their rate
# ---------------------------------------------------------------------------------------------------------------------


def rate_of(page: str) -> str:
    return re.search(r"(\S+) frames/s rate (.*?) none time left", words(page))[0]


@pytest.fixture
def chunk_clock(monkeypatch) -> SimpleNamespace:
    """The time that chunks say they were made at: 10 s on from one to the next."""
    clock = SimpleNamespace(now=1_700_000_000)

    def gmtime() -> time.struct_time:
        clock.now += 10
        return time.gmtime(clock.now)

    monkeypatch.setattr(dino_cache, "time", SimpleNamespace(**{**vars(time), "gmtime": gmtime}))
    return clock


def two_runs(lab: Lab, clock: SimpleNamespace) -> tuple[float, float]:
    """Two runs ten minutes apart, 20 and 40 frames; when the second one began and ended, by the chunks' clock."""
    make_trajectory(lab.data / "a", 20, stamp=1)
    lab.run()
    clock.now += 600
    begin = clock.now + 5
    make_trajectory(lab.data / "b", 20, stamp=2)
    make_trajectory(lab.data / "c", 20, stamp=3)
    lab.run()
    return begin, clock.now + 5


def test_the_time_between_two_runs_is_no_work(lab, chunk_clock):
    begin, end = two_runs(lab, chunk_clock)
    log = lab.cache / "dino_cache.log"
    log.write_text(log_lines((1_700_000_000, 1_700_000_040), (begin, end)))
    page = lab.report()
    assert rate_of(page).startswith(f"{40 / (end - begin):.1f} frames/s rate last run, ")
    log.write_text(log_lines((1_700_000_000, 1_700_000_040), (begin, end), is_killed=True))
    last = end - 5  # when the last chunk was made
    assert rate_of(lab.report()).startswith(f"{40 / (last - begin):.1f} frames/s rate last run, ")
    log.unlink()
    set_working_time(lab.cache, 8.0)  # of both runs; 51 frames are of chunks after the first one
    assert rate_of(lab.report()).startswith(f"{51 / 8:.1f} frames/s rate mean of the last night")


def log_lines(*runs: tuple[float, float], is_killed: bool = False) -> str:
    """What the log says of runs, each from its begin to its end."""

    def line(at: float, text: str) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S,000 INFO ", time.localtime(at)) + text + "\n"

    text = ""
    for begin, end in runs:
        text += line(begin, time.strftime("dino_cache 0.2.0, %Y-%m-%d %H:%M:%S", time.localtime(begin)))
        text += line((begin + end) / 2, "Failed: x") + "Traceback (most recent call last):\n"
        if not is_killed:
            text += line(end, "robot: 3/3 trajectories completed, 0 failed, 9 chunks")
        text += line(end + 300, "robot: format gnm (a/traj_data.pkl)")  # of the next one, which loads a model then
    return text


def test_the_rate_is_the_recorded_one_where_a_run_recorded_it(lab, chunk_clock):
    begin, end = two_runs(lab, chunk_clock)
    (lab.cache / "dino_cache.log").unlink()  # its clock is another
    runs = [
        {"start": 1_700_000_000, "end": 1_700_000_040.0, "exit_code": 1, "completed": 1, "failed": 0},
        {"start": begin, "end": end, "exit_code": 0, "frames": 584, "seconds": 40.0, "frames_per_s": 15, "failed": 0},
    ]
    write_runs(lab.cache, runs)
    page = lab.report()
    assert rate_of(page).startswith("14.6 frames/s rate last run, ")
    assert len(re.findall("<rect class", page)) == 2
    write_runs(lab.cache, [*runs, {"start": end + 99, "exit_code": 3, "error": "disk <gone>", "left": 2}])
    page = lab.report()
    assert "STOPPED the last run: stopped by storage, device or an unexpected error (exit 3): disk <gone>" in words(
        page
    )
    write_runs(lab.cache, [*runs, {"start": end + 99, "exit_code": 3, "error": None, "left": 0}])
    assert first_lines(lab.report()).startswith(" OK")  # another cache of that configuration had the fault


def write_runs(cache: Path, runs: list[object]) -> None:
    (cache / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))


def test_runs_that_are_none_are_passed_over(lab):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    lab.run()
    (lab.cache / "dino_cache.log").unlink()
    now = int(time.time())
    runs = [
        *({"start": now - 86400 * day, "exit_code": 0, "frames_per_s": 5 + day} for day in range(60)),
        *(17, [], None, {}, {"start": "<script>"}, {"start": True}, {"start": float("nan")}, {"start": 1e300}),
        {"start": now - 9 * 86400 + 60, "end": "<b>", "exit_code": [], "frames": -1, "failed": "2", "seconds": {}},
    ]
    write_runs(lab.cache, runs)
    with (lab.cache / "runs.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n" + b"[" * 100_000 + b'\n{"start": 17')
    page = lab.report()
    Page(page)
    assert len(re.findall("<rect class", page)) == 29 + 1  # of four weeks, and the odd one
    assert "<script>" not in page


# ---------------------------------------------------------------------------------------------------------------------
# For everybody
# ---------------------------------------------------------------------------------------------------------------------


def test_the_page_is_in_order_for_those_who_do_not_see_it(lab):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    make_trajectory(lab.data / "b", FRAMES, stamp=2)
    make_trajectory(lab.data / "c", 3, position=np.zeros((3, 2)))
    lab.run(tokens=["cls", "patch"])
    elements = Page(lab.report()).elements
    tags = [tag for tag, _ in elements]
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in zip(levels, levels[1:]))
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len({*ids})
    for tag, attributes in elements:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if reference := attributes.get("aria-labelledby"):
            assert reference in ids
        if (use := attributes.get("xlink:href", "")).startswith("#"):
            assert use[1:] in ids
    assert tags.count("table") == tags.count("caption") >= 2
    assert ("html", {"lang": "en"}) in elements
    assert {"header", "main", "footer"} <= {*tags}


def luminance(colour: str) -> float:
    """Of #rgb or #rrggbb, as WCAG 2 has it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out(scheme):
    style = (report_command.TEMPLATES / "style.css.jinja").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)[scheme]))
    pairs = [
        (text, back, 4.5) for text in ("ink", "soft", "warn", "good", "bad", "doubtful") for back in ("back", "card")
    ]
    pairs += [(text, "bad-card", 4.5) for text in ("ink", "soft", "bad")]
    pairs += [(line, "card", 3.0) for line in ("blue", "orange", "green", "red", "purple", "slate")]
    for text, back, least in pairs:
        low, high = sorted((luminance(colours[text]), luminance(colours[back])))
        assert (high + 0.05) / (low + 0.05) >= least, (text, back)


def test_a_cache_of_the_first_version_has_a_report(lab, tmp_path):
    lab.cache = shutil.copytree(ROOT / "tests/pinned/gnm/cache", tmp_path / "old")
    page = lab.report()
    Page(page)
    text = words(page)
    assert "OK 1 of 1 trajectories completed, 0 failed" in text
    assert "t3 3 chunks" in text
    assert "Runs of the last weeks" not in text  # it has no log, nor runs.jsonl


def test_a_cache_without_poses_has_a_report(lab):
    make_trajectory(lab.data / "a", FRAMES, stamp=1)
    lab.run(chunk_by="frames", max_chunk_frames=10, overlap_frames=0)
    text = words(lab.report())
    assert "not looked for: chunk_by: frames" in text
    assert first_lines(lab.report()).split()[0] == "OK"
