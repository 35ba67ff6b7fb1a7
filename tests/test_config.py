"""The configuration: what is taken from it, and what is refused, with which words, before anything is written."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import dino_cache
from dino_cache import CacheSpec, DatasetConfig, RunOptions, check_image_size, load_config, spec_differences
from progress_utils import RefusedError
from support import FIRST, ROOT, Outcome, chunk_files, make_trajectory, tree, write_config, write_gnm

SHIPPED = sorted((ROOT / "config" / "data").glob("*.yaml"))
REAL_MODEL_SHAPE = dino_cache.model_shape  # the fixture `encoders` replaces it


def write(folder: Path, settings: dict[str, Any] | None = None, **dataset: Any) -> Path:
    """A config file with one dataset, `robot`, whose settings are `dataset`."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**(settings or {}), "datasets": {"robot": {"data_folder": "data", **dataset}}}))
    return path


def load(folder: Path, settings: dict[str, Any] | None = None, **dataset: Any) -> DatasetConfig:
    (config,) = load_config(write(folder, settings, **dataset), {})
    return config


def refusal(path: Path) -> str:
    """Why a config file is refused; the message names the file in every case."""
    with pytest.raises(RefusedError) as caught:
        load_config(path, {})
    assert str(path) in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The shipped files.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path, {})


@pytest.mark.parametrize(
    "key", [*CacheSpec.model_fields, *RunOptions.model_fields, "data_folder", "cache_dir", "split"]
)
def test_every_key_is_explained_in_the_documented_config(key: str) -> None:
    """A comment stands in the key's line or in the one above it; a key that is optional may be commented out."""
    lines = (ROOT / "config" / "data" / "dino_cache.yaml").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines) if re.match(rf"\s*(# )?{key}:", line)]
    assert "#" in lines[number].split(":", 1)[1] + lines[number - 1]


def test_other_models_need_the_extras_and_a_refusal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dino_cache, "is_there", lambda module: False)
    for name in ("siglip2_base", "timm:resnet18.a1_in1k"):
        with pytest.raises(RefusedError, match=rf"dino_model_type: '{name}': .* need dino_cache_extras, not there"):
            load(tmp_path, {"dino_model_type": name})


def test_the_documented_values_are_the_defaults() -> None:
    path = ROOT / "config" / "data" / "dino_cache.yaml"
    (config,) = load_config(path, {})
    assert (config.spec, config.options) == (CacheSpec(), RunOptions())
    assert {*yaml.safe_load(path.read_text())} == {*CacheSpec.model_fields, *RunOptions.model_fields, "datasets"}


def test_defaults_are_those_of_the_design(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.spec.to_json() == {
        "dino_model_type": "large",
        "weights": "pretrained",
        "tokens": ["cls"],
        "image_size": [224, 308],
        "resize": "crop",
        "pixel_mean": [0.485, 0.456, 0.406],  # ImageNet
        "pixel_std": [0.229, 0.224, 0.225],
        "precision": "auto",
        "max_chunk_distance_m": 50.0,
        "overlap_distance_m": 1.0,
        "min_chunk_distance_m": 0.3,
        "frame_stride": 1,
        "frame_pattern": config.spec.frame_pattern,
    }
    options = config.options
    assert (options.enable_progress_tracking, options.force_rebuild, options.max_attempts) == (True, False, 3)
    assert (options.checksum, options.progress_interval_s) == ("stat", 30)


# As version 0.1.0 recorded it before formats came, with its fingerprint for the weights digest "w".
BEFORE_FORMATS = {
    "dino_model_type": "large", "weights": "pretrained", "tokens": ["cls"], "image_size": [224, 308], "resize": "crop",
    "pixel_mean": [0.485, 0.456, 0.406], "pixel_std": [0.229, 0.224, 0.225], "precision": "auto",
    "max_chunk_distance_m": 50.0, "overlap_distance_m": 1.0, "min_chunk_distance_m": 0.3, "frame_stride": 1,
    "frame_pattern": r"(\d+)\.(?:jpg|jpeg|png|JPG|JPEG|PNG)",
}  # fmt: skip


def test_a_cache_from_before_the_formats_keeps_its_configuration_and_fingerprint() -> None:
    text = json.dumps({**BEFORE_FORMATS, "weights": "w"}, sort_keys=True)
    assert CacheSpec().fingerprint("w") == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert spec_differences(BEFORE_FORMATS, CacheSpec()) == []


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("image_key", "a", None), ("position_key", "p", None), ("yaw_key", "y", None), ("position_scale", 0.01, 1.0),
        ("chunk_by", "frames", "distance"), ("max_chunk_frames", 100, 256), ("overlap_frames", 0, 8),
        ("time_zero", "container", "first_frame"),
        ("engine", "openvino", "torch"), ("compile", True, False),
    ],
)  # fmt: skip
def test_a_setting_that_came_with_the_formats_is_a_change_where_it_is_not_the_default(
    key: str, value: object, default: object
) -> None:
    spec = CacheSpec(**{key: value})
    assert spec_differences(BEFORE_FORMATS, spec) == [(key, default, value)]
    assert spec_differences(spec.to_json(), CacheSpec()) == [(key, value, default)]
    assert spec_differences(spec.to_json(), spec) == []
    assert spec.fingerprint("w") != CacheSpec().fingerprint("w")


@pytest.mark.parametrize("name", ["recon", "lerobot", "video", "rosbag", "sample"])
def test_an_example_config_loads_also_with_its_comments_taken_up(tmp_path: Path, name: str) -> None:
    text = (ROOT / "config" / "data" / f"{name}.yaml").read_text()
    load_config(ROOT / "config" / "data" / f"{name}.yaml", {})
    taken_up = tmp_path / "taken_up.yaml"
    taken_up.write_text(re.sub(r"^    # (\w+: )", r"    \1", text, flags=re.M))
    (config,) = load_config(taken_up, {})
    assert config.format == (name if name != "sample" else "auto")


# ---------------------------------------------------------------------------------------------------------------------
# Keys.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("max_chunk_distance", "max_chunk_distance_m"),
        ("overlap", "overlap_distance_m"),
        ("batchsize", "batch_size"),
        ("dino_model", "dino_model_type"),
        ("Tokens", "tokens"),
        ("decoders", "decode_workers"),
        ("cpu_per_worker", "cpus_per_worker"),
        ("progress_interval", "progress_interval_s"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path, key: str, nearest: str) -> None:
    for path, place in ((write(tmp_path, {key: 17}), ""), (write(tmp_path, **{key: 17}), r"datasets\.robot\.")):
        message = refusal(path)
        assert re.search(rf"\b{place}{key}\b.*\b17\b.*\b{nearest}\b", message)
        assert "pixel_mean" not in message  # the nearest key, not all of them


def test_an_unknown_key_of_a_dataset_may_be_nearest_to_a_key_that_only_datasets_have(tmp_path: Path) -> None:
    assert re.search(r"datasets\.robot\.cachedir\b.*\bcache_dir\b", refusal(write(tmp_path, cachedir="x")))


@pytest.mark.parametrize("key", ["data_sets", "Datasets", "dataset"])
def test_a_misspelt_datasets_is_refused_with_the_nearest_known_key(tmp_path: Path, key: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"{key}: {{robot: {{data_folder: data}}}}\n")
    assert re.search(rf"unknown key {key}\b.*\bdatasets\b", refusal(path))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("batch_size: 1\nbatch_size: 2\ndatasets: {robot: {data_folder: data}}\n", "batch_size"),
        ("datasets: {robot: {data_folder: data, split: a, split: b}}\n", "split"),
        ("datasets:\n  robot: {data_folder: data}\n  robot: {data_folder: other}\n", "robot"),
        ("datasets: {robot: {data_folder: data}}\nbatch_size: 1\ndatasets: {}\n", "datasets"),
    ],
    ids=["top level", "in a dataset", "a dataset", "datasets"],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    message = refusal(path)
    assert named in message
    assert "twice" in message


def test_a_key_merged_from_an_anchor_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "datasets:\n"
        "  indoor: &base {data_folder: a, batch_size: 3, frame_stride: 2}\n"
        "  outdoor: {<<: *base, data_folder: b, frame_stride: 5}\n"
    )
    indoor, outdoor = load_config(path, {})
    assert [indoor.data_folder, outdoor.data_folder] == [tmp_path / "a", tmp_path / "b"]
    assert [indoor.spec.frame_stride, outdoor.spec.frame_stride] == [2, 5]
    assert [indoor.options.batch_size, outdoor.options.batch_size] == [3, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Values.
# ---------------------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
WRONG: list[tuple[str, Any, list[str]]] = [  # key, value, what the message says beside the key
    ("dino_model_type", "huge", ["'huge'", "small", "small_reg", "base", "large", "giant", "giant_reg", "dinov3_7b"]),
    ("dino_model_type", None, ["None", "small"]),
    ("weights", "", ["''"]),
    ("weights", 3, ["3"]),
    ("tokens", ["cls_token"], ["'cls_token'", "'cls'", "'patch'", "'register'"]),
    ("tokens", [], ["[]"]),
    ("tokens", "cls", ["'cls'"]),
    ("tokens", ["cls", "patch", "cls"], ["twice"]),
    ("tokens", ["register"], ["dino_model_type", "large", "large_reg", "dinov3"]),
    ("dino_model_type", "timm:", ["'timm:'", "small"]),
    ("layers", [], ["[]", "blocks"]),
    ("layers", [5, -1], ["[5, -1]", "from 0"]),
    ("layers", [5, 5], ["twice"]),
    ("layers", 5, ["5", "a list"]),
    ("layer_norm", False, ["layer_norm: false is for layers"]),
    ("image_size", [224], ["[224]"]),
    ("image_size", [224, 308, 3], ["[224, 308, 3]"]),
    ("image_size", 224, ["224"]),
    ("image_size", [224.0, 308], ["224.0"]),
    ("image_size", ["wide", 308], ["'wide'"]),
    ("image_size", [0, 308], ["0"]),
    ("image_size", [224, -14], ["-14"]),
    ("resize", "Crop", ["'Crop'", "'crop'", "'stretch'"]),
    ("pixel_mean", [0.5, 0.5], ["[0.5, 0.5]"]),
    ("pixel_mean", [0.5, 0.5, NAN], ["nan"]),
    ("pixel_mean", [0.5, 0.5, "grey"], ["'grey'"]),
    ("pixel_std", [0.5, 0.5, 0], ["0", "greater than 0"]),
    ("pixel_std", [0.5, -0.5, 0.5], ["-0.5", "greater than 0"]),
    ("pixel_std", [INF, 0.5, 0.5], ["inf"]),
    ("precision", "fp64", ["'fp64'", "'auto'", "'fp32'", "'bf16'", "'fp16'"]),
    ("engine", "onnx", ["'onnx'", "torch", "openvino"]),
    ("engine", None, ["None"]),
    ("compile", "yes please", ["'yes please'", "boolean"]),
    ("max_chunk_distance_m", "50 m", ["'50 m'", "number"]),
    ("max_chunk_distance_m", True, ["True", "number"]),
    ("max_chunk_distance_m", 0, ["0", "greater than 0"]),
    ("max_chunk_distance_m", -1.0, ["-1.0", "greater than 0"]),
    ("max_chunk_distance_m", NAN, ["nan", "finite"]),
    ("max_chunk_distance_m", INF, ["inf", "finite"]),
    ("overlap_distance_m", -5e-324, ["-5e-324", "greater than or equal to 0"]),
    ("overlap_distance_m", NAN, ["nan", "finite"]),
    ("overlap_distance_m", INF, ["inf", "finite"]),
    ("min_chunk_distance_m", -0.1, ["-0.1", "greater than or equal to 0"]),
    ("min_chunk_distance_m", NAN, ["nan", "finite"]),
    ("min_chunk_distance_m", None, ["None", "number"]),
    ("frame_stride", 0, ["0", "1"]),
    ("frame_stride", 1.5, ["1.5", "integer"]),
    ("frame_stride", True, ["True", "integer"]),
    ("frame_pattern", r"(\d+", [r"(\\d+", "regular expression"]),
    ("frame_pattern", r"\d+\.jpg", ["one group", "0"]),
    ("frame_pattern", r"(a)(\d+)", ["one group", "2"]),
    ("frame_pattern", 7, ["7"]),
    ("batch_size", 0, ["0", "1", "auto"]),
    ("batch_size", "all", ["'all'", "auto"]),
    ("batch_size", 2.0, ["2.0", "auto"]),
    ("decode_workers", 0, ["0", "1", "auto"]),
    ("decode_workers", -1, ["-1", "1", "auto"]),
    ("decode_workers", 1025, ["1025", "1024", "auto"]),
    ("batch_size", 10**30, [str(10**30), "2147483647", "auto"]),
    ("frame_stride", 2**31, ["2147483648", "2147483647"]),
    ("device", "tpu", ["'tpu'", "auto", "cpu", "cuda"]),
    ("device", "cuda:", ["'cuda:'", "auto", "cpu", "cuda"]),
    ("device", "cuda:first", ["'cuda:first'", "auto", "cpu", "cuda"]),
    ("device", 0, ["0"]),
    ("enable_progress_tracking", "maybe", ["'maybe'", "boolean"]),
    ("enable_progress_tracking", 1, ["1", "boolean"]),
    ("force_rebuild", "False", ["'False'", "boolean"]),
    ("max_attempts", 0, ["0", "1"]),
    ("checksum", "md5", ["'md5'", "'stat'", "'content'"]),
    ("progress_interval_s", 0, ["0", "greater than 0"]),
    ("progress_interval_s", NAN, ["nan"]),
    ("progress_interval_s", INF, ["inf"]),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG])
def test_a_wrong_value_is_refused_with_key_value_and_what_is_allowed(
    tmp_path: Path, key: str, value: Any, said: list[str]
) -> None:
    for path, place in ((write(tmp_path, {key: value}), key), (write(tmp_path, **{key: value}), "datasets.robot")):
        message = refusal(path)
        what = message.replace(str(path), "")
        assert [words for words in [place, key, *said] if words not in what] == [], message


@pytest.mark.parametrize("key", ["data_folder", "cache_dir", "split"])
@pytest.mark.parametrize("value", ["", 7, ["data"]], ids=repr)
def test_a_path_that_is_no_path_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    """An empty split, say of an unset variable in a template, must not mean all trajectories."""
    message = refusal(write(tmp_path, **{key: value}))
    assert f"datasets.robot.{key}" in message
    assert repr(value) in message


def test_all_faults_of_a_dataset_are_told_together(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, {"resize": "tile", "max_attempts": 0}, data_folder=None, frame_stride=0))
    for fault in ("resize", "'tile'", "max_attempts", "datasets.robot.frame_stride", "datasets.robot.data_folder"):
        assert fault in message


@pytest.mark.parametrize(
    ("max_m", "overlap_m", "min_m", "named"),
    [
        (2.0, math.nextafter(2.0, 0), 0.5, []),
        (2.0, 2.0, 0.5, ["overlap_distance_m", "max_chunk_distance_m"]),
        (2.0, math.nextafter(2.0, 3), 0.5, ["overlap_distance_m", "max_chunk_distance_m"]),
        (2.0, 0.5, math.nextafter(2.0, 0), []),
        (2.0, 0.5, 2.0, []),
        (2.0, 0.5, math.nextafter(2.0, 3), ["min_chunk_distance_m", "max_chunk_distance_m"]),
        (2, 0, 0, []),
        (5e-324, 0.0, 0.0, []),
        (1e308, 1.0, 1e308, []),
    ],
)
def test_limits_are_0_overlap_below_max_and_0_min_up_to_max(
    tmp_path: Path, max_m: float, overlap_m: float, min_m: float, named: list[str]
) -> None:
    settings = {"max_chunk_distance_m": max_m, "overlap_distance_m": overlap_m, "min_chunk_distance_m": min_m}
    if not named:
        spec = load(tmp_path, settings).spec
        assert {key: getattr(spec, key) for key in settings} == settings
        return
    message = refusal(write(tmp_path, settings))
    for key in named:
        assert f"{key}: {settings[key]}" in message


def test_compile_is_not_for_another_engine(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="compile: true is for engine: torch; engine: openvino compiles by itself"):
        load(tmp_path, engine="openvino", compile=True)


def test_a_limit_that_only_a_dataset_breaks_is_refused(tmp_path: Path) -> None:
    """Against a default, too: the overlap is 1 m."""
    message = refusal(write(tmp_path, max_chunk_distance_m=1.0))
    assert "datasets.robot" in message
    assert "overlap_distance_m: 1.0" in message
    assert "max_chunk_distance_m: 1.0" in message


def test_any_key_may_be_overridden_under_a_dataset_for_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    top = {"dino_model_type": "base", "frame_stride": 2, "batch_size": 7, "tokens": ["cls", "patch"]}
    own = {
        "dino_model_type": "small_reg",
        "frame_stride": 3,
        "batch_size": 9,
        "tokens": ["register"],
        "max_attempts": 1,
    }
    path.write_text(yaml.safe_dump({**top, "datasets": {"a": {"data_folder": "a"}, "b": {"data_folder": "b", **own}}}))
    a, b = load_config(path, {})
    assert (a.name, a.spec.dino_model_type, a.spec.frame_stride, a.spec.tokens) == ("a", "base", 2, ("cls", "patch"))
    assert (b.name, b.spec.dino_model_type, b.spec.frame_stride, b.spec.tokens) == ("b", "small_reg", 3, ("register",))
    assert [(c.options.batch_size, c.options.max_attempts) for c in (a, b)] == [(7, 3), (9, 1)]
    assert [c.cache_dir for c in (a, b)] == [
        tmp_path / "a" / "dino_cache_base",
        tmp_path / "b" / "dino_cache_small_reg",
    ]


def test_the_order_of_tokens_is_no_setting(tmp_path: Path) -> None:
    settings = {"dino_model_type": "small_reg"}
    one = load(tmp_path, settings, tokens=["register", "cls", "patch"]).spec
    assert one == load(tmp_path, settings, tokens=["patch", "register", "cls"]).spec


# ---------------------------------------------------------------------------------------------------------------------
# Paths.
# ---------------------------------------------------------------------------------------------------------------------


def test_relative_paths_are_relative_to_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "cron").mkdir()
    settings = {"data_folder": "../data", "cache_dir": "caches/robot", "split": "./names.txt", "weights": "w/small.pth"}
    write(tmp_path / "configs", **settings)
    monkeypatch.chdir(tmp_path / "cron")
    (config,) = load_config(Path("../configs/config.yaml"), {})
    assert config.data_folder == tmp_path / "data"
    assert config.cache_dir == tmp_path / "configs" / "caches" / "robot"
    assert config.split == tmp_path / "configs" / "names.txt"
    assert config.spec.weights == str(tmp_path / "configs" / "w" / "small.pth")


def test_home_and_variables_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/robot")
    monkeypatch.setenv("DISK", "/mnt/disk")
    monkeypatch.setenv("RUN", "night 7")
    config = load(
        tmp_path, data_folder="~/data", cache_dir="$DISK/${RUN}/cache", split="$DISK/names.txt", weights="~/w.pth"
    )
    assert config.data_folder == Path("/home/robot/data")
    assert config.cache_dir == Path("/mnt/disk/night 7/cache")
    assert config.split == Path("/mnt/disk/names.txt")
    assert config.spec.weights == "/home/robot/w.pth"


@pytest.mark.parametrize("key", ["data_folder", "cache_dir", "split", "weights"])
@pytest.mark.parametrize("text", ["$NOT_SET_ANYWHERE/x", "/data/${NOT_SET_ANYWHERE}"])
def test_a_variable_that_is_not_set_is_refused(tmp_path: Path, key: str, text: str) -> None:
    message = refusal(write(tmp_path, **{key: text}))
    assert key in message
    assert text in message
    assert "not set" in message


def test_without_a_cache_dir_the_cache_lies_in_the_data_folder_under_the_models_name(tmp_path: Path) -> None:
    assert load(tmp_path).cache_dir == tmp_path / "data" / "dino_cache_large"
    assert load(tmp_path, cache_dir=None, split=None).cache_dir == tmp_path / "data" / "dino_cache_large"
    assert load(tmp_path, {"dino_model_type": "giant_reg"}).cache_dir == tmp_path / "data" / "dino_cache_giant_reg"
    assert load(tmp_path).split is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"data_folder": "a", "cache_dir": "c"}, {"data_folder": "b", "cache_dir": "c"}),
        ({"data_folder": "a", "cache_dir": "c"}, {"data_folder": "b", "cache_dir": "x/../c/"}),
        ({"data_folder": "a", "cache_dir": "c"}, {"data_folder": "b", "cache_dir": "link_to_c"}),
        ({"data_folder": "a"}, {"data_folder": "b", "cache_dir": "a/dino_cache_large"}),
        ({"data_folder": "a", "split": "train.txt"}, {"data_folder": "a", "split": "test.txt"}),
    ],
    ids=["same", "spelt otherwise", "through a link", "the default of another", "two splits of one folder"],
)
def test_two_datasets_with_one_cache_dir_are_refused(tmp_path: Path, one: dict, other: dict) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "link_to_c").symlink_to("c")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"datasets": {"indoor": one, "outdoor": other}}))
    message = refusal(path)
    assert "indoor" in message
    assert "datasets.outdoor.cache_dir" in message


@pytest.mark.parametrize("cache_dir", ["data", "data/.", "data/..", ".", "/", "link_to_data"])
def test_a_cache_dir_that_holds_the_data_folder_is_refused(tmp_path: Path, cache_dir: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link_to_data").symlink_to("data")
    assert "datasets.robot.cache_dir" in refusal(write(tmp_path, cache_dir=cache_dir))


@pytest.mark.parametrize(
    ("one", "other", "blamed"),
    [
        ({"cache_dir": "c"}, {"cache_dir": "c/indoor"}, "outdoor"),
        ({"cache_dir": "c/outdoor"}, {"cache_dir": "c"}, "indoor"),
        ({"cache_dir": "c", "data_folder": "b"}, {"cache_dir": "e", "data_folder": "c/d"}, "outdoor"),
    ],
    ids=["a cache", "a cache, the other way round", "data"],
)
def test_a_cache_dir_that_holds_another_datasets_folder_is_refused(
    tmp_path: Path, one: dict, other: dict, blamed: str
) -> None:
    path = tmp_path / "config.yaml"
    datasets = {"indoor": {"data_folder": "a", **one}, "outdoor": {"data_folder": "b", **other}}
    path.write_text(yaml.safe_dump({"datasets": datasets}))
    message = refusal(path)
    assert ".cache_dir" in message
    assert f"of {blamed}" in message


@pytest.mark.parametrize("cache_dir", ["data/cache", "data2", "dat", "data_cache/deep"])
def test_a_cache_dir_beside_or_below_the_data_folder_is_fine(tmp_path: Path, cache_dir: str) -> None:
    assert load(tmp_path, cache_dir=cache_dir).cache_dir == tmp_path / cache_dir


# ---------------------------------------------------------------------------------------------------------------------
# The command line: exit 2, and nothing written.
# ---------------------------------------------------------------------------------------------------------------------

DATASET = "datasets: {robot: {data_folder: data}}\n"
NOT_A_CONFIG: dict[str, bytes] = {
    "empty": b"",
    "a list": b"- datasets\n",
    "a word": b"datasets\n",
    "no datasets": b"batch_size: 3\n",
    "datasets empty": b"datasets: {}\n",
    "datasets a list": b"datasets: [robot]\n",
    "dataset without settings": b"datasets: {robot: }\n",
    "dataset without data_folder": b"datasets: {robot: {cache_dir: cache}}\n",
    "dataset named by a number": b"datasets: {7: {data_folder: data}}\n",
    "colons": b"a: b: c\n",
    "a tab": b"datasets:\n\trobot: {}\n",
    "an open bracket": b"image_size: [224, 308\n" + DATASET.encode(),
    "very deep": b"[" * 20_000,
    "bytes": b"\xff\xfe\x00\x01",
    "NUL": b"datasets: \0\n",
    "Latin-1": b"weights: caf\xe9.pth\n" + DATASET.encode(),
    "an unfilled template": b"weights: {{ path }}\n" + DATASET.encode(),
    "a list as a key": b"? [224, 308]\n: image_size\n" + DATASET.encode(),
    "a date that is none": b"weights: 2022-13-45\n" + DATASET.encode(),
    "a number that is none": b"batch_size: 0x_\n" + DATASET.encode(),
    "a Python object": b"weights: !!python/object/apply:os.getcwd []\n" + DATASET.encode(),
    "an unknown key": b"sttride: 2\n" + DATASET.encode(),
    "a wrong value": b"frame_stride: 0\n" + DATASET.encode(),
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder with a config that runs, config.yaml, and the data for it."""
    make_trajectory(tmp_path / "data" / "t")
    return write_config(tmp_path / "config.yaml", tmp_path / "data").parent


def assert_refused(outcome: Outcome, *said: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    assert [words for words in said if words not in outcome.err] == [], outcome.err


@pytest.mark.parametrize("what", NOT_A_CONFIG)
def test_a_file_that_is_no_configuration_ends_with_exit_2(
    good: Path, run_here: Callable[..., Outcome], what: str
) -> None:
    path = good / "config.yaml"
    path.write_bytes(NOT_A_CONFIG[what])
    before = tree(good)
    assert_refused(run_here(path), str(path))
    assert tree(good) == before


def test_a_config_that_cannot_be_read_ends_with_exit_2(good: Path, run_here: Callable[..., Outcome]) -> None:
    assert_refused(run_here(good / "gone.yaml"), str(good / "gone.yaml"))
    assert_refused(run_here(good), str(good))


@pytest.mark.parametrize("option", [(), ("--dry-run",), ("--force-rebuild", "--yes")], ids=str)
def test_an_unknown_dataset_is_refused_with_the_known_ones(
    good: Path, run_here: Callable[..., Outcome], option: tuple[str, ...]
) -> None:
    before = tree(good)
    assert_refused(run_here(good / "config.yaml", "--dataset", "robto", *option), "robto", "robot")
    assert_refused(run_here(good / "config.yaml", "--dataset", "robot", "--dataset", "x", *option), "--dataset x")
    assert tree(good) == before


def two_datasets(good: Path, **changes: dict[str, str]) -> Path:
    """The good config with a second dataset, `other`."""
    make_trajectory(good / "more" / "u", stamp=1)
    config = yaml.safe_load((good / "config.yaml").read_text())
    config["datasets"]["other"] = {"data_folder": str(good / "more")}
    for name, settings in changes.items():
        config["datasets"][name] |= settings
    path = good / "two.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_dataset_takes_the_named_one_alone(good: Path, run_here: Callable[..., Outcome]) -> None:
    outcome = run_here(two_datasets(good), "--dataset", "other")
    assert outcome.code == 0, outcome.err
    assert {path.parent for path in chunk_files(good)} == {good / "more" / "dino_cache_small" / "u"}
    assert not (good / "data" / "dino_cache_small").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data_folder": "gone"}, "gone"),
        ({"data_folder": "config.yaml"}, "config.yaml"),
        ({"cache_dir": "data/dino_cache_small"}, "cache_dir"),
        ({"cache_dir": "more"}, "cache_dir"),
        ({"frame_stride": 0}, "frame_stride"),
        ({"split": "$NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
    ],
    ids=str,
)
@pytest.mark.parametrize("arguments", [(), ("--dataset", "robot", "--dataset", "other")], ids=["all", "named"])
def test_a_refused_dataset_leaves_the_one_before_it_untouched(
    good: Path, run_here: Callable[..., Outcome], change: dict, said: str, arguments: tuple[str, ...]
) -> None:
    path = two_datasets(good, other=change)
    before = tree(good)
    assert_refused(run_here(path, *arguments), "other", said)
    assert tree(good) == before


@pytest.mark.parametrize("image_size", [[28, 41], [28, 43], [27, 42], [29, 42], [1, 1]], ids=str)
def test_an_image_size_that_is_no_multiple_of_the_patch_size_ends_with_exit_2(
    good: Path, run_here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, image_size: list[int]
) -> None:
    """Of the patch size that the model itself has."""
    monkeypatch.setattr(dino_cache, "model_shape", REAL_MODEL_SHAPE)
    outcome = run_here(write_config(good / "config.yaml", good / "data", image_size=image_size))
    nearest = [14, 14] if image_size == [1, 1] else [28, 42]
    assert_refused(outcome, "image_size", str(image_size), "14", "small", str(nearest))
    assert chunk_files(good) == []
    assert not list(good.rglob("progress.json"))


@pytest.mark.parametrize("image_size", [(14, 14), (224, 308), (518, 518), (14, 1400)], ids=str)
def test_multiples_of_the_patch_size_are_fine(image_size: tuple[int, int]) -> None:
    shape = REAL_MODEL_SHAPE("small_reg")
    assert (shape.patch_size, shape.width, shape.num_registers) == (14, 384, 4)
    check_image_size(CacheSpec(image_size=image_size, dino_model_type="small_reg"), shape)


def test_options_on_the_command_line_come_before_the_config(
    good: Path, run_here: Callable[..., Outcome], encoders: list
) -> None:
    """20 frames in batches of 6, although the config's top level says 8 and its dataset 7."""
    path = two_datasets(good, robot={"batch_size": 7})
    outcome = run_here(path, "--dataset", "robot", "--batch-size", "6", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert encoders[0].batch_sizes == [6, 6, 6, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--limit", "0"), ("--limit", "-1"), ("--limit", "1.5"), ("--batch-size", "0"), ("--batch-size", "auto"),
        ("--max-hours", "0"), ("--max-hours", "-1"), ("--max-hours", "nan"), ("--max-hours", "inf"), ("--stride", "2"),
        ("extra",),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_option_ends_with_exit_2(
    good: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    before = tree(good)
    with pytest.raises(SystemExit) as caught:
        dino_cache.main(["--config", str(good / "config.yaml"), *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err
    assert tree(good) == before


def test_without_a_config_the_command_ends_with_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dino_cache.main([])
    assert caught.value.code == 2
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["tpu", "cuda:", "CPU", ""])
def test_a_wrong_device_on_the_command_line_ends_with_exit_2(
    good: Path, run_here: Callable[..., Outcome], device: str
) -> None:
    before = tree(good)
    assert_refused(run_here(good / "config.yaml", "--device", device), "device", repr(device))
    assert tree(good) == before


def test_a_cuda_device_that_is_not_there_ends_with_exit_2(good: Path, run_here: Callable[..., Outcome]) -> None:
    assert_refused(run_here(good / "config.yaml", "--device", "cuda:63"), "cuda:63", "CUDA")
    assert chunk_files(good) == []


def test_weights_that_are_not_there_end_with_exit_2_and_name_the_file(
    good: Path, run_here: Callable[..., Outcome], encoders: list
) -> None:
    path = write_config(good / "config.yaml", good / "data", weights="gone/small.pth")
    assert_refused(run_here(path), str(good / "gone" / "small.pth"), "pretrained", "random")
    assert encoders == []
    assert chunk_files(good) == []
    assert not list(good.rglob("progress.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Settings that do not apply
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "key"),
    [
        ({"image_key": "images/rgb_left"}, "image_key"),
        ({"yaw_key": "yaw"}, "yaw_key"),
        ({"max_chunk_frames": 10}, "max_chunk_frames"),
        ({"chunk_by": "frames", "max_chunk_distance_m": 3.0}, "max_chunk_distance_m"),
    ],
)
def test_a_setting_under_a_dataset_that_does_not_apply_to_it_is_refused(
    run_bits: Callable[..., Outcome], tmp_path: Path, dataset: dict[str, Any], key: str
) -> None:
    write_gnm(tmp_path / "data", [FIRST])
    outcome = run_bits(dataset)
    assert outcome.code == 2
    assert f"datasets.robot.{key}: {dataset[key]}: does not apply" in outcome.err


def test_a_setting_at_the_top_that_does_not_apply_makes_no_other_cache(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_gnm(tmp_path / "data", [FIRST])
    assert run_bits().code == 0
    outcome = run_bits(image_key="observation.images.front", max_chunk_frames=10)
    assert outcome.code == 0, outcome.err
    assert "changed" not in outcome.err
