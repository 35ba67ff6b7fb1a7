"""DinoEncoder against transformers, which shares no code with it, on official-format files of random weights."""

import copy
import http.server
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from dino_cache import (
    MODEL_NAMES,
    Batch,
    CacheSpec,
    DeviceError,
    DinoEncoder,
    EncodedBatch,
    ModelShape,
    ModelType,
    RefusedError,
    Rows,
    available_cores,
    build_model,
    check_image_size,
    encode_batches,
    model_shape,
    resample_position_grid,
    resolve_device,
    resolve_precision,
    token_shapes,
    weights_digest,
    weights_source,
)
from official_weights import (
    official_state_dict,
    transformers_dinov3_model,
    transformers_model,
    transformers_tokens,
)
from support import make_trajectory, run_cache, write_config

HALF = 2e-3  # relative error of float16 storage, 2 ** -11, on values of up to 4
TIGHT = 1e-4  # of float32 sums in another order
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Several threads wait for each other actively: on busy cores these tests take five times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model type -> official-format .pth; `small_reg` has a .safetensors beside it."""
    folder = tmp_path_factory.mktemp("weights")
    for model_type in ("small", "small_reg"):
        torch.save(official_state_dict(model_type), folder / f"{model_type}.pth")
    save_file(official_state_dict("small_reg"), folder / "small_reg.safetensors")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def references() -> dict[str, torch.nn.Module]:
    """Model type -> the same weights in transformers."""
    return {name: transformers_model(official_state_dict(name), name) for name in ("small", "small_reg")}


@pytest.fixture(scope="module")
def models(weights: dict[str, Path]) -> dict[str, torch.nn.Module]:
    """Model type -> the same weights as build_model loads them; an encoder is made from a copy, which it changes."""
    return {name: build_model(spec_of(name, weights[f"{name}.pth"])) for name in ("small", "small_reg")}


def spec_of(
    model_type: str, weights: Path | str = "random", size: tuple[int, int] = (28, 42), **settings: object
) -> CacheSpec:
    has_registers = model_type.endswith("_reg") or model_type.startswith("dinov3_")
    tokens = ("cls", "patch", "register") if has_registers else ("cls", "patch")
    defaults = {"dino_model_type": model_type, "weights": str(weights), "tokens": tokens, "precision": "fp32"}
    return CacheSpec(**{**defaults, "image_size": size, **settings})


def random_pixels(count: int, size: tuple[int, int]) -> torch.Tensor:
    """(B, 3, H, W) uint8, smooth enough that patches differ in more than noise."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((count, 3, 5, 7), generator=generator)
    return (torch.nn.functional.interpolate(coarse, size, mode="bilinear") * 255).to(torch.uint8)


def normalised(pixels: torch.Tensor, spec: CacheSpec) -> torch.Tensor:
    """ToTensor and Normalize, in numpy: (value / 255 - mean) / std, channel by channel."""
    values = pixels.numpy().astype(np.float64) / 255
    shape = (1, 3, 1, 1)
    values = (values - np.reshape(spec.pixel_mean, shape)) / np.reshape(spec.pixel_std, shape)
    return torch.from_numpy(values.astype(np.float32))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@torch.inference_mode()
def check_against(reference: torch.nn.Module, model: torch.nn.Module, spec: CacheSpec) -> None:
    """Assert that an encoder gives the reference's tokens: the stored ones to float16, the model's own tightly."""
    pixels, model = random_pixels(1, spec.image_size), copy.deepcopy(model)
    encoder = DinoEncoder(model, spec, "cpu")
    expected = transformers_tokens(reference, normalised(pixels, spec))
    encoded = encoder.encode(pixels)()
    names = {"cls": "cls_token", "patch": "patch_tokens", "register": "register_tokens"}
    assert encoded.tokens.keys() == {names[token] for token in spec.tokens}
    for token in spec.tokens:
        stored = encoded.tokens[names[token]]
        assert stored.dtype == np.float16
        assert stored.shape == tuple(expected[token].shape)
        np.testing.assert_allclose(stored, expected[token], rtol=HALF, atol=HALF)
    assert encoded.finite.tolist() == [True]
    features = model.forward_features(normalised(pixels, spec))  # cls, registers, patches
    flat = torch.cat([expected["cls"][:, None], expected["register"], expected["patch"].flatten(1, 2)], dim=1)
    assert (features - flat).abs().max() < TIGHT


# ----------------------------------------------------------------------------------------------------------------------
# Features
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 308), (112, 70), (14, 14)])
def test_register_model_gives_the_tokens_of_the_reference(models, references, size):
    check_against(references["small_reg"], models["small_reg"], spec_of("small_reg", size=size))


def test_plain_model_gives_the_tokens_of_the_reference_at_its_native_size(models, references):
    check_against(references["small"], models["small"], spec_of("small", size=(518, 518)))


def official_position(weights: dict[str, torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """(1, 1 + h*w, D) as DinoVisionTransformer.interpolate_pos_encoding makes it with interpolate_offset 0.1."""
    prefix, patches = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:]
    patches = patches.reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    factors = ((grid[0] + 0.1) / 37, (grid[1] + 0.1) / 37)
    patches = torch.nn.functional.interpolate(patches, scale_factor=factors, mode="bicubic", antialias=False)
    assert patches.shape[-2:] == grid
    return torch.cat([prefix, patches.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)], dim=1)


@pytest.mark.parametrize("size", [(224, 308), (112, 70), (14, 14)])
def test_plain_model_gives_the_tokens_of_the_reference_with_officially_resampled_positions(
    models, references, monkeypatch, size
):
    position = official_position(official_state_dict("small"), (size[0] // 14, size[1] // 14))
    reference = references["small"]
    monkeypatch.setattr(reference.embeddings, "interpolate_pos_encoding", lambda embeddings, height, width: position)
    check_against(reference, models["small"], spec_of("small", size=size))


@pytest.mark.parametrize("grid", [(16, 22), (22, 16), (1, 1), (36, 37), (38, 37), (39, 60)])
def test_positions_are_resampled_by_the_rule_of_each_kind_of_model(models, references, grid):
    plain = resample_position_grid(models["small"], grid)
    torch.testing.assert_close(plain, official_position(official_state_dict("small"), grid), rtol=0, atol=1e-6)
    with (
        torch.inference_mode()
    ):  # there the reference's rule is the official one; its first position is the CLS token's
        embeddings = torch.zeros(1, 1 + grid[0] * grid[1], 384)
        expected = references["small_reg"].embeddings.interpolate_pos_encoding(embeddings, grid[0] * 14, grid[1] * 14)
    torch.testing.assert_close(resample_position_grid(models["small_reg"], grid), expected[:, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("model_type", "prefix"), [("small", 1), ("small_reg", 0)])
def test_positions_of_the_native_grid_are_those_of_the_file(models, model_type, prefix):
    position = resample_position_grid(models[model_type], (37, 37))
    in_file = official_state_dict(model_type)["pos_embed"]
    torch.testing.assert_close(position[:, prefix:], in_file[:, 1:], rtol=0, atol=0)
    assert position.shape[1] == prefix + 37 * 37


def test_positions_are_resampled_before_the_weights_are_cast(models):
    model = copy.deepcopy(models["small"])
    DinoEncoder(model, spec_of("small", size=(224, 308), precision="bf16"), "cpu")
    expected = official_position(official_state_dict("small"), (16, 22)).to(torch.bfloat16)
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=0, check_dtype=True)


def test_pixel_mean_and_std_are_applied(models, references):
    settings = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.5, 0.25, 0.2)}
    check_against(references["small_reg"], models["small_reg"], spec_of("small_reg", **settings))


def test_patch_tokens_lie_row_by_row_as_in_the_image(models):
    encoder = DinoEncoder(copy.deepcopy(models["small"]), spec_of("small", size=(56, 84)), "cpu")
    places = [(0, 0), (0, 5), (3, 0), (3, 5), (1, 4)]
    pixels = random_pixels(1, (56, 84)).repeat(1 + len(places), 1, 1, 1)
    for image, (row, column) in zip(pixels[1:], places):
        image[:, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] ^= 0xFF
    tokens = encoder.encode(pixels)().tokens["patch_tokens"].astype(float)  # (6, 4, 6, D)
    moved = np.linalg.norm(tokens[1:] - tokens[0], axis=-1)
    assert [np.unravel_index(m.argmax(), m.shape) for m in moved] == places


@pytest.mark.parametrize(("model_type", "size"), [("small_reg", (112, 154)), ("dinov3_small", (112, 160))])
def test_bf16_features_are_close_to_fp32(models, dinov3_models, model_type, size):
    pixels, model = random_pixels(2, size), (models | dinov3_models)[model_type]
    tokens = {}
    for precision in ("fp32", "bf16"):
        spec = spec_of(model_type, size=size, precision=precision)
        tokens[precision] = DinoEncoder(copy.deepcopy(model), spec, "cpu").encode(pixels)().tokens
    for name, exact in tokens["fp32"].items():
        assert cosine(tokens["bf16"][name], exact).min() > 0.999
        assert (tokens["bf16"][name] != exact).any()


def test_batches_encoded_at_once_give_what_each_gives_alone(models):
    torch.set_num_threads(2)
    try:
        encoder = DinoEncoder(copy.deepcopy(models["small_reg"]), spec_of("small_reg"), "cpu")
    finally:
        torch.set_num_threads(1)
    assert encoder.default_batch_size == 8 * min(2, available_cores())
    batches = random_pixels(22, (28, 42)).split(3)  # the last is smaller
    alone = [encoder.encode(batch)() for batch in batches]
    for result, expected in zip([encoder.encode(batch) for batch in batches], alone, strict=True):
        encoded = result()
        assert encoded.finite.all()
        for name, tokens in expected.tokens.items():
            np.testing.assert_array_equal(encoded.tokens[name], tokens)


def parts_on_one_core(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, stop: Callable[[], bool], failing: int = -1
) -> tuple[Iterator[EncodedBatch], list[int]]:
    """Two batches of 16 on one core, 0.1 s a part; the rows of each part begun, the one that fails among them."""
    begun: list[int] = []
    forward = DinoEncoder._forward

    def slow(self: DinoEncoder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        begun.append(len(pixels))
        time.sleep(0.1)
        if len(begun) - 1 == failing:
            raise RuntimeError("broken")
        return forward(self, pixels)

    monkeypatch.setattr(DinoEncoder, "_forward", slow)
    encoder = DinoEncoder(copy.deepcopy(model), spec_of("small"), "cpu")
    batch = Batch([Rows(None, np.arange(16))], random_pixels(16, (28, 42)))
    return encode_batches(encoder, [batch, batch], lambda count: None, stop), begun


def test_a_batch_comes_out_in_the_parts_that_a_core_takes(models, monkeypatch):
    encoded, begun = parts_on_one_core(models["small"], monkeypatch, lambda: False)
    assert [int(row) for part in encoded for run in part.parts for row in run.rows] == 2 * list(range(16))
    assert begun == 8 * [4]


def test_a_stop_waits_for_what_a_core_is_at_and_drops_the_rest(models, monkeypatch):
    done: list[EncodedBatch] = []
    encoded, begun = parts_on_one_core(models["small"], monkeypatch, lambda: bool(done))
    done.extend(itertools.islice(encoded, 1))
    done.extend(encoded)
    assert [int(row) for part in done for run in part.parts for row in run.rows] == list(range(4 * len(begun)))
    assert len(begun) < 8


def test_nothing_is_begun_any_more_once_the_encoder_failed(models, monkeypatch):
    encoded, begun = parts_on_one_core(models["small"], monkeypatch, lambda: False, failing=1)
    with pytest.raises(DeviceError, match=r"the encoder failed: broken\. .* run the same command again"):
        list(encoded)
    time.sleep(0.3)
    assert len(begun) < 8


@NEEDS_CUDA
def test_cuda_gives_the_features_of_the_cpu_with_batches_in_flight(models):
    spec = spec_of("small_reg", size=(224, 308))
    pixels = random_pixels(6, spec.image_size)
    on_cpu = DinoEncoder(copy.deepcopy(models["small_reg"]), spec, "cpu").encode(pixels)().tokens
    half = spec.model_copy(update={"precision": "fp16"})
    encoder = DinoEncoder(copy.deepcopy(models["small_reg"]), half, "cuda")
    results = []
    for batch in pixels.split(2):
        buffer = encoder.new_pixels(2)
        buffer[:] = batch
        results.append(encoder.encode(buffer))
        del buffer  # its memory may be given out again at once
    for start, result in zip((0, 2, 4), results):
        for name, tokens in result().tokens.items():
            assert cosine(tokens, on_cpu[name][start : start + 2]).min() > 0.9999


@pytest.mark.parametrize("place", [0, 1, 4, 5, 10], ids=["cls", "register 0", "register 3", "patch 0", "patch 5"])
def test_one_value_that_is_not_finite_marks_its_row(models, place):
    def spoil(norm: torch.nn.Module, inputs: object, features: torch.Tensor) -> torch.Tensor:
        features = features.clone()
        features[1, place, 7] = float("nan")
        return features

    model = copy.deepcopy(models["small_reg"])
    model.norm.register_forward_hook(spoil)
    encoder = DinoEncoder(model, spec_of("small_reg"), "cpu")
    assert encoder.encode(random_pixels(3, (28, 42)))().finite.tolist() == [True, False, True]


def test_features_beyond_float16_are_not_finite(models):
    model = copy.deepcopy(models["small"])
    model.norm.weight.data[0] *= 1e6
    encoder = DinoEncoder(model, spec_of("small"), "cpu")
    assert encoder.encode(random_pixels(2, (28, 42)))().finite.tolist() == [False, False]


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


def test_pth_and_safetensors_of_the_same_weights_have_one_digest(weights, models):
    from_safetensors = build_model(spec_of("small_reg", weights["small_reg.safetensors"]))
    assert weights_digest(from_safetensors) == weights_digest(models["small_reg"])


def test_one_changed_weight_changes_the_digest(models):
    model = copy.deepcopy(models["small"])
    assert weights_digest(model) == weights_digest(models["small"])
    model.blocks[11].mlp.fc2.bias.data[7] += 1e-6
    assert weights_digest(model) != weights_digest(models["small"])


class MakesFolder:
    """Unpickled without care, makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickled globals", "a tensor too many", "truncated", "truncated safetensors", "html"])
def test_unusable_weight_file_is_refused_by_name(tmp_path, weights, kind):
    path = tmp_path / ("file.safetensors" if "safetensors" in kind else "file.pth")
    if kind == "pickled globals":
        torch.save({**official_state_dict("small"), "made_by": MakesFolder(tmp_path / "executed")}, path)
    elif kind == "a tensor too many":
        torch.save({**official_state_dict("small"), "head.weight": torch.zeros(3)}, path)
    elif kind == "html":
        path.write_bytes(b"<html>404</html>")
    else:
        source = weights["small_reg.safetensors" if "safetensors" in kind else "small_reg.pth"]
        path.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(RefusedError) as refused:
        build_model(spec_of("small_reg" if "truncated" in kind else "small", path))
    assert f"weights: {path}" in str(refused.value)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("model_type", "file"), [("small_reg", "small.pth"), ("small", "small_reg.pth"), ("base", "small.pth")]
)
def test_file_of_another_model_is_refused_by_name(weights, model_type, file):
    with pytest.raises(RefusedError) as refused:
        build_model(spec_of(model_type, weights[file]))
    assert str(weights[file]) in str(refused.value)
    assert f"dino_model_type {model_type}" in str(refused.value)


def test_missing_weight_file_is_refused_by_name(tmp_path):
    spec = spec_of("small", tmp_path / "nowhere.pth")
    for check in (build_model, weights_source):
        with pytest.raises(RefusedError, match=r"nowhere\.pth: No such file"):
            check(spec)


def test_weights_source_tells_a_file_by_path_size_and_time(weights):
    path = weights["small.pth"]
    expected = {"source": str(path), "size": os.path.getsize(path), "mtime": os.path.getmtime(path)}
    assert weights_source(spec_of("small", path)) == expected


def test_random_weights_are_the_same_every_time_and_leave_torchs_generator_alone():
    spec = spec_of("small")
    torch.manual_seed(5)
    first_drawn, digests = torch.rand(1), set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        digests.add(weights_digest(build_model(spec)))
    torch.manual_seed(5)
    build_model(spec)
    assert torch.rand(1) == first_drawn
    assert len(digests) == 1


def test_random_weights_tell_two_frames_apart():
    spec = spec_of("small")
    encoder = DinoEncoder(build_model(spec), spec, "cpu")
    first, second = encoder.encode(random_pixels(2, (28, 42)))().tokens["cls_token"].astype(float)
    assert np.abs(first - second).max() > 0.01


def hub_folder(home: Path) -> Path:
    """Where huggingface_hub keeps the files of `small`."""
    return home / "hub" / "models--timm--vit_small_patch14_dinov2.lvd142m"


@pytest.mark.slow
def test_pretrained_weights_that_cannot_be_had_offline_are_refused_with_three_ways_on(tmp_path):
    make_trajectory(tmp_path / "data" / "t1", 4)
    config = write_config(tmp_path / "config.yaml", tmp_path / "data", weights="pretrained")
    run = run_cache(config, fake=False, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert run.returncode == 2
    ways = ("go online once", "`weights: <its path>`", "`weights: random`")
    for part in ("model.safetensors", str(hub_folder(tmp_path)), *ways):
        assert part in run.stderr
    assert "Traceback" not in run.stderr
    cache = tmp_path / "data" / "dino_cache_small"
    assert not list(cache.rglob("*.h5"))
    assert not (cache / "progress.json").exists()


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file of `small` would lie if it had been downloaded; huggingface_hub is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = hub_folder(tmp_path) / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (hub_folder(tmp_path) / "refs").mkdir()
    (hub_folder(tmp_path) / "refs" / "main").write_text("0123abc")
    return snapshot / "model.safetensors"


def test_pretrained_weights_that_were_downloaded_once_are_used_offline(downloaded, models):
    save_file(models["small"].state_dict(), downloaded)
    assert weights_digest(build_model(spec_of("small", "pretrained"))) == weights_digest(models["small"])


def test_downloaded_file_that_is_broken_is_not_called_missing(downloaded, models):
    save_file(models["small"].state_dict(), downloaded)
    os.truncate(downloaded, 1_000_000)
    with pytest.raises(RefusedError) as refused:
        build_model(spec_of("small", "pretrained"))
    assert str(downloaded.parent.parent.parent) in str(refused.value)
    assert "neither in" not in str(refused.value)


@pytest.fixture
def closed_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[http.server.BaseHTTPRequestHandler]]:
    """A hub on this machine that answers every request with `status`, 401 or 403, as for a repository behind terms."""

    class Handler(http.server.BaseHTTPRequestHandler):
        status = 401

        def do_GET(self) -> None:
            self.send_response(self.status)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access is restricted")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield Handler
        server.shutdown()


@pytest.mark.parametrize("status", [401, 403])
def test_weights_behind_terms_are_refused_with_where_to_agree_to_them(closed_hub, status):
    closed_hub.status = status
    with pytest.raises(RefusedError) as refused:
        build_model(spec_of("dinov3_small", "pretrained"))
    page = "https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m"
    for part in ("Access is restricted", page, "`hf auth login`", "`weights: <its path>`", "`weights: random`"):
        assert part in str(refused.value)
    assert "go online" not in str(refused.value)


# ----------------------------------------------------------------------------------------------------------------------
# DINOv3
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov3_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """File name -> official-format .pth of a DINOv3."""
    folder = tmp_path_factory.mktemp("dinov3")
    for model_type in ("dinov3_small", "dinov3_small_plus"):
        torch.save(official_state_dict(model_type), folder / f"{model_type}.pth")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def dinov3_references() -> dict[str, torch.nn.Module]:
    """Model type -> the same weights in transformers."""
    types = ("dinov3_small", "dinov3_small_plus")
    return {name: transformers_dinov3_model(official_state_dict(name), name) for name in types}


@pytest.fixture(scope="module")
def dinov3_models(dinov3_weights: dict[str, Path]) -> dict[str, torch.nn.Module]:
    """Model type -> the same weights as build_model loads them."""
    types = ("dinov3_small", "dinov3_small_plus")
    return {name: build_model(spec_of(name, dinov3_weights[f"{name}.pth"])) for name in types}


@pytest.mark.parametrize(
    ("model_type", "size"),
    [
        ("dinov3_small", (224, 304)),
        ("dinov3_small", (64, 48)),
        ("dinov3_small", (16, 16)),
        ("dinov3_small_plus", (48, 112)),
    ],
)
def test_dinov3_gives_the_tokens_of_the_reference(dinov3_models, dinov3_references, model_type, size):
    check_against(dinov3_references[model_type], dinov3_models[model_type], spec_of(model_type, size=size))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dinov3_positions_are_the_official_ones_in_float32_whatever_the_precision(dinov3_models, precision):
    model = copy.deepcopy(dinov3_models["dinov3_small"])
    DinoEncoder(model, spec_of("dinov3_small", size=(48, 80), precision=precision), "cpu")
    periods = official_state_dict("dinov3_small")["rope_embed.periods"].double().numpy()
    rows, columns = np.meshgrid((np.arange(3) + 0.5) / 3, (np.arange(5) + 0.5) / 5, indexing="ij")
    places = 2 * np.stack([rows, columns], axis=-1).reshape(15, 2, 1) - 1  # row by row, in -1 ... 1
    angles = np.tile((2 * np.pi * places / periods).reshape(15, 32), 2)
    rotary = model.rope.get_embed(shape=(3, 5))
    assert rotary.dtype == torch.float32
    np.testing.assert_allclose(rotary, np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "model_type"),
    [
        ("official", "dinov3_small"),
        ("transformers", "dinov3_small"),
        ("transformers", "dinov3_small_plus"),
        ("timm", "dinov3_small_plus"),
    ],
)
def test_dinov3_files_of_the_same_weights_have_one_digest(
    tmp_path, dinov3_models, dinov3_references, layout, model_type
):
    path = tmp_path / "model.safetensors"
    if layout == "official":
        save_file(official_state_dict(model_type), path)
    elif layout == "transformers":
        pytest.importorskip("dino_cache_extras")
        dinov3_references[model_type].save_pretrained(tmp_path)  # as facebook's repositories on the hub
    else:
        save_file(dinov3_models[model_type].state_dict(), path)
    assert weights_digest(build_model(spec_of(model_type, path))) == weights_digest(dinov3_models[model_type])


def test_norms_of_local_crops_in_a_dinov3_file_are_left_out(tmp_path, dinov3_models):
    local = {f"local_cls_norm.{name}": torch.ones(384) for name in ("weight", "bias")}  # of the largest, and satellite
    torch.save({**official_state_dict("dinov3_small"), **local}, tmp_path / "file.pth")
    model = build_model(spec_of("dinov3_small", tmp_path / "file.pth"))
    assert weights_digest(model) == weights_digest(dinov3_models["dinov3_small"])


def test_masked_biases_in_a_dinov3_file_count_as_zero_and_others_are_refused(tmp_path, dinov3_models, capfd):
    weights, path = official_state_dict("dinov3_small"), tmp_path / "file.pth"
    weights["blocks.7.attn.qkv.bias"][3] = 0.5
    torch.save(weights, path)
    model = build_model(spec_of("dinov3_small", path))
    assert weights_digest(model) == weights_digest(dinov3_models["dinov3_small"])
    weights["blocks.7.attn.qkv.bias_mask"][:384] = 1
    torch.save(weights, path)
    with pytest.raises(RefusedError, match=r"file\.pth: .*blocks\.7\.attn\.qkv\.bias is not zero"):
        build_model(spec_of("dinov3_small", path))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("model_type", "file"),
    [("dinov3_small", "small.pth"), ("small_reg", "dinov3_small.pth"), ("dinov3_small", "dinov3_small_plus.pth")],
)
def test_file_of_another_family_or_model_is_refused_by_name(weights, dinov3_weights, model_type, file):
    path = (weights | dinov3_weights)[file]
    with pytest.raises(RefusedError) as refused:
        build_model(spec_of(model_type, path))
    family = "DINOv3" if model_type == "dinov3_small" else "DINOv2"
    for part in (f"weights: {path}", f"dino_model_type {model_type}", f"official {family} .pth"):
        assert part in str(refused.value)


def test_pickled_globals_in_a_dinov3_file_are_not_run(tmp_path):
    weights = {**official_state_dict("dinov3_small", depth=1), "made_by": MakesFolder(tmp_path / "executed")}
    torch.save(weights, tmp_path / "file.pth")
    with pytest.raises(RefusedError, match=r"file\.pth"):
        build_model(spec_of("dinov3_small", tmp_path / "file.pth"))
    assert not (tmp_path / "executed").exists()


def test_dinov3_with_random_weights_tells_two_frames_apart_and_stays_far_below_the_limit_of_float16():
    spec = spec_of("dinov3_small", size=(32, 48))
    rows = DinoEncoder(build_model(spec), spec, "cpu").encode(random_pixels(2, (32, 48)))()
    shapes = {"cls_token": (2, 384), "patch_tokens": (2, 2, 3, 384), "register_tokens": (2, 4, 384)}
    assert {name: tokens.shape for name, tokens in rows.tokens.items()} == shapes
    assert rows.finite.tolist() == [True, True]
    assert max(np.abs(tokens).max() for tokens in rows.tokens.values()) < 100
    first, second = rows.tokens["cls_token"].astype(float)
    assert np.abs(first - second).max() > 0.01


# ----------------------------------------------------------------------------------------------------------------------
# Shapes, device and precision
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "width"), [("small", 384), ("base", 768), ("large", 1024), ("giant", 1536)])
def test_model_shapes_are_those_of_the_published_models(size, width):
    assert model_shape(size) == (14, width, 0)
    assert model_shape(f"{size}_reg") == (14, width, 4)


@pytest.mark.parametrize(
    ("size", "width"),
    [("small", 384), ("small_plus", 384), ("base", 768), ("large", 1024), ("huge_plus", 1280), ("7b", 4096)],
)
def test_dinov3_shapes_are_those_of_the_published_models(size, width):
    assert model_shape(f"dinov3_{size}") == (16, width, 4)


@pytest.mark.parametrize("model_type", get_args(ModelType))
def test_register_tokens_are_allowed_exactly_where_the_model_has_registers(model_type):
    if model_shape(model_type).num_registers:
        assert CacheSpec(dino_model_type=model_type, tokens=("register",)).tokens == ("register",)
    else:
        with pytest.raises(ValueError, match="needs a model with registers"):
            CacheSpec(dino_model_type=model_type, tokens=("register",))


@pytest.mark.parametrize("model_type", get_args(ModelType))
def test_default_pixel_mean_and_std_are_those_the_model_was_trained_with(model_type):
    trained_with = timm.get_pretrained_cfg(MODEL_NAMES[model_type])
    spec = CacheSpec(dino_model_type=model_type)
    assert (spec.pixel_mean, spec.pixel_std) == (trained_with.mean, trained_with.std)


def test_default_image_size_does_not_fit_dinov3_and_the_error_offers_one_that_does():
    spec = CacheSpec(dino_model_type="dinov3_small")
    with pytest.raises(RefusedError, match=r"\[224, 308\].* 16 of dino_model_type dinov3_small.* is \[224, 304\]"):
        check_image_size(spec, model_shape("dinov3_small"))
    check_image_size(CacheSpec(dino_model_type="dinov3_small", image_size=(224, 304)), model_shape("dinov3_small"))


def test_token_shapes_follow_the_grid_and_the_tokens_asked_for():
    shape = ModelShape(patch_size=14, width=384, num_registers=4)
    expected = {"cls_token": (384,), "patch_tokens": (16, 22, 384), "register_tokens": (4, 384)}
    assert token_shapes(spec_of("small_reg", size=(224, 308)), shape) == expected
    assert token_shapes(spec_of("small_reg", tokens=("patch",)), shape) == {"patch_tokens": (2, 3, 384)}


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((224, 308), None),
        ((14, 14), None),
        ((223, 308), "[224, 308]"),
        ((224, 309), "[224, 308]"),
        ((1, 1), "[14, 14]"),
    ],
)
def test_image_size_must_be_a_multiple_of_the_patch_size(size, nearest):
    spec, shape = spec_of("small", size=size), ModelShape(14, 384, 0)
    if nearest is None:
        check_image_size(spec, shape)
        return
    with pytest.raises(RefusedError) as refused:
        check_image_size(spec, shape)
    assert str(list(size)) in str(refused.value)
    assert f"nearest is {nearest}" in str(refused.value)


@pytest.mark.parametrize(
    ("wanted", "recorded", "device", "expected"),
    [
        ("auto", None, "cuda", "fp16"),
        ("auto", None, "cuda:1", "fp16"),
        ("auto", "bf16", "cuda", "bf16"),
        ("auto", "fp32", "cpu", "fp32"),
        ("auto", "bf16", "cpu", "bf16"),
        ("auto", "fp16", "cuda:0", "fp16"),
        ("fp32", "bf16", "cpu", "fp32"),
        ("bf16", None, "cuda", "bf16"),
        ("fp16", None, "cuda", "fp16"),
    ],
)
def test_precision_is_the_one_wanted_and_auto_the_one_recorded(wanted, recorded, device, expected):
    assert resolve_precision(wanted, recorded, device, "base_reg") == expected


@pytest.mark.parametrize(
    ("wanted", "recorded", "device", "expected"),
    [
        ("auto", None, "cuda", "bf16"),
        ("auto", None, "cuda:1", "bf16"),
        ("auto", "fp16", "cuda", "fp16"),
        ("fp16", None, "cuda", "fp16"),
    ],
)
def test_auto_precision_of_dinov3_on_cuda_is_that_of_its_training(wanted, recorded, device, expected):
    assert resolve_precision(wanted, recorded, device, "dinov3_base") == expected


def test_auto_precision_of_a_new_cache_on_a_cpu_follows_its_instructions():
    with open("/proc/cpuinfo") as file:
        flags = file.read()
    for model_type in ("small", "dinov3_small"):
        expected = "bf16" if "avx512_bf16" in flags else "fp32"
        assert resolve_precision("auto", None, "cpu", model_type) == expected


@pytest.mark.parametrize(("wanted", "recorded", "source"), [("auto", "fp16", "recorded"), ("fp16", None, "config")])
def test_fp16_without_cuda_is_refused_with_the_way_on(wanted, recorded, source):
    with pytest.raises(RefusedError, match=rf"fp16 .*{source}.*needs CUDA.*bf16 or fp32"):
        resolve_precision(wanted, recorded, "cpu", "small")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_device_is_cuda_where_there_is_one_and_one_that_is_not_there_is_refused(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if count else "cpu")
    for device, needed in (("cuda", 1), ("cuda:0", 1), ("cuda:1", 2)):
        if count >= needed:
            assert resolve_device(device) == device
        else:
            with pytest.raises(RefusedError, match=f"device: {device}.*{count} CUDA"):
                resolve_device(device)
