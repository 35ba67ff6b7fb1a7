"""verify --repair and rebuild that are killed at each of their calls (crash_lab)."""

import shutil
import sys
from pathlib import Path

import h5py
import pytest

from crash_lab import BOTH, NESTED, A, D, Lab, Scenario, essence, journalled, num_calls, survive
from dino_cache_extras.commands import verify
from support import read_whole_record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")


def damaged(lab: Lab) -> None:
    """One trajectory has a chunk with a wrong byte, one lost a chunk, one is sound; and things lie about."""
    lab.add(A, NESTED, D)
    lab.configure()
    lab.run()
    chunk = lab.cache / A / "chunk_00000.h5"
    with h5py.File(chunk) as file:
        place = file["yaw"].id.get_offset()
    data = bytearray(chunk.read_bytes())
    data[place] ^= 1
    chunk.write_bytes(data)
    (lab.cache / NESTED / "chunk_00001.h5").unlink()
    shutil.copytree(lab.cache / D, lab.cache / ".staging" / "tmp1234")
    (lab.cache / "progress.json.tmp").write_text("{")


def lost_record(lab: Lab) -> None:
    lab.add(A, NESTED)
    lab.configure()
    lab.run()
    (lab.cache / "progress.json").unlink()


def corrupt_record(lab: Lab) -> None:
    """And one trajectory lost a chunk, so that it cannot be taken into the record."""
    lab.add(A, NESTED)
    lab.configure()
    lab.run()
    (lab.cache / NESTED / "chunk_00001.h5").unlink()
    record = lab.cache / "progress.json"
    record.write_bytes(record.read_bytes()[:300])


def damaged_and_journalled(lab: Lab) -> None:
    damaged(lab)
    journalled(lab.cache)


def corrupt_journal(lab: Lab) -> None:
    """Beside a sound progress.json; and one trajectory lost a chunk."""
    lab.add(A, NESTED)
    lab.configure()
    lab.run()
    (lab.cache / NESTED / "chunk_00001.h5").unlink()
    journalled(lab.cache)
    journal = lab.cache / "progress.json.journal"
    journal.write_bytes(journal.read_bytes().replace(b"completed", b"conpleted"))


SCENARIOS = {
    "verify --repair, with a journal": Scenario(
        damaged_and_journalled, "verify --deep --repair --yes", 1, 0, {**BOTH, D: 4}, {}, (A, NESTED)
    ),
    "rebuild, corrupt journal": Scenario(corrupt_journal, "rebuild --yes", 1, 0, BOTH, {}, (NESTED,)),
    "verify --repair": Scenario(damaged, "verify --deep --repair --yes", 1, 0, {**BOTH, D: 4}, {}, (A, NESTED)),
    "rebuild, no record": Scenario(lost_record, "rebuild --yes", 0, 0, BOTH),
    "rebuild, corrupt record": Scenario(corrupt_record, "rebuild --yes", 1, 0, BOTH, {}, (NESTED,)),
}


def check_sound(cache: Path, damaged: tuple[str, ...]) -> None:
    """What is recorded is sound to `verify --deep`, but for what was damaged from the start."""
    if not isinstance(essence(cache), dict):
        return
    data = read_whole_record(cache)
    for name in data["trajectory_records"].keys() - set(damaged):
        task = (name, data["trajectory_records"][name], data["trajectory_checksums"][name])
        assert verify.check_trajectory(cache, task, deep=True) == []


@pytest.fixture
def lab(tmp_path: Path, encoders: list) -> Lab:
    return Lab(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("title", SCENARIOS)
def test_killed_at_any_call_it_records_nothing_false_and_then_ends_as_if_undisturbed(title, lab):
    assert survive(lab, SCENARIOS[title], lambda cache: check_sound(cache, SCENARIOS[title].damaged)) > 0


@pytest.mark.slow
def test_there_are_more_than_30_calls_to_be_killed_at(tmp_path, encoders):
    assert num_calls(tmp_path, SCENARIOS.values()) > 30
