"""progress_utils.py report: what the page says, that it needs nothing else, and that names in it stay text."""

import base64
import html
import io
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
from dino_cache_extras.commands.report_failures import failure_causes
from progress_utils import cache_lock
from support import (
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


def test_without_matplotlib_the_install_command_is_named_and_nothing_is_written(lab, monkeypatch, capsys):
    make_trajectory(lab.data / "a", 20, stamp=1)
    lab.run()
    before = tree(lab.cache)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lab.report(code=2)
    assert "pip install -r requirements-report.txt" in capsys.readouterr().err
    assert not lab.page.exists()
    assert tree(lab.cache) == before
