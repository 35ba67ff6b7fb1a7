"""benchmarks/: what a figure is made of; real processes, and a checkout of a few lines where no model is needed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import ceiling
import instant_run
import workload

# A version of the program that lists frames and encodes them, 32 at a time; {fault} goes before the last batch.
SMALL_CHECKOUT = """
import json, sys
from pathlib import Path
from typing import NamedTuple
class CacheSpec:
    model_fields = {{"weights": None, "tokens": None}}
    dino_model_type, image_size = "small", (56, 56)
class RunOptions:
    model_fields = {{"device": None}}
class EncodedRows(NamedTuple):
    tokens: dict
    finite: object
def model_shape(model_type): return None
def token_shapes(spec, shape): return {{"cls_token": (4,)}}
def main(argv):
    config = json.loads(Path(argv[1]).read_text())
    paths = config["datasets"]["run"]
    Path(paths["cache_dir"]).mkdir()
    Path(__file__).with_name("asked.json").write_text(json.dumps(config))
    frames = sorted(Path(paths["data_folder"]).rglob("*.jpg"))
    encoder, digest = load_encoder(CacheSpec(), "cpu")
    for start in range(0, len(frames), 32):
        rows = frames[start : start + 32]
        {fault}
        assert len(encoder.encode(rows)().finite) == len(rows)
    return 0
"""


def make_checkout(folder: Path, fault: str = "") -> Path:
    folder.mkdir()
    (folder / "dino_cache.py").write_text(SMALL_CHECKOUT.format(fault=fault or "pass"))
    return folder


def mark(frames: int, time: float, main_s: float, all_s: float, looking_s: float = 0.0) -> dict[str, float]:
    at = {"frames": frames, "time": time, "main_s": main_s, "all_s": all_s}
    return {**at, "resumed_time": time + looking_s, "resumed_main_s": main_s + looking_s}


def test_rates_are_those_of_a_runs_middle() -> None:
    """100 frames to 900 in 4 s less the 0.5 s of looking; beginning and end are told apart."""
    marks = {
        "first": mark(0, 1003, 2, 2),
        "begin": mark(100, 1010, 5, 7, looking_s=0.5),
        "end": mark(900, 1014, 6.3, 11),
        "done": mark(1000, 1015, 7, 12),
    }
    run = ceiling.measured(marks, 1000, launched=1001, ended=1016, peak_mib=3)
    assert run.frames_per_s == pytest.approx(800 / 3.5)
    assert run.main_us == pytest.approx(1000)  # 6.3 - 5.5 s, of 800 frames
    assert run.all_us == pytest.approx(5000)  # 11 - 7 s
    assert (run.start_s, run.end_s, run.memory_mib) == (2, 2, 3)


def test_marks_are_taken_before_the_batch_that_reaches_them() -> None:
    marks = instant_run.Marks(num_frames=128, lead=32)
    for _ in range(4):
        marks.at_batch(32)
    assert {name: mark.frames for name, mark in marks.taken.items()} == {"first": 0, "begin": 32, "end": 96}
    assert marks.frames == 128


@pytest.fixture
def arguments() -> argparse.Namespace:
    return argparse.Namespace(
        baseline=None, baseline_set=[], set=[], quick=True, frames=512, repetitions=3, model="small"
    )


def test_ceiling_tells_both_checkouts_and_their_ratio(
    arguments: argparse.Namespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ceiling, "ROOT", make_checkout(tmp_path / "this"))
    arguments.baseline = str(make_checkout(tmp_path / "base"))
    ceiling.ceiling(arguments, tmp_path)
    tables = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [table["benchmark"].partition(",")[0] for table in tables] == [
        "Ceiling: one trajectory of 512 tiny frames",
        "Ceiling: 25 trajectories of 20 tiny frames",
        "Ceiling: one trajectory of 128 frames of 640x480",
    ]
    for table in tables:
        own, other = table["frames/s"]["median"], table["  baseline's frames/s"]["median"]
        assert table["  frames/s, over baseline"]["median"] == pytest.approx(own / other)
    short = tables[1]
    assert short["trajectories/s"]["median"] == pytest.approx(short["frames/s"]["median"] / 20)
    main_ms = short["main process [us a frame]"]["median"] * 20 / 1000
    assert short["main process [ms a trajectory]"]["median"] == pytest.approx(main_ms)


def test_a_setting_is_given_to_the_checkouts_that_know_it(
    arguments: argparse.Namespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """decode_workers is a setting of this checkout, and none of the small one."""
    arguments.baseline = str(make_checkout(tmp_path / "base"))
    arguments.set, arguments.baseline_set = ["decode_workers=3", "device=cpu"], ["tokens=[patch]"]
    sides = ceiling.checkouts(arguments)
    assert sides["this"] == (ROOT, {"decode_workers": 3, "device": "cpu"})
    assert sides["base"].settings == {"device": "cpu", "tokens": ["patch"]}
    assert "The baseline has no setting decode_workers: it runs without." in capsys.readouterr().out
    data = workload.data_of(tmp_path, 128, size=(16, 16))
    ceiling.run_once(sides["base"], data, tmp_path, 128, {"tokens": ["cls"]})
    asked = json.loads((tmp_path / "base" / "asked.json").read_text())
    assert (asked["tokens"], asked["device"], "decode_workers" in asked) == (["patch"], "cpu", False)


@pytest.mark.parametrize("pair", ["decode_wrokers=3", "decode_workers"])
def test_a_setting_that_is_not_there_is_refused(arguments: argparse.Namespace, pair: str) -> None:
    arguments.set = [pair]
    with pytest.raises(SystemExit, match=f"--set {pair}"):
        ceiling.checkouts(arguments)


def test_a_folder_without_the_program_is_no_baseline(arguments: argparse.Namespace, tmp_path: Path) -> None:
    arguments.baseline = str(tmp_path)
    with pytest.raises(SystemExit, match=r"has no dino_cache\.py"):
        ceiling.checkouts(arguments)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("if start == 96: return 3", "exit code 3"),
        ("if start == 96: rows = rows[:31]", "127 frames were encoded instead of 128"),
    ],
)
def test_a_run_that_did_other_work_gives_no_figure(tmp_path: Path, fault: str, said: str) -> None:
    side = ceiling.Checkout(make_checkout(tmp_path / "side", fault), {})
    data = workload.data_of(tmp_path, 128, size=(16, 16))
    with pytest.raises(SystemExit, match=said):
        ceiling.run_once(side, data, tmp_path, 128, {})


@pytest.mark.slow
def test_the_program_itself_is_run_to_its_end(tmp_path: Path) -> None:
    """This checkout with its real command, record and chunk files; the small encoder is no part of its memory."""
    data = workload.data_of(tmp_path, *[20] * 8, size=(16, 16))
    settings = {"dino_model_type": "small", "tokens": ["cls"], "image_size": [28, 28]}
    run = ceiling.run_once(ceiling.Checkout(ROOT, {}), data, tmp_path, 160, settings, weigh=True)
    assert min(run.frames_per_s, run.main_us, run.start_s, run.end_s) > 0
    assert run.memory_mib > 100  # torch alone takes more
    log = (tmp_path / "run.log").read_text()
    assert "8/8 trajectories completed, 0 failed, 8 chunks" in log


# ----------------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------------

MIB = 2**20
FAMILY = f"""
import mmap, os, sys, time
shared, size = mmap.mmap(-1, 64 * {MIB}), 32 * {MIB}
shared.write(b"1" * len(shared))
child = os.fork()
begin = time.process_time()
if child == 0:
    while time.process_time() < begin + 0.5:
        pass
own = bytearray(os.urandom({MIB})) * (32 if child else 48)
sum(shared[::4096])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def family() -> Iterator[int]:
    """A process with a child: 64 MiB that they share, 32 of the parent's own, 48 of the child's, which took 0.5 s."""
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert [process.stdout.readline(), process.stdout.readline()] == [b"ready\n"] * 2
        yield process.pid
        process.stdin.close()


def test_memory_counts_what_processes_share_once(family: int) -> None:
    bare = 40  # at most, of two interpreters
    assert 64 + 32 + 48 <= ceiling.tree_memory_mib(family) <= 64 + 32 + 48 + bare


def test_processor_time_of_children_counts(family: int) -> None:
    parent, child = instant_run.process_tree(family)
    assert instant_run.processor_s([parent, child]) >= instant_run.processor_s([child]) >= 0.45
