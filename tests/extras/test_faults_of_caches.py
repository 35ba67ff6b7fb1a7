"""verify and rebuild on caches that are damaged, may not be written, or are being written by a run."""

import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

import progress_utils
from faults_support import DAMAGES, IS_NO_FILE, Robot, before_batch, damage, immutable, read_only_mount, utils
from progress_utils import cache_lock
from support import Outcome, read_progress, tree


@pytest.fixture
def robot(tmp_path) -> Robot:
    return Robot(tmp_path, tmp_path / "cache")


@pytest.fixture
def damaged(robot: Robot, run_here: Callable[..., Outcome], request: pytest.FixtureRequest) -> Robot:
    run_here(robot.config)
    damage(robot, request.param)
    return robot


@pytest.mark.parametrize("forbid", [immutable, read_only_mount])
def test_a_cache_that_may_not_be_written_cannot_be_rebuilt_and_can_be_verified(robot, run_here, capsys, forbid):
    assert run_here(robot.config, "--limit", "1").code == 5
    before = tree(robot.cache)
    if not forbid(robot.cache, True):
        pytest.skip("may not forbid writing here")
    try:
        refused = utils(capsys, "rebuild", "--yes", "--cache-dir", robot.cache)
        assert refused.code == 2, refused.err
        assert str(robot.cache) in refused.err
        assert "unexpected" not in refused.err
        assert utils(capsys, "verify", "--cache-dir", robot.cache).code == 0
        assert tree(robot.cache) == before
    finally:
        forbid(robot.cache, False)
    robot.check_finished(run_here(robot.config))


def test_a_flipped_byte_in_a_chunk_is_found_and_redone(robot, run_here, capsys):
    shutil.rmtree(robot.data / "t1")
    shutil.rmtree(robot.data / "t2")
    run_here(robot.config)
    chunk = robot.cache / "t0" / "chunk_00001.h5"
    content = bytearray(chunk.read_bytes())
    row = bytes(torch.tensor([0.0, 0.0, 9.0, 8.0], dtype=torch.float16).numpy())  # of frame 9, in a batch of 8
    content[content.index(row)] ^= 1
    chunk.write_bytes(content)
    found = utils(capsys, "verify", "--deep", "--cache-dir", robot.cache)
    assert found.code == 1
    assert "t0/chunk_00001.h5: the bytes of cls_token" in found.out
    assert utils(capsys, "verify", "--deep", "--repair", "--yes", "--cache-dir", robot.cache).code == 1
    assert run_here(robot.config).code == 0
    assert utils(capsys, "verify", "--deep", "--cache-dir", robot.cache).code == 0
    assert robot.check_recorded() == ["t0"]


@pytest.mark.parametrize("damaged", DAMAGES, indirect=True)
def test_verify_refuses_a_damaged_record_by_name_with_the_way_out_and_nothing_changes(damaged, capsys):
    before = tree(damaged.cache)
    outcome = utils(capsys, "verify", "--cache-dir", damaged.cache)
    assert outcome.code == 2, outcome
    assert str(damaged.cache / "progress.json") in outcome.err
    assert re.search(r"Ways? out|Update the program|[Mm]ove it", outcome.err), outcome.err
    assert "Traceback" not in outcome.err
    assert tree(damaged.cache) == before


@pytest.mark.parametrize("damaged", [damage for damage in DAMAGES if damage not in IS_NO_FILE], indirect=True)
def test_a_damaged_record_is_set_aside_by_the_rebuild_that_its_refusal_names(damaged, run_here, capsys):
    content = (damaged.cache / "progress.json").read_bytes()
    assert utils(capsys, "rebuild", "--yes", "--cache-dir", damaged.cache).code == 0
    (aside,) = damaged.cache.glob("progress.json.rebuild-*")
    assert aside.read_bytes() == content
    assert read_progress(damaged.cache)["completed_trajectories"] == ["t0"]
    damaged.check_finished(run_here(damaged.config))


@pytest.mark.parametrize("damaged", ["a folder"], indirect=True)
def test_a_folder_in_the_records_place_is_not_replaced(damaged, capsys):
    before = tree(damaged.cache)
    outcome = utils(capsys, "rebuild", "--yes", "--cache-dir", damaged.cache)
    assert outcome.code == 2, outcome
    assert str(damaged.cache / "progress.json") in outcome.err
    assert tree(damaged.cache) == before


def test_during_a_run_edits_are_refused_and_verify_works(robot, run_here, monkeypatch, capsys):
    seen: dict[str, Any] = {}

    def use_the_cache(batch: int, _: torch.Tensor) -> None:
        if batch != 5 or seen:  # of eight
            return
        edits = (["rebuild", "--yes"], ["verify", "--repair", "--yes"])
        codes = [progress_utils.main([*edit, "--cache-dir", str(robot.cache)]) for edit in edits]
        said = capsys.readouterr().err
        checked = progress_utils.main(["verify", "--deep", "--cache-dir", str(robot.cache)])
        seen.update(codes=codes, said=said, checked=checked, out=capsys.readouterr().out)

    before_batch(monkeypatch, use_the_cache)
    outcome = run_here(robot.config)
    assert seen["codes"] == [4, 4]
    assert seen["said"].count(f"pid {os.getpid()} ") == 2
    assert seen["checked"] == 0
    assert "\nSound\n" in seen["out"]
    robot.check_finished(outcome)


def test_verify_reads_while_the_lock_is_held_and_says_who_is_at_work(robot, run_here, capsys):
    run_here(robot.config, "--limit", "1")
    before = tree(robot.cache)
    with cache_lock(robot.cache):
        outcome = utils(capsys, "verify", "--deep", "--cache-dir", robot.cache)
    assert outcome.code == 0, outcome
    assert f"a run is at work (pid {os.getpid()} " in outcome.out
    assert tree(robot.cache) == before
