"""`--set`: keys of the configuration on the command line, checked as in the file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dino_cache import DatasetConfig, load_config
from progress_utils import RefusedError
from support import Outcome, Robot, read_progress, tree


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    path = tmp_path / "lab.yaml"
    path.write_text(
        "frame_stride: 2\ndatasets:\n  robot: {data_folder: robot}\n  yard.b: {data_folder: yard, frame_stride: 3}\n"
    )
    return path


def settings(configs: list[DatasetConfig]) -> list[tuple[int, str]]:
    return [(config.spec.frame_stride, config.data_folder.name) for config in configs]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, [(2, "robot"), (3, "yard")]),
        ({"frame_stride": 5}, [(5, "robot"), (5, "yard")]),
        ({"datasets.robot.frame_stride": 5}, [(5, "robot"), (3, "yard")]),
        ({"datasets.yard.b.frame_stride": 7, "frame_stride": 5}, [(5, "robot"), (7, "yard")]),
        ({"datasets.yard.b.data_folder": "other"}, [(2, "robot"), (3, "other")]),
    ],
)
def test_a_datasets_key_stands_before_a_key_of_all_and_both_before_the_file(
    lab: Path, overrides: dict, expected: list
) -> None:
    assert settings(load_config(lab, overrides)) == expected


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"frame_strid": 5}, "--set: unknown key frame_strid: 5; did you mean frame_stride"),
        ({"datasets.robot.batchsize": 5}, "--set: unknown key datasets.robot.batchsize: 5; did you mean batch_size"),
        ({"datasets.robt.frame_stride": 5}, "--set: unknown key datasets.robt.frame_stride: 5; "),
        ({"data_folder": "/data"}, "--set: unknown key data_folder: "),
        ({"robot": 5}, "--set: unknown key robot: 5; "),
        ({"frame_stride": 0}, "on the command line: frame_stride: 0: should be greater than or equal to 1"),
        ({"datasets.robot.tokens": ["cl"]}, "on the command line: tokens: 'cl'"),
    ],
)
def test_what_a_file_may_not_say_is_refused_on_the_command_line_too(lab: Path, overrides: dict, said: str) -> None:
    with pytest.raises(RefusedError) as refused:
        load_config(lab, overrides)
    assert said in str(refused.value)
    assert "line 1" not in str(refused.value)  # of the file, which says something else


def test_a_run_takes_its_settings_from_the_command_line(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    robot.add("t0")
    line = ["--set", "max_chunk_distance_m=3.5", "--set", "datasets.robot.tokens=[cls, patch]"]
    done = run_here(robot.config, *line)
    assert done.code == 0, done.err
    config = read_progress(robot.cache)["processing_config"]
    assert (config["max_chunk_distance_m"], config["tokens"]) == (3.5, ["cls", "patch"])
    before = tree(robot.cache)
    assert run_here(robot.config).code == 2  # the file's are a changed configuration
    assert run_here(robot.config, *line).code == 0
    after = tree(robot.cache)
    assert {path: after[path] for path in before if path.endswith(".h5")} == {
        path: content for path, content in before.items() if path.endswith(".h5")
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--set", "tokens"], "'tokens' is not KEY=VALUE"),
        (["--set", "=3"], "'=3' is not KEY=VALUE"),
        (["--set", "tokens=[cls"], "'tokens=[cls': the value is not YAML"),
        (["--set", "checksum=stat", "--set", "checksum=content"], "--set: checksum is given twice"),
    ],
)
def test_what_is_no_setting_is_wrong_usage(
    robot: Robot, run_here: Callable[..., Outcome], capsys: pytest.CaptureFixture[str], line: list[str], said: str
) -> None:
    robot.add("t0")
    with pytest.raises(SystemExit, match="2"):
        run_here(robot.config, *line)
    assert said in capsys.readouterr().err
    assert not robot.cache.exists()
