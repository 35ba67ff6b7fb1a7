"""A changed configuration is refused, asked about or confirmed; a rebuild redoes all, in as many runs as it takes."""

import re
from collections.abc import Callable
from typing import Any

import pexpect
import pytest
import yaml

from support import (
    FRAMES,
    Robot,
    attempts,
    cache_command,
    chunk_files,
    frames_encoded,
    make_trajectory,
    read_chunk,
    read_progress,
    run_utils,
    tree,
    write_config,
)


def begun(robot: Robot, run_here: Callable[..., Any]) -> None:
    """t0 is completed, t1 is to do."""
    robot.add("t0", "t1")
    assert run_here(robot.config, "--limit", "1").code == 5


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("max_chunk_distance_m", 2.0, 3.0),
        ("overlap_distance_m", 0.5, 0.0),
        ("min_chunk_distance_m", 0.3, 0.0),
        ("tokens", ["cls"], ["cls", "patch"]),
        ("image_size", [28, 42], [42, 42]),
        ("resize", "crop", "stretch"),
        ("pixel_mean", [0.485, 0.456, 0.406], [0.5, 0.5, 0.5]),
        ("frame_stride", 1, 2),
        ("precision", "fp32", "bf16"),
        ("dino_model_type", "small", "base"),
        ("weights", "random", "pretrained"),
    ],
)
def test_a_changed_configuration_without_a_terminal_is_refused_and_nothing_changes(robot, run_here, key, old, new):
    begun(robot, run_here)
    before = tree(robot.cache)
    write_config(robot.config, robot.data, **{key: new})
    settings = yaml.safe_load(robot.config.read_text())
    settings["datasets"]["robot"]["cache_dir"] = str(robot.cache)  # the default's name follows the model
    robot.config.write_text(yaml.safe_dump(settings))
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert re.search(rf"\b{key}: {re.escape(str(old))}.* -> .*{re.escape(str(new))}", outcome.err)
    for way in ("--yes", "--force-rebuild", f"progress_utils.py reset --cache-dir {robot.cache}"):
        assert way in outcome.err
    assert tree(robot.cache) == before


@pytest.mark.parametrize("setting", [{"batch_size": 3}, {"decode_workers": 1}, {"progress_interval_s": 5.0}])
def test_settings_that_change_nothing_computed_are_no_changed_configuration(robot, run_here, setting):
    begun(robot, run_here)
    robot.configure(**setting)
    assert run_here(robot.config).code == 0
    robot.check("t0", "t1")


def check_mixed(robot: Robot) -> None:
    """t0 as it was, in 2 m chunks; t1 in 3 m chunks: 0-3, 2.5-4.75 m; every chunk says which."""
    expected = {"t0": [(0, 9), (6, 15), (12, 20)], "t1": [(0, 13), (10, 20)]}
    for name, spans in expected.items():
        attributes = [read_chunk(path)[0] for path in chunk_files(robot.cache / name)]
        assert [(item["start"], item["stop"]) for item in attributes] == spans
        assert {yaml.safe_load(item["spec"])["max_chunk_distance_m"] for item in attributes} == {2.0 + (name == "t1")}
    progress = read_progress(robot.cache)
    assert progress["processing_config"]["max_chunk_distance_m"] == 3.0
    fingerprints = {name: entry["fingerprint"] for name, entry in progress["trajectory_records"].items()}
    assert {name: progress["specs"][key]["max_chunk_distance_m"] for name, key in fingerprints.items()} == {
        "t0": 2.0,
        "t1": 3.0,
    }
    assert "mixed" in run_utils("show", "--cache-dir", robot.cache).stdout.lower()


def test_with_yes_what_is_completed_stays_and_the_rest_is_made_anew(robot, run_here, encoders):
    begun(robot, run_here)
    robot.configure(max_chunk_distance_m=3.0)
    assert run_here(robot.config, "--yes").code == 0
    assert frames_encoded(encoders) == FRAMES
    check_mixed(robot)
    encoders.clear()
    assert run_here(robot.config).code == 0  # confirmed once and for all
    assert encoders == []


def test_on_a_terminal_the_question_is_asked_and_the_answer_followed(robot, run_here):
    begun(robot, run_here)
    robot.configure(max_chunk_distance_m=3.0)
    before = tree(robot.cache)
    for answer, code in (("n", 2), ("y", 0)):
        program, *arguments = cache_command(robot.config)
        with pexpect.spawn(program, arguments, timeout=120, encoding="utf-8", dimensions=(50, 200)) as terminal:
            terminal.expect_exact("max_chunk_distance_m: 2.0 -> 3.0")
            terminal.expect_exact("Continue with the changed configuration? [y/N]")
            terminal.sendline(answer)
            terminal.expect(pexpect.EOF)
        assert terminal.exitstatus == code
        if answer == "n":
            assert tree(robot.cache) == before
    assert "frames" in terminal.before  # the progress bar
    check_mixed(robot)


def test_ctrl_c_at_the_question_ends_the_run_and_changes_nothing(robot, run_here):
    begun(robot, run_here)
    robot.configure(max_chunk_distance_m=3.0)
    before = tree(robot.cache)
    program, *arguments = cache_command(robot.config)
    with pexpect.spawn(program, arguments, timeout=30) as terminal:
        terminal.expect_exact("[y/N]")
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 130
    assert tree(robot.cache) == before


def test_a_confirmed_change_gives_exhausted_ones_another_try_at_once(robot, run_here):
    robot.add("t0")
    make_trajectory(robot.data / "t1", 3, stamp=1)  # 0.5 m
    robot.configure(max_attempts=1, min_chunk_distance_m=0.6)
    assert run_here(robot.config).code == 1
    robot.configure(max_attempts=1, min_chunk_distance_m=0.5)
    assert run_here(robot.config, "--yes").code == 0
    assert read_progress(robot.cache)["completed_trajectories"] == ["t0", "t1"]


def test_a_record_without_completed_ones_is_never_a_changed_configuration(robot, run_here):
    robot.add_broken("t0")
    assert run_here(robot.config).code == 1
    robot.configure(max_chunk_distance_m=3.0)
    outcome = run_here(robot.config)
    assert outcome.code == 1
    assert "configuration" not in outcome.err
    assert attempts(robot) == {"t0": 1}  # counted afresh


def test_a_rebuild_redoes_everything_and_a_plain_run_finishes_an_interrupted_one(robot, run_here, encoders):
    robot.add("t0", "t1", "t2")
    run_here(robot.config)
    robot.configure(max_chunk_distance_m=1.5)  # no question: nothing is kept
    assert run_here(robot.config, "--force-rebuild", "--limit", "1").code == 5
    assert frames_encoded(encoders) == FRAMES
    assert read_progress(robot.cache)["rebuild_started"] > 0
    assert "rebuild" in run_utils("show", "--cache-dir", robot.cache).stdout.lower()
    assert run_here(robot.config, "--force-rebuild", "--limit", "1").code == 5  # goes on with it too
    assert read_progress(robot.cache)["completed_trajectories"] == ["t0", "t1"]
    assert run_here(robot.config).code == 0
    assert frames_encoded(encoders) == FRAMES
    progress = read_progress(robot.cache)
    assert progress["rebuild_started"] is None
    # 1.5 m chunks, 0.5 m overlap: 0-1.5, 1-2.5, 2-3.5, 3-4.5 m; 0.25 m more is less than min: 3-4.75 m
    spans = [[0, 7], [4, 11], [8, 15], [12, 20]]
    assert [entry["spans"] for entry in progress["trajectory_records"].values()] == [spans] * 3
    assert len(chunk_files(robot.cache)) == 12
    encoders.clear()
    assert run_here(robot.config).code == 0
    assert encoders == []
    assert run_here(robot.config, "--force-rebuild").code == 0  # a finished one starts anew with the flag
    assert frames_encoded(encoders) == 3 * FRAMES


def test_force_rebuild_in_the_file_rebuilds_every_run_and_says_so(robot, run_here, encoders):
    robot.add("t0")
    robot.configure(force_rebuild=True)
    for number in (1, 2):
        outcome = run_here(robot.config)
        assert outcome.code == 0
        assert re.search(r"force_rebuild.*every run", outcome.err)
        assert len(encoders) == number
    robot.check("t0")
