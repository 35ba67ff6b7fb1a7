"""What a refused configuration is answered with: the line, what was found there, and what to write."""

import shutil
from pathlib import Path

import pytest

import dino_cache
from dino_cache import load_config
from dino_cache_extras.config_advice import known_model, pattern_for
from progress_utils import RefusedError
from support import make_trajectory, read_progress, run_cache, run_utils


def refusal(folder: Path, text: str, **overrides: object) -> str:
    path = folder / "lab.yaml"
    path.write_text(text)
    with pytest.raises(RefusedError) as refused:
        load_config(path, overrides)
    return str(refused.value)


ROBOT = "datasets:\n  robot:\n    data_folder: data\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "datasets:\n  robot:\n\tdata_folder: /data\n",
            r"line 3 is indented by a tab: '\tdata_folder: /data'; write spaces: '    data_folder: /data'",
        ),
        (
            "datasets:  # ours\n    robot:  # the: first\n        data_folder: /data\n# more\n\t\tsplit: s\n",
            r"line 5 is indented by a tab: '\t\tsplit: s'; write spaces: '        split: s'",
        ),
        (
            f'tokens: [cls]\nframe_pattern: "frame_(\\d+)\\.jpg"  # ours\n{ROBOT}',
            r"line 2: a backslash in double quotes is an escape; write `frame_pattern: 'frame_(\d+)\.jpg'`",
        ),
        (
            f"image_size: [3, 224, 224]\n{ROBOT}",
            "(line 1: write `image_size: [224, 224]`, height and width, without channels)",
        ),
        (
            f"{ROBOT}    image_size: [224, 308, 3]\n",
            "(line 4: write `image_size: [224, 308]`, height and width, without channels)",
        ),
        (f"# square\nimage_size: 224\n{ROBOT}", "(line 2: write `image_size: [224, 224]`, height and width, "),
        (
            "tokens: [cls]\ndatasets:\n  - name: robot\n    data_folder: /data/robot\n  - name: yard\n",
            "(line 2: it is a list; write names: `datasets: {robot: {data_folder: /data/robot}}`)",
        ),
        ("datasets: [/data/a]\n", "(line 1: it is a list; write names: `datasets: {my_robot: {data_folder: /"),
        (
            "tokens: [cls]\ndata_folder: /data/robot\n",
            "unknown key data_folder: '/data/robot'; ",
        ),
        (
            "tokens: [cls]\ndata_folder: /data/robot\n",
            "(line 2: it belongs below a dataset: `datasets: {my_robot: {data_folder: /data/robot}}`)",
        ),
        (f"cache_dir: /c\n{ROBOT}", "(line 1: it belongs below a dataset: `datasets: {my_robot: {cache_dir: /c}}`)"),
        (f"dino_model_type: dinov2_vits14\n{ROBOT}", "(line 1: write `dino_model_type: small`)"),
        (f"{ROBOT}    dino_model_type: facebook/dinov2-base\n", "(line 4: write `dino_model_type: base`)"),
        (f"{ROBOT}    batch_sise: 8\n", "did you mean batch_size or patch_pool? (line 4)"),
        (f"dino_model_type: resnet50\n{ROBOT}", "(line 1)"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_its_line_and_what_to_write(tmp_path: Path, text: str, said: str) -> None:
    message = refusal(tmp_path, text)
    assert said in message
    assert str(tmp_path / "lab.yaml") in message


def test_an_image_size_of_the_right_form_is_not_advised_on(tmp_path: Path) -> None:
    message = refusal(tmp_path, f"image_size: [0, 224]\n{ROBOT}")
    assert "write" not in message.rpartition("image_size")[2]


def test_a_value_of_the_command_line_has_no_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, f"device: cuda\nresize: tile\n{ROBOT}", device="tpu")
    assert "resize: 'tile': should be 'crop' or 'stretch' (line 2)" in message
    assert "on the command line: device: 'tpu'" in message
    assert message.count("(line ") == 1


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1]\nb: *b\n" + ROBOT,  # not YAML: an alias to nothing
        "? [1, 2]\n: 3\n" + ROBOT,
        "image_size: {a: [1, 2]}\n" + ROBOT,
        "datasets: 3\n",
        "datasets: {robot: 3}\n",
        "image_size: [[[" + "[" * 2000 + "\n",
        "dino_model_type: [a, b]\n" + ROBOT,
        "datasets: [[1], {2: 3}]\n",
    ],
)
def test_what_is_no_configuration_at_all_is_refused_as_ever(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "lab.yaml") in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("dinov2_vits14", "small"), ("dinov2_vitb14", "base"), ("dinov2_vitl14", "large"), ("dinov2_vitg14", "giant"),
        ("dinov2_vitl14_reg", "large_reg"), ("dinov2_vits14_lc", "small"), ("dinov2_vitb14_reg_lc", "base_reg"),
        ("facebook/dinov2-small", "small"), ("facebook/dinov2-giant", "giant"), ("dinov2-large", "large"),
        ("facebook/dinov2-with-registers-base", "base_reg"), ("dinov2_large", "large"),
        ("dinov3_vits16", "dinov3_small"), ("dinov3_vits16plus", "dinov3_small_plus"), ("dinov3_vitb16", "dinov3_base"),
        ("dinov3_vith16plus", "dinov3_huge_plus"), ("dinov3_vit7b16", "dinov3_7b"), ("dinov3_vitl16", "dinov3_large"),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", "dinov3_large"),
        ("facebook/dinov3-vits16plus-pretrain-lvd1689m", "dinov3_small_plus"),
        ("facebook/dinov3-vit7b16-pretrain-lvd1689m", "dinov3_7b"),
        ("vit_small_patch14_dinov2.lvd142m", "small"), ("timm/vit_large_patch14_reg4_dinov2.lvd142m", "large_reg"),
        ("vit_base_patch16_dinov3", "dinov3_base"),
        ("Small", "small"),
        ("dinov2_vitxl14", None), ("resnet50", None), ("dinov3_convnext_tiny", None), ("dinov2_vits14_regs", None),
        ("vit", None), ("", None),
    ],
)  # fmt: skip
def test_official_names_of_models_are_known(name: str, ours: str | None) -> None:
    assert known_model(name) == ours


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_relative_data_folder_is_answered_with_the_folder_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trajectory(tmp_path / "work" / "data" / "robot" / "t")
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "lab.yaml"
    config.write_text("weights: random\ndatasets:\n  robot:\n    data_folder: data/robot\n")
    monkeypatch.chdir(tmp_path / "work")
    refused = run_cache(config)
    assert refused.returncode == 2
    assert f"data_folder: {tmp_path}/configs/data/robot is not a folder" in refused.stderr
    said = f"(line 4: 'data/robot' is relative to the folder of this file, {tmp_path}/configs; write "
    assert f"{said}`data_folder: {tmp_path}/work/data/robot`)" in refused.stderr
    shutil.rmtree(tmp_path / "work" / "data")
    (tmp_path / "configs" / "data" / "robots").mkdir(parents=True)
    refused = run_cache(config)
    assert f"{tmp_path}/configs/data holds robots; write the whole path)" in refused.stderr


@pytest.mark.slow
def test_frames_of_another_name_are_answered_with_their_frame_pattern(tmp_path: Path) -> None:
    make_trajectory(tmp_path / "data" / "t", count=12)
    for frame in (tmp_path / "data" / "t").glob("[0-9]*"):
        frame.rename(frame.with_name(f"frame_{int(frame.stem):06d}.jpg"))
    config = tmp_path / "lab.yaml"
    text = "weights: random\ndino_model_type: small\nimage_size: [28, 42]\ndatasets: {r: {data_folder: data}}\n"
    text += "# frame_pattern: 'frame_(\\d+)\\.jpg', for one, as the shipped file says\n"
    config.write_text(text)
    failed = run_cache(config)
    assert failed.returncode == 1
    told = "t: no frames here whose names match frame_pattern; it holds frame_000000.jpg, for one. "
    assert told + r"frame_pattern: 'frame_(\d+)\.jpg' reads its pictures" in failed.stderr
    poses = (tmp_path / "data" / "t" / "traj_data.pkl").rename(tmp_path / "poses")
    shutil.rmtree(tmp_path / "data" / "dino_cache_small")
    refused = run_cache(config)  # nor are there poses
    assert refused.returncode == 2
    assert r"It holds pictures that frame_pattern: 'frame_(\d+)\.jpg' reads" in refused.stderr
    poses.rename(tmp_path / "data" / "t" / "traj_data.pkl")
    config.write_text(r"frame_pattern: 'frame_(\d+)\.jpg'" + f"\n{text}")
    again = run_cache(config, "--yes")
    assert again.returncode == 0, again.stderr
    cache = tmp_path / "data" / "dino_cache_small"
    assert read_progress(cache)["completed_trajectories"] == ["t"]
    assert run_utils("verify", cache).returncode == 0


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["frame_000001.jpg"], r"'frame_(\d+)\.jpg'"),
        (["calib.txt", "cam0-12-0003.PNG", "cam0-12-0004.PNG"], r"'cam0\-12\-(\d+)\.PNG'"),
        (["it's 3.jpeg"], r"'it''s\ (\d+)\.jpeg'"),
        (["calib.txt", "a.jpg"], None),
        ([], None),
    ],
)
def test_a_pattern_is_found_for_numbered_pictures(names: list[str], pattern: str | None) -> None:
    assert pattern_for(names) == pattern


def test_advice_is_given_once(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text(f"image_size: 224\n{ROBOT}")
    with pytest.raises(RefusedError) as refused, dino_cache.advice_on(tmp_path / "lab.yaml", {}):
        load_config(tmp_path / "lab.yaml")
    assert str(refused.value).count("(line 1") == 1
