"""The commands and readers of the wing take in progress.json.journal, and know one that belongs to no record."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands_support import CachedRobot

import progress_utils
from dino_cache_extras.cache_index import cache_index
from progress_utils import Progress


@pytest.fixture
def robot(cached: Callable[..., CachedRobot]) -> CachedRobot:
    return cached("lab/t2", "t3")


def leave_in_journal(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a killed run does: `name` is completed, and not yet in progress.json."""
    monkeypatch.setattr(progress_utils, "SAVE_SHARE", 1e-12)
    progress = Progress.load(cache)
    checksum, record = progress.checksums[name], progress.records[name]
    progress.forget(name)
    progress.save()
    progress.complete(name, checksum, record)
    progress.save_spaced(1.0)
    assert (cache / "progress.json.journal").exists()


def verify(cache: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[tuple[str, str]]]:
    code = progress_utils.main(["verify", "--cache-dir", str(cache), "--json", *options])
    findings = json.loads(capsys.readouterr().out)["findings"]
    return code, [(finding["kind"], finding["path"]) for finding in findings]


def test_verify_finds_a_cache_sound_whose_last_result_is_in_the_journal(robot: CachedRobot, monkeypatch, capsys):
    leave_in_journal(robot.cache, monkeypatch, "t3")
    assert verify(robot.cache, capsys) == (0, [])


def test_verify_repair_removes_a_journal_of_an_earlier_record_and_no_other(robot: CachedRobot, monkeypatch, capsys):
    leave_in_journal(robot.cache, monkeypatch, "t3")
    journal = robot.cache / "progress.json.journal"
    content = journal.read_bytes()
    Progress.load(robot.cache).save()
    journal.write_bytes(content)
    assert verify(robot.cache, capsys) == (1, [("leftover", "progress.json.journal")])
    assert verify(robot.cache, capsys, "--repair", "--yes")[0] == 1
    assert not journal.exists()
    assert verify(robot.cache, capsys) == (0, [])


def test_an_index_holds_what_is_in_the_journal_and_follows_it(robot: CachedRobot, monkeypatch):
    monkeypatch.setattr("dino_cache_extras.cache_index.MIN_INDEXED_BYTES", 1)  # so that the index is kept
    before = cache_index(robot.cache)
    progress = Progress.load(robot.cache)
    leave_in_journal(robot.cache, monkeypatch, "t3")
    assert cache_index(robot.cache).names == before.names
    last = (robot.cache / "progress.json.journal").read_bytes().splitlines(keepends=True)
    (robot.cache / "progress.json.journal").write_bytes(b"".join(last[:-1]))
    assert cache_index(robot.cache).names == sorted(progress.records.keys() - {"t3"})
