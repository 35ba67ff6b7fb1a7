"""Three good trajectories, and what breaks around them: batches, mounts, records."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import progress_utils
from support import Outcome, StampEncoder, check_stamps, chunk_files, make_trajectory, read_progress, write_config

NAMES = ("t0", "t1", "t2")  # the digit is the stamp
ROWS = 26  # 20 frames in three chunks, 9 + 9 + 8


class Robot:
    """Three good trajectories and a config whose cache may lie on a disk of its own."""

    def __init__(self, folder: Path, cache: Path):
        self.data, self.cache, self.config = folder / "data", cache, folder / "robot.yaml"
        for name in NAMES:
            make_trajectory(self.data / name, stamp=int(name[-1]))
        self.configure()

    def configure(self, **settings: Any) -> None:
        content = yaml.safe_load(write_config(self.config, self.data, **settings).read_text())
        content["datasets"]["robot"]["cache_dir"] = str(self.cache)
        self.config.write_text(yaml.safe_dump(content))

    def check_recorded(self) -> list[str]:
        """What is recorded is true, and no trajectory is blamed; returns the completed ones."""
        if not (self.cache / "progress.json").exists():
            return []
        progress = read_progress(self.cache)
        assert progress["failures"] == {}
        for name in progress["completed_trajectories"]:
            sizes = [path.stat().st_size for path in chunk_files(self.cache / name)]
            assert sizes == progress["trajectory_records"][name]["bytes"]
            assert check_stamps(self.cache, name, int(name[-1])) == ROWS
        return progress["completed_trajectories"]

    def check_finished(self, outcome: Outcome) -> None:
        assert outcome.code == 0, outcome.err
        assert sorted(self.check_recorded()) == list(NAMES)
        assert list((self.cache / ".staging").iterdir()) == []


def utils(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """progress_utils.py in this process, without a terminal."""
    capsys.readouterr()
    code = progress_utils.main([str(argument) for argument in arguments])
    return Outcome(code, *capsys.readouterr())


def before_batch(monkeypatch: pytest.MonkeyPatch, action: Callable[[int, torch.Tensor], object]) -> None:
    """Do something before a batch is encoded: it gets the number of those before it, and the batch."""
    encode = StampEncoder.encode

    def act_and_encode(self: StampEncoder, pixels: torch.Tensor) -> Any:
        action(len(self.batch_sizes), pixels)
        return encode(self, pixels)

    monkeypatch.setattr(StampEncoder, "encode", act_and_encode)


def immutable(folder: Path, on: bool) -> bool:
    """Not even root may write."""
    return subprocess.run(["chattr", "+i" if on else "-i", folder], capture_output=True, check=False).returncode == 0


def read_only_mount(folder: Path, on: bool) -> bool:
    mode = "remount,ro,bind" if on else "remount,rw,bind"
    commands = (
        [["mount", "--bind", folder, folder]] * on + [["mount", "-o", mode, folder]] + [["umount", folder]] * (not on)
    )
    return all(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in commands)


def overwrite(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def change(**values: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": overwrite(b""),
    "not UTF-8": overwrite(b'{"format_version": 1, "dataset_name": "\xff"}'),
    "of a newer version": change(format_version=2),
    "of wrong types": change(completed_trajectories={"t0": 1}, failures=[]),
    "a folder": make_folder,
    "a link to itself": link_to_itself,
}
IS_NO_FILE = ("a folder", "a link to itself")


def damage(robot: Robot, kind: str) -> None:
    """Damage the record of a complete cache. One trajectory is enough, and is verified in this process."""
    shutil.rmtree(robot.cache / "t1")
    shutil.rmtree(robot.cache / "t2")
    DAMAGES[kind](robot.cache / "progress.json")
