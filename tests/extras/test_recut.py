"""--recut: what is completed is cut anew from its stored features, and only frames that are in no chunk are encoded."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pexpect
import pytest
import torch
import yaml

import dino_cache
import progress_utils
from dino_cache_extras import recut
from support import (
    FRAMES,
    REAL,
    ROOT,
    PlainEncoder,
    Robot,
    StampEncoder,
    cache_command,
    cache_content,
    check_stamps,
    chunk_files,
    frames_encoded,
    make_trajectory,
    read_chunk,
    read_progress,
    run_utils,
    straight_line,
    tree,
    wait_until,
    write_config,
    write_poses,
)

CUT = {"max_chunk_distance_m": 1.5, "overlap_distance_m": 0.25}


@pytest.fixture
def loaded(run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[PlainEncoder]:
    """The encoders that runs load."""
    encoders: list[PlainEncoder] = []

    def load(spec: dino_cache.CacheSpec, device: str) -> tuple[StampEncoder, str]:
        encoders.append(PlainEncoder(spec.image_size, spec.tokens))
        return encoders[-1], "stamp" + spec.weights

    monkeypatch.setattr(dino_cache, "load_encoder", load)
    monkeypatch.setattr(dino_cache, "build_model", lambda spec: pytest.fail("a model was built"))
    return encoders


@pytest.fixture
def sources(loaded: list[PlainEncoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of `weights` is another file with other weights, which can be digested."""
    nothing_known = {"size": None, "mtime": None}
    monkeypatch.setattr(dino_cache, "weights_source", lambda spec: {"source": spec.weights, **nothing_known})
    monkeypatch.setattr(dino_cache, "build_model", lambda spec: spec)
    monkeypatch.setattr(dino_cache, "weights_digest", lambda spec: "stamp" + spec.weights)


def datasets(cache: Path) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Every chunk's datasets, byte for byte, and the attributes that do not tell when it was made."""
    content = cache_content(cache)
    return {
        path: {"attributes": attributes, **{name: (it.dtype, it.shape, it.tobytes()) for name, it in found.items()}}
        for path, (attributes, found) in content.items()
    }


def fresh(robot: Robot, run_here: Callable[..., Any], folder: Path, **settings: Any) -> Any:
    """What a run makes that finds no cache."""
    config = folder / "fresh.yaml"
    content = yaml.safe_load(robot.config.read_text())
    content["datasets"]["robot"]["cache_dir"] = str(folder / "fresh")
    config.write_text(yaml.safe_dump(content))
    assert run_here(config).code == 0
    return datasets(folder / "fresh")


def check_clean(cache: Path) -> None:
    assert progress_utils.main(["verify", "--cache-dir", str(cache), "--deep"]) == 0
    assert list((cache / ".staging").iterdir()) == []
    assert read_progress(cache)["recut_started"] is None


@pytest.mark.parametrize(
    "settings",
    [
        CUT,
        {"max_chunk_distance_m": 4.0, "overlap_distance_m": 1.0},
        {"chunk_by": "frames", "max_chunk_frames": 7, "overlap_frames": 3},
        {"frame_stride": 2, "position_scale": 0.5, "min_chunk_distance_m": 0.0},
        {"extra_keys": ["speed"], "yaw_offset": 0.5, **CUT},
    ],
    ids="-".join,
)
def test_what_was_stored_is_cut_anew_without_a_model_and_is_what_a_fresh_run_makes(
    robot, run_here, loaded, tmp_path, settings
):
    robot.add("t0", "t1")
    for name in ("t0", "t1"):
        poses = {"position": straight_line(FRAMES), "yaw": np.zeros(FRAMES), "speed": np.arange(FRAMES)}
        (robot.data / name / "traj_data.pkl").unlink()
        np.savez(robot.data / name / "traj_data.npz", **poses)
    robot.configure(tokens=["cls", "patch"])
    assert run_here(robot.config).code == 0
    robot.configure(tokens=["cls", "patch"], **settings)
    loaded.clear()
    before = tree(robot.cache)
    forecast = run_here(robot.config, "--recut", "--dry-run")
    assert forecast.code == 0
    assert re.search(r"to re-cut: 2 completed trajectories \(.*\), of which 0 frames", forecast.out)
    assert "frames to encode: 0" in forecast.out
    assert tree(robot.cache) == before
    outcome = run_here(robot.config, "--recut")
    assert outcome.code == 0, outcome.err
    assert "2 completed (+2), 0 failed" in outcome.out
    assert loaded == []
    check_clean(robot.cache)
    assert run_here(robot.config).code == 0  # confirmed once and for all
    assert loaded == []
    assert datasets(robot.cache) == fresh(robot, run_here, tmp_path)


def test_only_frames_that_were_in_no_chunk_are_encoded_and_each_lands_in_its_place(robot, run_here, loaded, tmp_path):
    """Of 40 frames, pieces of 12, 2, 10, 2 and 14 between jumps: those of 2 are stored only when 0.2 m are enough."""
    position = straight_line(40)
    for jump in (12, 14, 24, 26):
        position[jump:, 1] += 100
    robot.data.mkdir()
    for name, stamp in (("t0", 0), ("t1", 1)):
        make_trajectory(robot.data / name, 40, stamp=stamp, position=position)
    make_trajectory(robot.data / "t2", 20, stamp=2)
    assert run_here(robot.config).code == 0
    robot.add("t3")  # a new one beside them, in the same batches
    robot.configure(min_chunk_distance_m=0.2, **CUT)
    assert "frames to encode: 28" in run_here(robot.config, "--recut", "--dry-run").out
    assert run_here(robot.config, "--recut").code == 0
    assert frames_encoded(loaded) == 2 * 4 + 20
    for stamp in range(4):
        check_stamps(robot.cache, f"t{stamp}", stamp)
    check_clean(robot.cache)
    assert datasets(robot.cache) == fresh(robot, run_here, tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"resize": "stretch", **CUT}, ["resize: crop -> stretch"]),
        ({"tokens": ["cls", "patch"], "pixel_mean": [0.5, 0.5, 0.5]}, ["tokens", "pixel_mean"]),
        ({"weights": "pretrained", **CUT}, ["weights: ", "stamprandom", "stamppretrained"]),
        ({"force_rebuild": True, **CUT}, ["force_rebuild", "take one of them out"]),
    ],
)
def test_what_only_encoding_gives_is_refused_and_named_and_nothing_changes(
    robot, run_here, loaded, sources, settings, named
):
    robot.add("t0")
    assert run_here(robot.config).code == 0
    robot.configure(**settings)
    before = tree(robot.cache)
    outcome = run_here(robot.config, "--recut")
    assert outcome.code == 2
    assert all(word in outcome.err for word in named), outcome.err
    assert {**tree(robot.cache), ".staging": None} == {**before, ".staging": None}


def test_without_a_terminal_the_refusal_names_recut_only_where_it_is_possible(robot, run_here, loaded):
    robot.add("t0")
    assert run_here(robot.config).code == 0
    for settings, is_named in (CUT, True), ({"resize": "stretch", **CUT}, False):
        robot.configure(**settings)
        outcome = run_here(robot.config)
        assert (outcome.code, "--recut" in outcome.err) == (2, is_named)
    for other in ["--force-rebuild"], ["--shard", "0/2"]:
        with pytest.raises(SystemExit) as ended:
            dino_cache.main(["--config", str(robot.config), "--recut", *other])
        assert ended.value.code == 2


def test_another_change_that_is_confirmed_with_yes_ends_a_re_cut(robot, run_here, loaded):
    robot.add("t0", "t1")
    assert run_here(robot.config).code == 0
    robot.configure(**CUT)
    assert run_here(robot.config, "--recut", "--limit", "1").code == 5
    robot.configure(max_chunk_distance_m=3.0)
    assert run_here(robot.config).code == 2
    assert read_progress(robot.cache)["recut_started"] > 0
    assert run_here(robot.config, "--yes").code == 0
    assert read_progress(robot.cache)["recut_started"] is None
    assert run_here(robot.config, "--recut").code == 0  # both, whatever they were cut by
    records = read_progress(robot.cache)["trajectory_records"]
    assert [entry["spans"] for entry in records.values()] == [[[0, 13], [10, 20]]] * 2
    check_clean(robot.cache)


@pytest.mark.parametrize("features", [{"resize": "stretch"}, {"weights": "pretrained"}], ids="".join)
def test_a_mixed_cache_keeps_what_has_other_features_and_says_so(robot, run_here, loaded, sources, features):
    robot.add("t0", "t1")
    assert run_here(robot.config, "--limit", "1").code == 5
    robot.configure(**features)
    assert run_here(robot.config, "--yes").code == 0
    robot.configure(**features, **CUT)
    loaded.clear()
    outcome = run_here(robot.config, "--recut")
    assert outcome.code == 0, outcome.err
    assert "1 completed trajectories were made with another configuration, and stay: t0" in outcome.err
    assert "to re-cut: 1 completed trajectories" in outcome.out
    assert loaded == []
    spans = {name: len(entry["spans"]) for name, entry in read_progress(robot.cache)["trajectory_records"].items()}
    assert spans == {"t0": 3, "t1": 4}  # of 1.5 m and 0.25 m: 0-1.5, 1.25-2.75, 2.5-4, 3.75-4.75
    check_clean(robot.cache)


def test_a_damaged_chunk_fails_its_trajectory_alone_and_the_next_run_tries_again(robot, run_here, loaded, tmp_path):
    robot.add("t0", "t1", "t2")
    assert run_here(robot.config).code == 0
    sound, kept = {}, {name: tree(robot.cache / name) for name in ("t0", "t1")}
    for name, place in (("t0", 0), ("t1", -30)):  # the seal, and a byte of data
        path = robot.cache / name / "chunk_00001.h5"
        with h5py.File(path) as file:
            offset = file["cls_token"].id.get_offset()
        content = bytearray(path.read_bytes())
        sound[path] = bytes(content)
        content[offset if place else 3] ^= 1
        path.write_bytes(content)
        kept[name]["chunk_00001.h5"] = bytes(content)
    robot.configure(**CUT)
    outcome = run_here(robot.config, "--recut")
    assert outcome.code == 1
    for path in sound:
        assert re.search(
            rf"Failed: {path}: cannot be re-cut: .*verify --cache-dir {robot.cache} --deep --repair", outcome.err
        )
    assert "t0 stays as it was completed" in outcome.err
    progress = read_progress(robot.cache)
    assert (sorted(progress["completed_trajectories"]), progress["failures"]) == (["t0", "t1", "t2"], {})
    assert {name: tree(robot.cache / name) for name in kept} == kept
    assert progress["recut_started"] > 0
    assert "Re-cut under way" in run_utils("show", robot.cache).stdout
    for path, content in sound.items():
        path.write_bytes(content)
    loaded.clear()
    assert run_here(robot.config).code == 0
    assert loaded == []
    check_clean(robot.cache)
    assert datasets(robot.cache) == fresh(robot, run_here, tmp_path)


def test_changed_data_are_encoded_anew_and_data_that_break_the_new_cut_stay(robot, run_here, loaded):
    robot.add("t0", "t1")
    make_trajectory(robot.data / "t2", 3, stamp=2)  # 0.5 m
    assert run_here(robot.config).code == 0
    write_poses(robot.data / "t1", straight_line(FRAMES, 0.3), np.zeros(FRAMES))
    (robot.data / "t1" / "traj_data.pkl").write_bytes((robot.data / "t1" / "traj_data.pkl").read_bytes() + b" ")
    robot.configure(min_chunk_distance_m=0.6)
    outcome = run_here(robot.config, "--recut")
    assert outcome.code == 1
    assert "insufficient movement" in outcome.err and "t2 stays as it was completed" in outcome.err
    assert frames_encoded(loaded) == FRAMES
    check_clean(robot.cache)  # trying again would not help


def test_a_run_stopped_at_any_trajectory_is_finished_by_a_plain_one(robot, run_here, loaded, tmp_path, monkeypatch):
    robot.add("t0", "t1", "t2")
    assert run_here(robot.config).code == 0
    robot.configure(**CUT)
    loaded.clear()
    assert run_here(robot.config, "--recut", "--limit", "1").code == 5
    write = recut.RecutWriter._fill

    def stop_and_write(self: Any, limit: int) -> bool:
        self._block = 5  # rows at a time
        tokens = self._tokens.of

        def stop(camera: str | None, rows: np.ndarray) -> Any:
            yield from tokens(camera, rows)
            if rows[-1] == 14:
                signal.raise_signal(signal.SIGTERM)  # which the main thread handles
                wait_until(self._should_stop)

        self._tokens.of = stop
        return write(self, limit)

    monkeypatch.setattr(recut.RecutWriter, "_fill", stop_and_write)
    assert run_here(robot.config).code == 143
    monkeypatch.setattr(recut.RecutWriter, "_fill", write)
    spans = {name: len(entry["spans"]) for name, entry in read_progress(robot.cache)["trajectory_records"].items()}
    assert spans == {"t0": 4, "t1": 3, "t2": 3}
    outcome = run_here(robot.config)
    assert outcome.code == 0, outcome.err
    assert "t1: goes on after 2 of 4 chunks" in outcome.out
    assert loaded == []
    check_clean(robot.cache)
    assert datasets(robot.cache) == fresh(robot, run_here, tmp_path)


DYING = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
import dino_cache
from support import STAMP_SHAPE
dino_cache.load_encoder = lambda spec, device: sys.exit("a model was loaded")
dino_cache.model_shape = lambda kind: STAMP_SHAPE
calls, original = [], dino_cache.ChunkWriter.finish
def die(writer):
    calls.append(1)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(writer)
dino_cache.ChunkWriter.finish = die
if __name__ == "__main__":
    sys.exit(dino_cache.main(["--config", sys.argv[3], "--recut"]))
"""


@pytest.mark.slow
def test_a_killed_run_over_two_datasets_is_finished_by_a_plain_one(robot, run_here, loaded, tmp_path):
    robot.add("t0", "t1", "t2")
    other = robot._replace(data=tmp_path / "other", cache=tmp_path / "other" / "dino_cache_small")
    other.add("t3")

    def configure(**settings: Any) -> None:
        robot.configure(**settings)
        content = yaml.safe_load(robot.config.read_text())
        content["datasets"]["other"] = {"data_folder": str(other.data)}
        robot.config.write_text(yaml.safe_dump(content, sort_keys=False))

    configure()
    assert run_here(robot.config).code == 0
    configure(**CUT)
    loaded.clear()
    command = [sys.executable, "-c", DYING, str(ROOT), str(ROOT / "tests"), str(robot.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert all(read_progress(cache)["recut_started"] for cache in (robot.cache, other.cache))
    outcome = run_here(robot.config)
    assert outcome.code == 0, outcome.err
    assert "t1: goes on after 2 of 4 chunks" in outcome.out
    assert "4 completed (+3)" in outcome.out
    assert loaded == []
    for cache in (robot.cache, other.cache):
        check_clean(cache)
    made = datasets(robot.cache), datasets(other.cache)
    for cache in (robot.cache, other.cache):
        shutil.rmtree(cache)
    assert run_here(robot.config).code == 0
    assert (datasets(robot.cache), datasets(other.cache)) == made


def test_c_at_the_question_cuts_anew(robot, run_here):
    robot.add("t0")
    assert run_here(robot.config).code == 0
    robot.configure(**CUT)
    program, *arguments = cache_command(robot.config)
    with pexpect.spawn(program, arguments, timeout=240, encoding="utf-8", dimensions=(50, 220)) as terminal:
        terminal.expect_exact("  c  re-cut: 1 completed trajectories are cut anew")
        terminal.expect_exact("[y/N]")
        terminal.sendline("c")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 0, terminal.before
    assert "encoder loaded" not in terminal.before
    assert len(read_progress(robot.cache)["trajectory_records"]["t0"]["spans"]) == 4
    check_stamps(robot.cache, "t0", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Recordings of real robots and people
# ---------------------------------------------------------------------------------------------------------------------


class PictureEncoder(StampEncoder):
    """Tokens are sums over a frame's pixels, whatever else is in the batch."""

    def encode(self, pixels: Any) -> Any:
        rows = super().encode(pixels)()
        weights = torch.arange(1, 29)[:, None] * torch.arange(1, 43)
        sums = (pixels.double() * weights).sum((1, 2, 3)) % 2048, pixels.double().mean((1, 2, 3))
        for values in rows.tokens.values():
            values[..., 2], values[..., 3] = (item.reshape(-1, *[1] * (values.ndim - 2)).numpy() for item in sums)
        return lambda: rows


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real recordings are not in {REAL}")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((50.0, 1.0, 0.3), (10.0, 2.0, 0.3)),
        ((0.5, 0.1, 0.4), (0.5, 0.1, 0.0)),  # steps of more than 0.5 m part pieces, all of which are stored now
    ],
    ids=["50 m to 10 m", "smaller minimum"],
)
def test_real_recordings_are_cut_anew(run_here, loaded, tmp_path, monkeypatch, before, after):
    monkeypatch.setattr(sys.modules[__name__], "PlainEncoder", PictureEncoder)
    robot = Robot(REAL, tmp_path / "cache", tmp_path / "real.yaml")
    keys = ("max_chunk_distance_m", "overlap_distance_m", "min_chunk_distance_m")

    def configure(cut: tuple[float, ...]) -> None:
        write_config(robot.config, REAL, tokens=["cls", "patch"], **dict(zip(keys, cut)))
        content = yaml.safe_load(robot.config.read_text())
        content["datasets"]["robot"] |= {"cache_dir": str(robot.cache), "split": str(tmp_path / "names.txt")}
        robot.config.write_text(yaml.safe_dump(content))

    def frames(cache: Path) -> set[tuple[str, int]]:
        paths = chunk_files(cache)
        return {(str(path.parent), number) for path in paths for number in read_chunk(path)[1]["frame_index"].tolist()}

    names = ["gopro_max_walk/walk_5hz", "hololens_walk/walk_i000_120", "hololens_walk/walk_i120_240_s2"]
    names = ["gopro_karma_drone/flight_10hz", *(names if before[0] > after[0] else [])]
    (tmp_path / "names.txt").write_text("\n".join(names))
    configure(before)
    assert run_here(robot.config).code == 0
    stored = frames(robot.cache)
    loaded.clear()
    configure(after)
    outcome = run_here(robot.config, "--recut")
    assert outcome.code == 0, outcome.err
    added = frames(robot.cache) - stored
    assert stored <= frames(robot.cache)
    assert bool(added) == bool(loaded) == (before[0] == after[0])
    assert sum(sum(encoder.batch_sizes) for encoder in loaded) == len(added)
    check_clean(robot.cache)
    assert datasets(robot.cache) == fresh(robot, run_here, tmp_path)
