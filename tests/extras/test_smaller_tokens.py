"""Patch tokens pooled and as int8: what is stored follows independent rules, and every reader undoes it."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from cache_support import CHECKSUM, FINGERPRINT, plan_of
from cache_support import Robot as PosedRobot
from torch.utils.data import DataLoader

import dino_cache
import progress_utils
from dino_cache import (
    CacheSpec,
    CacheWindows,
    ChunkLabel,
    EncodedRows,
    TrajectoryWriter,
    encode_images,
    token_names,
    token_shapes,
)
from dino_cache_extras import images, smaller_tokens
from dino_cache_extras.commands import report, report_facts
from progress_utils import Progress, RefusedError
from support import (
    REAL,
    ROOT,
    StampEncoder,
    cache_content,
    chunk_files,
    make_trajectory,
    read_chunk,
    read_progress,
    sealed,
    straight_line,
    write_config,
)

SIZE, GRID, WIDTH, FRAMES = (56, 84), (4, 6), 24, 80  # image [px]; patches; D; of a trajectory
SHAPE = dino_cache.ModelShape(patch_size=14, width=WIDTH, num_registers=0)
POOLED = {"patch_pool": 2, "store": "int8"}


def computed(stamp: int, number: int, layer: int = 0) -> np.ndarray:
    """(h, w, D) float32: what the model gives for a frame; sums of them are exact."""
    values = np.random.default_rng([stamp, number, layer]).normal(size=(*GRID, WIDTH))
    return (np.rint(values * 256) / 256).astype(np.float32)


def pooled(patches: np.ndarray, size: int) -> np.ndarray:
    """Means over size x size patches, one after the other."""
    height, width = (count // size for count in GRID)
    rows = [
        patches[y * size : (y + 1) * size, x * size : (x + 1) * size].astype(np.float64).mean((0, 1))
        for y in range(height)
        for x in range(width)
    ]
    return np.array(rows, np.float32).reshape(height, width, -1)


def quantised(token: np.ndarray) -> tuple[np.ndarray, np.float16]:
    """One token (D,) by the rule: the least float16 that is at least its peak / 127, and multiples of it."""
    exact = np.abs(token.astype(np.float32)).max() / np.float32(127)
    scale = np.float16(exact)
    if np.float32(scale) < exact:
        scale = np.nextafter(scale, np.float16(np.inf))
    values = np.rint(token.astype(np.float32) / np.float32(scale)) if scale else np.zeros_like(token)
    return values.astype(np.int8), scale


def expected_rows(stamp: int, numbers: np.ndarray, spec: CacheSpec, layer: int = 0) -> dict[str, np.ndarray]:
    """The patch tokens that a chunk has for frames, of one layer."""
    patches = np.stack([pooled(computed(stamp, number, layer), spec.patch_pool) for number in numbers])
    if spec.store == "float16":
        return {"patch_tokens": patches.astype(np.float16)}
    pairs = [quantised(token) for token in patches.reshape(-1, WIDTH)]
    values, scales = (np.array(part) for part in zip(*pairs))
    return {"patch_tokens": values.reshape(patches.shape), "patch_tokens_scale": scales.reshape(patches.shape[:-1])}


class ComputingEncoder(StampEncoder):
    """What the pixels say decides the tokens as computed; they are stored as the spec wants it."""

    def __init__(self, spec: CacheSpec):
        super().__init__(spec.image_size, spec.tokens)
        self._layers, self._to_store = spec.layers, smaller_tokens.stage(spec)

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        self.batch_sizes.append(len(pixels))
        stamps = [(int(a), int(b) * 256 + int(c)) for a, b, c in self.stamps(pixels)]
        tokens = {}
        for place, layer in enumerate(self._layers or (0,)):
            patches = np.stack([computed(*stamp, layer) for stamp in stamps])
            tokens[token_names("cls", self._layers)[place]] = patches.mean((1, 2))
            tokens[token_names("patch", self._layers)[place]] = patches
        rows = self._to_store({name: torch.from_numpy(values) for name, values in tokens.items()})
        host = {name: values.numpy() for name, values in rows.items()}
        return lambda: EncodedRows(finite=host.pop("finite"), tokens=host)


@pytest.fixture
def run(run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """run(*arguments, **settings): a run over trajectories t1 and t2 of 80 and 12 frames, of chunks of 2 m."""

    def load(spec: CacheSpec, device: str) -> tuple[StampEncoder, str]:
        return ComputingEncoder(spec), "d" * 16

    monkeypatch.setattr(dino_cache, "load_encoder", load)
    monkeypatch.setattr(dino_cache, "model_shape", lambda model_type: SHAPE)
    make_trajectory(tmp_path / "data" / "t1", FRAMES, stamp=1)
    make_trajectory(tmp_path / "data" / "t2", 12, stamp=2)

    def run(*arguments: str, **settings: Any) -> Any:
        wanted = {"image_size": list(SIZE), "tokens": ["cls", "patch"], **settings}
        return run_here(write_config(tmp_path / "robot.yaml", tmp_path / "data", **wanted), *arguments)

    return run


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "data" / "dino_cache_small"


def spec_of(**settings: Any) -> CacheSpec:
    return CacheSpec(dino_model_type="small", image_size=SIZE, tokens=("cls", "patch"), **settings)


def undone(rows: dict[str, np.ndarray]) -> np.ndarray:
    """int8 patch tokens as float16, by hand."""
    exact = rows["patch_tokens"].astype(np.float64) * rows["patch_tokens_scale"].astype(np.float64)[..., None]
    return exact.astype(np.float16)


# ----------------------------------------------------------------------------------------------------------------------
# The rule
# ----------------------------------------------------------------------------------------------------------------------


def test_scales_round_up_and_clip_nothing_from_the_least_to_the_largest_float16():
    """Peaks around every border: zero, less than float16 has, where it is coarse, and the largest that it can hold."""
    peaks = [0, 1e-9, 2**-25, 127 * 2**-24, 127 * 1.4 * 2**-24, 127 * 2.49 * 2**-24, 1e-4, 1, 127, 3.7, 65_000, 65_468]
    shapes = np.random.default_rng(0).uniform(-1, 1, (len(peaks), 64)).astype(np.float32)
    shapes[:, 0], shapes[:, 1] = 1, -1
    tokens = shapes * np.array(peaks, np.float32)[:, None]
    values, scales = (part.numpy() for part in smaller_tokens.quantise(torch.from_numpy(tokens)))
    for token, integers, scale in zip(tokens, values, scales):
        expected, expected_scale = quantised(token)
        assert scale == expected_scale
        np.testing.assert_array_equal(integers, expected)
        back = integers.astype(np.float64) * np.float64(scale)
        assert np.abs(back - token).max() <= np.float64(scale) / 2 * 1.001
        assert np.isfinite(back.astype(np.float16)).all()
    assert scales[0] == 0 and scales[1] > 0
    assert values.min() == -127
    tiny = tokens[1:4]  # there a value is what float16 makes of it
    np.testing.assert_array_equal(smaller_tokens.dequantised(values[1:4], scales[1:4]), tiny.astype(np.float16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65_520.0, 1e30])
def test_a_frame_whose_tokens_cannot_be_read_back_fails(bad):
    patches = torch.ones((3, *GRID, WIDTH))
    patches[1, 2, 3, 4] = bad
    for settings in ({"store": "int8"}, {"store": "int8", "patch_pool": 2}):
        rows = smaller_tokens.stage(spec_of(**settings))({"patch_tokens": patches})
        one_in_four = settings.get("patch_pool") == 2 and bad == 65_520.0  # its mean with three ones is no such value
        assert rows["finite"].tolist() == [True, one_in_four, True]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_means_and_scales_are_of_float32_whatever_the_model_computes_in(kind):
    patches = torch.from_numpy(computed(1, 1))[None].to(kind)
    rows = smaller_tokens.stage(spec_of(**POOLED))({"patch_tokens": patches})
    expected = [quantised(token) for token in pooled(patches[0].float().numpy(), 2).reshape(-1, WIDTH)]
    np.testing.assert_array_equal(rows["patch_tokens"].reshape(-1, WIDTH), np.array([values for values, _ in expected]))
    np.testing.assert_array_equal(rows["patch_tokens_scale"].flatten(), np.array([scale for _, scale in expected]))


# ----------------------------------------------------------------------------------------------------------------------
# A cache, and what is done with it
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [({}, 1, 1), ({"store": "int8"}, 0.5, 0.55), ({"patch_pool": 2}, 0.25, 0.25), (POOLED, 0.125, 0.14)],
    ids=["as computed", "int8", "pooled", "both"],
)
def test_chunks_hold_what_the_rule_says(run, cache, settings, least, most):
    """Of a width of 24 a scale takes a twelfth of its token; of 384, and more, it is nothing."""
    assert run(**settings).code == 0
    spec, sizes, full = spec_of(**settings), 0, 0
    for path in chunk_files(cache):
        attributes, rows = sealed(path), read_chunk(path)[1]
        expected = expected_rows(int(attributes["trajectory"][1]), rows["frame_index"], spec)
        assert {name for name in rows if name.startswith("patch")} == expected.keys()
        for name, values in expected.items():
            assert rows[name].dtype == values.dtype
            np.testing.assert_array_equal(rows[name], values)
        assert rows["cls_token"].dtype == np.float16
        sizes += sum(values.nbytes for values in expected.values())
        full += 2 * len(rows["yaw"]) * GRID[0] * GRID[1] * WIDTH
        kept = {"patch_pool", "store"} & json.loads(attributes["spec"]).keys()
        assert kept == settings.keys()  # at its default a setting is in no spec, and so in no fingerprint
        assert ("computed_tokens" in attributes) == (settings.get("store") == "int8" and has_sampled(attributes))
    assert least <= sizes / full <= most


def has_sampled(attributes: dict[str, Any]) -> bool:
    return any(number % 64 == 0 for number in range(attributes["start"], attributes["stop"]))


def test_wide_tokens_take_no_more_than_promised():
    shape = dino_cache.model_shape("small")

    def size(**settings: Any) -> int:
        spec = CacheSpec(dino_model_type="small", tokens=("patch",), **settings)
        shapes = token_shapes(spec, shape)
        return sum(int(np.prod(shapes[name])) * dino_cache.token_type(name, shapes).itemsize for name in shapes)

    assert size(store="int8") <= 0.51 * size()
    assert size(patch_pool=2) == 0.25 * size()
    assert size(patch_pool=2, store="int8") <= 0.13 * size()


def test_a_chunk_keeps_the_computed_values_of_one_token_of_each_64th_frame(run, cache, capsys):
    assert run(**POOLED).code == 0
    found = {}
    for path in chunk_files(cache):
        attributes = read_chunk(path)[0]
        sample = json.loads(attributes.get("computed_tokens", "{}")).get("patch_tokens", {"frames": [], "places": []})
        values = np.frombuffer(base64.b64decode(sample.get("values", "")), np.float16).reshape(-1, WIDTH)
        for frame, (row, column), token in zip(sample["frames"], sample["places"], values, strict=True):
            stamp = int(attributes["trajectory"][1])
            np.testing.assert_array_equal(token, pooled(computed(stamp, frame), 2)[row, column].astype(np.float16))
            found.setdefault((stamp, frame), set()).add((row, column))
    assert found.keys() == {(1, 0), (1, 64), (2, 0)}
    assert all(len(places) == 1 for places in found.values())  # the same one in both chunks that hold a frame
    assert found[1, 0] != found[1, 64]
    assert progress_utils.main(["verify", "--cache-dir", str(cache), "--deep"]) == 0
    told = re.search(r"cosine ([\d.]+) at the worst, ([\d.]+) at the median, of (\d+) sampled", capsys.readouterr().out)
    worst, middle, count = map(float, told.groups())
    assert 0.9995 < worst <= middle < 1 and count in (3, 4)
    assert progress_utils.main(["verify", "--cache-dir", str(cache), "--deep", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stored_cosine"].keys() == {"worst", "median", "tokens"}
    assert progress_utils.main(["verify", "--cache-dir", str(cache)]) == 0
    assert "cosine" not in capsys.readouterr().out  # that is for --deep
    shown = report_facts.CacheSample(progress_utils.load_or_refuse(cache), None)
    assert re.search("cosine 0.9999?", report._configuration(shown)["stored against computed tokens"])


def test_a_stored_token_that_is_not_the_computed_one_is_told(run, cache, monkeypatch, capsys):
    """Say that the tokens went to another's place: their digests agree."""
    write = dino_cache.ChunkWriter.write

    def swap(self: Any, first: int, tokens: dict[str, np.ndarray], camera: str | None = None) -> None:
        swapped = {name: tokens[name][:, ::-1] for name in ("patch_tokens", "patch_tokens_scale")}
        write(self, first, {**tokens, **swapped}, camera)

    monkeypatch.setattr(dino_cache.ChunkWriter, "write", swap)
    assert run(store="int8").code == 0
    assert progress_utils.main(["verify", "--cache-dir", str(cache), "--deep"]) == 0
    assert float(re.search(r"cosine (-?[\d.]+) at the worst", capsys.readouterr().out)[1]) < 0.9


def test_damage_is_found_and_the_record_made_anew(run, cache, capsys):
    assert run(**POOLED).code == 0
    before = read_progress(cache)
    assert progress_utils.main(["rebuild", "--cache-dir", str(cache), "--yes"]) == 0
    after = read_progress(cache)
    for key in ("trajectory_records", "trajectory_checksums", "specs", "processing_config"):
        assert after[key] == before[key]
    assert "0 trajectories, 0 frames" not in run(**POOLED).out
    path = chunk_files(cache)[0]
    with h5py.File(path) as chunk:
        place = chunk["patch_tokens_scale"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert progress_utils.main(["verify", "--cache-dir", str(cache), "--deep"]) == 1
    assert "the bytes of patch_tokens_scale do not match their digest" in capsys.readouterr().out


def test_exports_are_float16_and_vint_is_as_ever(run, cache, tmp_path):
    assert run(**POOLED).code == 0
    command = ["export", "--cache-dir", str(cache), "--to"]
    assert progress_utils.main([*command, "flat", "-o", str(tmp_path / "flat.h5")]) == 0
    with h5py.File(tmp_path / "flat.h5") as flat:
        assert "patch_tokens_scale" not in flat
        assert flat["patch_tokens"].dtype == np.float16
        numbers, episodes = flat["frame_index"][...], flat["ep_idx"][...]
        for stamp in (1, 2):
            rows = episodes == stamp - 1
            expected = undone(expected_rows(stamp, numbers[rows], spec_of(**POOLED)))
            np.testing.assert_array_equal(flat["patch_tokens"][...][rows], expected)
    parquet = pytest.importorskip("pyarrow.parquet")
    assert progress_utils.main([*command, "lerobot", "--fps", "5", "-o", str(tmp_path / "lerobot")]) == 0
    features = json.loads((tmp_path / "lerobot/meta/info.json").read_text())["features"]
    assert features["observation.patch_tokens"]["dtype"] == "float16"
    assert not any("scale" in name for name in features)
    rows = parquet.read_table(tmp_path / "lerobot/data", columns=["observation.patch_tokens"])
    with h5py.File(tmp_path / "flat.h5") as flat:
        np.testing.assert_array_equal(np.array(rows.column(0).to_pylist()), flat["patch_tokens"][...])
    assert progress_utils.main([*command, "vint", "-o", str(tmp_path / "vint")]) == 0
    assert torch.load(tmp_path / "vint" / "t2_00000.pt")["features"].shape == (9, WIDTH)


def test_columns_that_are_called_like_scales_are_none(tmp_path):
    names = ["extra/action", "extra/action_scale"]
    assert not any(smaller_tokens.has_scale(name, names) for name in names)
    batch = {name: torch.ones(2, 3, dtype=torch.int8) for name in names}
    assert smaller_tokens.restored(batch) == batch


@pytest.mark.parametrize("after", [30, 70])
def test_an_interrupted_trajectory_goes_on_to_the_same_bytes_and_attributes(run, cache, monkeypatch, after):
    assert run(batch_size=8, **POOLED).code == 0
    expected = cache_content(cache)
    shutil.rmtree(cache)
    encode, done = ComputingEncoder.encode, []

    def stop(self: ComputingEncoder, pixels: torch.Tensor) -> Any:
        done.append(len(pixels))
        if sum(done) >= after:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(ComputingEncoder, "encode", stop)
        assert run(batch_size=7, **POOLED).code == 143
    outcome = run(batch_size=5, **POOLED)
    assert outcome.code == 0
    check_same(cache_content(cache), expected)


def test_another_way_to_store_is_a_changed_configuration_and_no_mix_is_read_unasked(run, cache):
    assert run(store="int8").code == 0
    outcome = run()
    assert outcome.code == 2
    assert "store" in outcome.err
    make_trajectory(cache.parent / "t3", 12, stamp=3)
    assert run("--yes").code == 0  # t3 alone is float16
    with pytest.raises(RefusedError, match=r"store: (int8 or float16|float16 or int8)"):
        CacheWindows(cache, 4, tokens="patch")
    with pytest.raises(RefusedError, match=r" int8.* float16| float16.* int8"):
        CacheWindows(cache, 4, tokens="patch", allow_mixed=True)
    assert len(CacheWindows(cache, 4, allow_mixed=True)) > 0  # the CLS tokens are alike


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")
def test_ray_makes_the_same_bytes_and_attributes(run, cache, monkeypatch):
    assert run(**POOLED).code == 0
    expected = cache_content(cache)
    shutil.rmtree(cache)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent))))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    outcome = run(executor="ray", num_workers=1, cpus_per_worker=1, batch_size=5, **POOLED)
    assert outcome.code == 0, outcome.err
    check_same(cache_content(cache), expected)


@pytest.mark.parametrize("settings", [POOLED, {"store": "int8", "layers": [1, 11]}], ids=["both", "layers"])
def test_chunks_that_are_cut_anew_are_those_of_a_fresh_run(run, cache, settings):
    cut = {"max_chunk_distance_m": 5.0, "overlap_distance_m": 1.0}
    assert run(**settings, **cut).code == 0
    expected = cache_content(cache)
    shutil.rmtree(cache)
    assert run(**settings).code == 0
    outcome = run("--recut", **settings, **cut)
    assert outcome.code == 0, outcome.err
    check_same(cache_content(cache), expected)


def check_same(content: dict[str, Any], expected: dict[str, Any]) -> None:
    """Chunks are equal to the byte, and so are their attributes."""
    assert content.keys() == expected.keys()
    for name, (attributes, rows) in content.items():
        assert attributes == expected[name][0]
        assert rows.keys() == expected[name][1].keys()
        for key, values in rows.items():
            np.testing.assert_array_equal(values, expected[name][1][key])


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def check_windows(windows: CacheWindows, spec: CacheSpec, stamps: dict[str, int], prefix: str = "") -> None:
    """Every window's patch tokens are what the rule makes of its frames."""
    for sample in windows:
        stamp = stamps[windows.source(int(sample["index"])).trajectory]
        expected = undone(expected_rows(stamp, sample["frame_index"].numpy(), spec))
        np.testing.assert_array_equal(sample[f"{prefix}patch_tokens"].numpy(), expected)


@pytest.mark.parametrize("settings", [{"store": "int8"}, POOLED], ids=["int8", "both"])
def test_windows_are_float16_again_and_raw_on_request(run, cache, settings):
    assert run(**settings).code == 0
    spec, stamps = spec_of(**settings), {"t1": 1, "t2": 2}
    windows = CacheWindows(cache, 3, tokens=("cls", "patch"), frame_step=2, goal=(0.2, 0.8))
    assert windows[0]["patch_tokens"].dtype == torch.float16
    assert [key for key in windows[0] if "scale" in key] == []
    check_windows(windows, spec, stamps)
    raw = CacheWindows(cache, 3, tokens=("cls", "patch"), frame_step=2, goal=(0.2, 0.8), raw=True)
    loader = DataLoader(raw, batch_size=5, collate_fn=raw.collate, num_workers=1)
    place = 0
    for batch in loader:
        stored = {key: values for key, values in batch.items() if key.endswith(("patch_tokens", "_scale"))}
        assert {values.dtype for values in stored.values()} == {torch.int8, torch.float16}
        whole = CacheWindows.restored(batch)
        for number in range(len(batch["index"])):
            expected = windows[place]
            assert whole.keys() == expected.keys()
            assert all(whole[key][number].equal(values) for key, values in expected.items())
            place += 1
    assert place == len(windows)
    exact = CacheWindows(cache, 3, tokens=("patch",), dtype=torch.float32)[0]["patch_tokens"]
    rows = expected_rows(1, np.arange(3), spec)
    expected = rows["patch_tokens"].astype(np.float32) * rows["patch_tokens_scale"].astype(np.float32)[..., None]
    np.testing.assert_array_equal(exact.numpy(), expected)


def test_each_layers_patches_are_pooled_and_have_scales(run, cache, capsys):
    assert run(layers=[1, 11], **POOLED).code == 0
    windows = CacheWindows(cache, 3, tokens=("cls", "patch"))
    spec, stamps = spec_of(**POOLED), {"t1": 1, "t2": 2}
    for sample in windows:
        stamp, numbers = stamps[windows.source(int(sample["index"])).trajectory], sample["frame_index"].numpy()
        for layer in (1, 11):
            expected = undone(expected_rows(stamp, numbers, spec, layer))
            np.testing.assert_array_equal(sample[f"patch_tokens_l{layer:02d}"].numpy(), expected)
    assert not any("scale" in key for key in windows[0])
    with pytest.raises(RefusedError, match="raw gives tokens as they are stored; give it to restored"):
        CacheWindows(cache, 3, tokens="patch", raw=True, dtype=torch.float32)
    raw = CacheWindows(cache, 3, tokens="patch_tokens_l11", raw=True)[0]
    assert raw["patch_tokens_l11"].dtype == torch.int8 and raw["patch_tokens_l11_scale"].shape == (3, 2, 3)
    assert progress_utils.main(["verify", "--cache-dir", str(cache), "--deep"]) == 0
    assert re.search(r"median, of (6|8) sampled", capsys.readouterr().out)


def test_long_windows_are_de_quantised_block_by_block(monkeypatch):
    monkeypatch.setattr(smaller_tokens, "BLOCK_VALUES", 70)
    values = torch.randint(-127, 128, (3, 5, WIDTH), dtype=torch.int8)
    scales, out = torch.rand(3, 5).half(), torch.empty(3, 5, WIDTH, dtype=torch.float16)
    smaller_tokens.dequantise_into(values, scales, out, smaller_tokens.new_block(WIDTH))
    np.testing.assert_array_equal(out.numpy(), smaller_tokens.dequantised(values.numpy(), scales.numpy()))


def test_each_of_several_cameras_has_scales_of_its_own(tmp_path):
    cameras = {"front": 1, "left": 5}
    spec = spec_of(image_key={name: name for name in cameras}, **POOLED)
    label = ChunkLabel("robot", spec, FINGERPRINT, "0" * 16, token_shapes(spec, SHAPE))
    plan = plan_of("t", PosedRobot(1, straight_line(30), np.zeros(30)), spec)
    (tmp_path / "cache" / "t").mkdir(parents=True)
    writer, to_store = TrajectoryWriter(tmp_path / "cache" / "t", plan, label), smaller_tokens.stage(spec)
    for number in range(30):
        for camera, stamp in cameras.items():
            patches = torch.from_numpy(computed(stamp, number))[None]
            rows = to_store({"cls_token": patches.mean((1, 2)), "patch_tokens": patches})
            writer.write(np.array([number]), {name: values.numpy() for name, values in rows.items()}, camera)
    progress = Progress(tmp_path / "cache", "robot")
    progress.processing_config = progress.specs[FINGERPRINT] = spec.to_json()
    record = {"fingerprint": FINGERPRINT, "spans": [list(span) for span in plan.spans], "bytes": writer.chunk_bytes}
    progress.complete("t", CHECKSUM, {**record, "checksum_kind": "stat"})
    progress.save()
    attributes, rows = read_chunk(chunk_files(tmp_path / "cache")[0])
    assert rows["left/patch_tokens_scale"].dtype == np.float16
    assert json.loads(attributes["computed_tokens"]).keys() == {"front/patch_tokens", "left/patch_tokens"}
    windows = CacheWindows(tmp_path / "cache", 4, tokens="patch")
    for camera, stamp in cameras.items():
        check_windows(windows, spec, {"t": stamp}, f"{camera}/")
    assert progress_utils.main(["verify", "--cache-dir", str(tmp_path / "cache"), "--deep"]) == 0
    assert progress_utils.main(
        ["export", "--cache-dir", str(tmp_path / "cache"), "--to", "flat", "-o", str(tmp_path / "flat.h5")]
    ) == 0  # fmt: skip
    with h5py.File(tmp_path / "flat.h5") as flat:
        expected = undone(expected_rows(5, flat["frame_index"][...], spec))
        np.testing.assert_array_equal(flat["left.patch_tokens"][...], expected)


def test_tokens_of_another_type_are_never_converted_in_silence(tmp_path):
    spec = spec_of(store="int8")
    label = ChunkLabel("robot", spec, FINGERPRINT, "0" * 16, token_shapes(spec, SHAPE))
    writer = TrajectoryWriter(tmp_path, plan_of("t", PosedRobot(1, straight_line(9), np.zeros(9)), spec), label)
    shapes = token_shapes(spec, SHAPE)
    with pytest.raises(TypeError, match="patch_tokens of float16 came to a dataset of int8"):
        writer.write(np.arange(9), {name: np.ones((9, *shape), np.float16) for name, shape in shapes.items()})


def test_batches_are_pinned_on_request(run, cache, monkeypatch):
    assert run(store="int8").code == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RefusedError, match="pin_memory: torch sees no CUDA device"):
        CacheWindows(cache, 4, pin_memory=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    windows, empty, asked = CacheWindows(cache, 4, pin_memory=True), torch.empty, []

    def record(*arguments: Any, pin_memory: bool = False, **keywords: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*arguments, **keywords)

    monkeypatch.setattr(torch, "empty", record)
    windows[0]
    assert True in asked


def test_encode_images_gives_what_a_cache_of_the_same_settings_is_read_as(tmp_path):
    images._LOADED.clear()
    pictures = np.random.default_rng(1).integers(0, 256, (5, 60, 90, 3), dtype=np.uint8)
    settings = {"dino_model_type": "small", "weights": "random", "image_size": SIZE, "precision": "fp32"}
    settings |= {"tokens": ("cls", "patch"), **POOLED}
    spec = CacheSpec(**settings)
    features = encode_images(pictures, device="cpu", **settings)
    assert {name: (values.shape, values.dtype.str) for name, values in features.items()} == {
        "cls_token": ((5, 384), "<f2"),
        "patch_tokens": ((5, 2, 3, 384), "<f2"),
    }
    (encoder,) = images._LOADED.values()
    pixels = encoder.new_pixels(5)
    for row, picture in enumerate(pictures):
        pixels[row] = dino_cache.FrameDecoder(spec).fit(picture, "")
    rows = encoder.encode(pixels)().tokens
    np.testing.assert_allclose(features["patch_tokens"].astype(float), undone(rows).astype(float), atol=0.05)
    np.testing.assert_array_equal(encode_images([], device="cpu", **settings)["patch_tokens"].shape, (0, 2, 3, 384))


# ----------------------------------------------------------------------------------------------------------------------
# Before the work
# ----------------------------------------------------------------------------------------------------------------------


def test_a_dry_run_compares_what_they_take(run):
    outcome = run("--dry-run", store="int8")
    line = next(line for line in outcome.out.splitlines() if line.startswith("  by patch_pool and store: "))
    assert re.fullmatch(r"  by patch_pool and store: 1 float16 .+, 1 int8 .+ \(chosen\), 2 float16 .+, 2 int8 .+", line)
    assert "by patch_pool" not in run("--dry-run", tokens=["cls"]).out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_pool": 4}, r"patch_pool: 4: .* 4 x 6 patches .*\[56, 56\] or \[56, 112\], or patch_pool: 1"),
        ({"patch_pool": 2, "image_size": [28, 70]}, r"set image_size to \[28, 56\] or \[28, 84\]"),
        ({"store": "int8", "tokens": ["cls"]}, "store: int8 is of patch tokens, and tokens: cls has none"),
        ({"patch_pool": 2, "tokens": ["cls"]}, "patch_pool: 2 is of patch tokens"),
        ({"patch_pool": 0}, "patch_pool"),
        ({"store": "int4"}, "store"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_any_work(run, cache, settings, message):
    outcome = run(**settings)
    assert outcome.code == 2
    assert re.search(message, outcome.err)
    assert not chunk_files(cache)


def test_without_the_module_the_run_says_what_is_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "dino_cache_extras.smaller_tokens", None)
    outcome = run(store="int8")
    assert outcome.code == 2
    assert "dino_cache_extras" in outcome.err


# ----------------------------------------------------------------------------------------------------------------------
# What is lost
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real recordings are not in {REAL}")
def test_int8_tokens_of_real_frames_point_where_the_computed_ones_do():
    """Random weights, as no trained ones could be had here: of the whole model, against its own float32 tokens."""
    paths = [folder / f"{number}.jpg" for folder in sorted(REAL.glob("*/*_*")) for number in (3, 40)]
    spec = CacheSpec(dino_model_type="small", weights="random", image_size=(112, 140), tokens=("patch",), store="int8")
    decoder, model = dino_cache.FrameDecoder(spec), dino_cache.build_model(spec).eval()
    dino_cache.set_input_size(model, spec.image_size, "cpu")
    frames = torch.stack([decoder(dino_cache.read_file(path), path.name) for path in paths]).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.pixel_mean, spec.pixel_std))
    with torch.inference_mode():
        tokens = model.forward_features((frames - mean) / std)[:, 1:].unflatten(1, (8, 10))
    means = (tokens[:, ::2, ::2] + tokens[:, ::2, 1::2] + tokens[:, 1::2, ::2] + tokens[:, 1::2, 1::2]) / 4
    for pool, exact in ((1, tokens), (2, means)):
        rows = smaller_tokens.stage(spec.model_copy(update={"patch_pool": pool}))({"patch_tokens": tokens})
        stored = torch.from_numpy(undone({name: values.numpy() for name, values in rows.items()}))
        cosines = torch.nn.functional.cosine_similarity(exact.double(), stored.double(), dim=-1)
        assert cosines.numel() == len(paths) * 80 // pool**2
        assert cosines.min() >= 0.9995
        assert cosines.median() >= 0.9999
