"""Caches named by the configuration that makes them, and a list of them in a narrow terminal."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
import yaml

import progress_utils
from dino_cache_extras.commands.narrow_table import fitted
from support import ROOT, read_progress, run_utils, tree, write_record


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config of two datasets, whose caches are there; that of a third has not been begun."""
    datasets = {}
    for name in ("robot", "yard", "later"):
        datasets[name] = {"data_folder": str(tmp_path / name), "cache_dir": f"caches/{name}"}
        (tmp_path / name).mkdir()
        if name != "later":
            write_record(tmp_path / "caches" / name, failed=1, dataset_name=name)
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump({"dino_model_type": "small", "datasets": datasets}, sort_keys=False))
    return path


def test_show_takes_a_dataset_of_a_config(config: Path) -> None:
    shown = run_utils("show", "--config", config, "--dataset", "yard")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == run_utils("show", config.parent / "caches" / "yard").stdout


def test_a_record_that_is_made_while_it_is_waited_for_is_not_called_missing(config: Path) -> None:
    cache_dir = config.parent / "caches" / "later"
    cache_dir.mkdir()
    command = [sys.executable, str(ROOT / "progress_utils.py"), "show", "--config", str(config), "--dataset", "later"]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with progress_utils.cache_lock(cache_dir), subprocess.Popen([*command, "--watch", "0.1"], **told) as watching:
        assert "has recorded nothing yet; waiting" in watching.stderr.readline()
        write_record(cache_dir, failed=1, dataset_name="later")
        assert "Dataset: later\n" in iter(watching.stdout.readline, "\n")
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=60)
    assert (watching.returncode, errors) == (0, "")


def test_show_shows_every_dataset_of_a_config(config: Path) -> None:
    shown = run_utils("show", "--config", config)
    each = [run_utils("show", config.parent / "caches" / name).stdout for name in ("robot", "yard")]
    assert (shown.returncode, shown.stdout) == (0, "\n".join(each))
    assert shown.stderr == f"Dataset later: no progress.json in {config.parent / 'caches' / 'later'} yet\n"
    rows = run_utils("show", "--config", config, "--json").stdout.splitlines()
    assert [json.loads(row)["dataset_name"] for row in rows] == ["robot", "yard"]


@pytest.mark.parametrize(
    "arguments",
    [["reset-failed"], ["reset", "--yes"], ["show", "--watch"], ["verify"], ["rebuild", "--yes"], ["report"],
     ["export", "--to", "flat", "-o", "out.h5"]],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_other_commands_want_one_dataset_and_list_them(config: Path, arguments: list[str]) -> None:
    before = tree(config.parent)
    refused = run_utils(*arguments, "--config", config)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "has several datasets: name one with --dataset: robot, yard, later" in refused.stderr
    assert tree(config.parent) == before


def test_a_command_that_changes_something_changes_the_dataset_that_is_named(config: Path) -> None:
    assert run_utils("reset-failed", "--config", config, "--dataset", "yard").returncode == 0
    failed = [read_progress(config.parent / "caches" / name)["failed_trajectories"] for name in ("robot", "yard")]
    assert failed == [["f0"], []]
    verified = run_utils("verify", "--config", config, "--dataset", "robot")
    assert (verified.returncode, f"Verified {config.parent / 'caches' / 'robot'}: 2" in verified.stdout) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--dataset", "rooof"], "--dataset rooof: not in {config}; it has robot, yard, later"),
        (["--dataset", "later"], "no progress.json here"),
    ],
)
def test_a_dataset_without_a_cache_is_refused(config: Path, arguments: list[str], why: str) -> None:
    refused = run_utils("show", "--config", config, *arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert why.format(config=config) in refused.stderr


def test_what_is_no_config_is_refused_as_a_run_refuses_it(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("batch_sise: 8\ndatasets: {robot: {data_folder: /data}}\n")
    refused = run_utils("show", "--config", tmp_path / "bad.yaml")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "unknown key batch_sise: 8" in refused.stderr
    assert "batch_size" in refused.stderr


# ---------------------------------------------------------------------------------------------------------------------
# A narrow terminal
# ---------------------------------------------------------------------------------------------------------------------


def test_a_list_fits_into_a_terminal(tmp_path: Path) -> None:
    long = "warehouse_with_a_name_that_is_long"
    write_record(tmp_path / "lab", dataset_name=long)
    write_record(tmp_path / "yard", dataset_name="yard")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "progress.json").write_text("{")
    command = [str(ROOT / "progress_utils.py"), "list", "--root", str(tmp_path)]
    environment = {"TZ": "UTC", "PATH": "/usr/bin:/bin"}
    with pexpect.spawn(
        sys.executable, command, timeout=60, encoding="utf-8", dimensions=(30, 80), env=environment
    ) as terminal:
        terminal.expect(pexpect.EOF)
    lines = terminal.before.replace("\r", "").splitlines()
    table = [line for line in lines if not line.startswith("  /")]
    assert max(map(len, table)) <= 80
    assert any(line.startswith("warehou") and "…" in line and line.endswith("Jan 10 15:30 2022") for line in table)
    assert lines[lines.index(f"  {tmp_path / 'yard'}") - 1].startswith("yard ")
    assert f"  {tmp_path / 'bad' / 'progress.json'}: " in terminal.before


def test_a_list_that_fits_stays_as_it_is() -> None:
    lines = [("Dataset", "Completed", "Last update", "Cache folder"), ("a", "1", "Mon Jan 10 15:30:45 2022", "/a")]
    assert fitted(lines, 200) == progress_utils.in_columns(lines)
