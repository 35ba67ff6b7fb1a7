"""dino_model_type: timm:<name> and `layers`, against timm's own forward and facebookresearch/dinov2's rule."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml

import dino_cache
from dino_cache import (
    MODEL_NAMES,
    CacheSpec,
    DinoEncoder,
    RefusedError,
    build_model,
    check_image_size,
    check_tokens,
    default_precision,
    load_config,
    load_encoder,
    model_parts,
    model_shape,
    token_layers,
    tokens_of,
    weights_digest,
)
from dino_cache_extras import timm_models
from dino_cache_extras.windows import CacheWindows
from official_weights import official_state_dict, transformers_model
from progress_utils import main as progress_main
from support import make_trajectory, read_chunk, run_cache, write_config

pytestmark = pytest.mark.usefixtures("one_torch_thread")

REAL = {"load_encoder": dino_cache.load_encoder, "model_shape": dino_cache.model_shape}  # run_here replaces them
TINY = "timm:vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """cut(depth=2): from here on timm makes models with these arguments."""
    create = timm.create_model

    def clear() -> None:
        for known in (REAL["model_shape"], timm_models.empty_model, timm_models.seen):
            known.cache_clear()

    def make(name: str = "", **how: Any) -> None:
        if name and not timm_models.is_known(name):
            pytest.skip(f"timm {timm.__version__} has no {name}")
        clear()
        monkeypatch.setattr(timm, "create_model", lambda *name, **given: create(*name, **{**given, **how}))

    yield make
    clear()


def spec_of(model_type: str, size: tuple[int, int], **settings: Any) -> CacheSpec:
    defaults = {"weights": "random", "tokens": ("patch",), "precision": "fp32"}
    return CacheSpec(dino_model_type=model_type, image_size=size, **{**defaults, **settings})


def frames(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    """(B, 3, H, W) uint8."""
    coarse = torch.rand((count, 3, 5, 7), generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(coarse, size, mode="bilinear") * 255).to(torch.uint8)


def normalised(pixels: torch.Tensor, config: Any) -> torch.Tensor:
    """By timm's configuration of a model."""
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    return (pixels - mean) / std


@torch.inference_mode()
def own_forward(model: torch.nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens of timm's forward_features, at the model's own size or by its own set_input_size."""
    size = tuple(pixels.shape[-2:])
    if size != tuple(model.pretrained_cfg["input_size"][1:]) and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    if "dinov3" in model.pretrained_cfg["architecture"]:
        model.rope.periods = model.rope.periods.bfloat16().float()  # as in the official files
    features = model.forward_features(normalised(pixels, model.pretrained_cfg))
    if features.ndim == 4:
        patches = features if getattr(model, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
        return {"patch_tokens": patches, "mean_token": patches.flatten(1, 2).mean(1)}
    num_prefix, patch = getattr(model, "num_prefix_tokens", 0), model.feature_info[-1]["reduction"]
    patches = features[:, num_prefix:]
    found = {
        "patch_tokens": patches.reshape(len(pixels), size[0] // patch, size[1] // patch, -1),
        "mean_token": patches.mean(1),
    }
    if num_prefix:
        found["cls_token"] = features[:, 0]
    if num_prefix > 1:
        found["register_tokens"] = features[:, 1:num_prefix]
    return found


CLS, REGISTERS = ["cls", "patch", "mean"], ["cls", "patch", "register", "mean"]
FAMILIES = [  # timm's name, what cuts it, its tokens, and the size nearest to 224x308
    ("vit_tiny_patch16_224.augreg_in21k", {"depth": 2}, CLS, (224, 304)),
    ("vit_small_patch14_dinov2.lvd142m", {"depth": 2}, CLS, None),
    ("vit_small_patch16_dinov3_qkvb.lvd1689m", {"depth": 2}, REGISTERS, (224, 304)),
    ("vit_base_patch16_siglip_224.v2_webli", {"depth": 1}, ["patch", "mean"], (224, 304)),
    ("vit_base_patch16_clip_quickgelu_224.openai", {"depth": 1}, CLS, (224, 304)),
    ("eva02_tiny_patch14_224.mim_in22k", {"depth": 2}, CLS, (224, 308)),
    ("vit_pe_spatial_tiny_patch16_512.fb", {"depth": 2}, CLS, (224, 304)),
    ("convnext_atto.d2_in1k", {"depths": (1, 1, 1, 1)}, ["patch", "mean"], (224, 320)),
    ("resnet18.a1_in1k", {"layers": (1, 1, 1, 1)}, ["patch", "mean"], (224, 320)),
]
FURTHER = [
    ("vit_base_patch16_224.mae", {"depth": 1}, CLS, (224, 304)),
    ("aimv2_large_patch14_224.apple_pt", {"depth": 1}, ["patch", "mean"], (224, 308)),
    ("vit_base_patch16_radio_v3.c_radio", {"depth": 1}, REGISTERS, (224, 304)),
    ("swin_tiny_patch4_window7_224.ms_in1k", {"depths": (2, 1, 1, 1)}, ["patch", "mean"], (224, 320)),
    ("mixer_b16_224.goog_in21k", {}, ["patch", "mean"], None),
    ("naflexvit_base_patch16_siglip.v2_webli", {"depth": 1}, ["patch", "mean"], (224, 304)),
    ("beit_base_patch16_224.in22k_ft_in22k", {"depth": 1}, CLS, (224, 304)),
    ("deit_tiny_distilled_patch16_224.fb_in1k", {"depth": 1}, CLS, (224, 304)),
]


def check_equal(model_type: str, tokens: list[str], size: tuple[int, int]) -> None:
    """Assert that what a cache would store has the bytes of timm's own forward in float16."""
    spec = spec_of(model_type, size, tokens=tokens)
    shape = model_shape(spec.dino_model_type)
    check_image_size(spec, shape)
    check_tokens(spec, shape)
    pixels, (encoder, _) = frames(size), load_encoder(spec, "cpu")
    expected = own_forward(build_model(spec).eval(), pixels)
    encoded = encoder.encode(pixels)()
    assert encoded.finite.all()
    shapes = dino_cache.token_shapes(spec, shape)
    assert encoded.tokens.keys() == shapes.keys()
    for name, stored in encoded.tokens.items():
        assert stored.shape[1:] == shapes[name]
        assert stored.tobytes() == expected[name].half().contiguous().numpy().tobytes(), name
        assert (stored[0] != stored[1]).any()


CASES = [*FAMILIES, *(pytest.param(*row, marks=pytest.mark.slow) for row in FURTHER)]


@pytest.mark.parametrize(("name", "how", "tokens", "nearest"), CASES, ids=[row[0] for row in FAMILIES + FURTHER])
def test_tokens_are_those_of_timms_own_forward(cut, name, how, tokens, nearest):
    cut(name, **how)
    model_type = f"timm:{name}"
    own = tuple(timm.get_pretrained_cfg(name).input_size[1:])
    check_equal(model_type, tokens, own)
    if nearest is not None:
        check_equal(model_type, tokens, nearest)
    ours = CacheSpec(dino_model_type=model_type).dino_model_type
    assert tokens_of(ours, model_shape(ours)) == tokens
    if nearest not in (None, (224, 308)):
        with pytest.raises(RefusedError, match=rf"image_size: \[224, 308\].*{re.escape(str(list(nearest)))}"):
            check_image_size(spec_of(model_type, (224, 308)), model_shape(ours))


def test_tokens_are_as_wide_as_a_model_whose_norm_is_a_neck_gives_them(cut):
    """SAM's blocks are 768 wide; what leaves its neck, which timm has as the final norm, 256."""
    cut("samvit_base_patch16.sa1b", depth=2)
    model_type = "timm:samvit_base_patch16.sa1b"
    check_equal(model_type, ["patch", "mean"], (64, 96))
    assert model_shape(model_type).width == 256
    with pytest.raises(RefusedError, match=r"gives patch_tokens_l00 of shape \(4, 6, 768\), and at the end"):
        load_encoder(spec_of(model_type, (64, 96), layers=(0,), layer_norm=False), "cpu")


def test_a_model_of_one_size_is_refused_at_others_and_its_size_named(cut):
    cut()
    spec = spec_of("timm:mixer_b16_224.goog_in21k", (224, 304))
    with pytest.raises(RefusedError, match=r"\[224, 304\]: timm:mixer_b16.* takes only its own size, \[224, 224\]"):
        check_image_size(spec, model_shape(spec.dino_model_type))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "tokens", "nearest"), CASES, ids=[row[0] for row in FAMILIES + FURTHER])
def test_bf16_features_are_close_to_fp32(cut, name, how, tokens, nearest):
    cut(name, **how)
    size = nearest or tuple(timm.get_pretrained_cfg(name).input_size[1:])
    found = {}
    for precision in ("fp32", "bf16"):
        encoder, _ = load_encoder(spec_of(f"timm:{name}", size, precision=precision), "cpu")
        found[precision] = encoder.encode(frames(size))().tokens["patch_tokens"].astype(np.float64)
    exact, near = found["fp32"], found["bf16"]
    cosine = (exact * near).sum(-1) / np.linalg.norm(exact, axis=-1) / np.linalg.norm(near, axis=-1)
    assert cosine.min() > 0.999
    assert (exact != near).any()


def test_rotary_embeddings_stay_in_fp32(cut):
    cut(depth=1)
    spec = spec_of("timm:eva02_tiny_patch14_224.mim_in22k", (28, 42), precision="bf16")
    model = build_model(spec).eval()
    DinoEncoder(model, spec, "cpu")
    assert model.blocks[0].mlp.fc2.weight.dtype == torch.bfloat16
    exact = build_model(spec).eval()
    exact.set_input_size(img_size=(28, 42))
    torch.testing.assert_close(model.rope.get_embed(), exact.rope.get_embed(), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Names, tokens and pixels
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", timm_models.SHORT_NAMES)
def test_a_short_name_is_a_model_of_timm_with_its_own_pixels(short):
    name = timm_models.SHORT_NAMES[short].timm_name
    if not timm_models.is_known(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    spec, config = CacheSpec(dino_model_type=short), timm.get_pretrained_cfg(name)
    assert (spec.pixel_mean, spec.pixel_std) == (config.mean, config.std)
    assert CacheSpec(dino_model_type=f"timm:{name}") == spec
    assert dino_cache.weights_source(spec)["source"] == f"hf-hub:timm/{name}"


def test_names_of_today_mean_what_they_meant_and_pixels_are_in_the_fingerprint():
    for short, name in MODEL_NAMES.items():
        assert CacheSpec(dino_model_type=f"timm:{name}") == CacheSpec(dino_model_type=short)
    own = CacheSpec(dino_model_type=TINY)  # whose mean is 0.5
    assert own.to_json()["pixel_mean"] == [0.5, 0.5, 0.5]
    imagenet = CacheSpec(dino_model_type=TINY, pixel_mean=(0.485, 0.456, 0.406))
    assert imagenet.pixel_mean == (0.485, 0.456, 0.406)
    assert imagenet.pixel_std == (0.5, 0.5, 0.5)
    assert own.fingerprint("w") != imagenet.fingerprint("w")
    assert CacheSpec(pixel_mean=None) == CacheSpec()
    assert dino_cache.recorded_spec(own.to_json()) == own


def test_the_copied_config_file_takes_the_models_own_pixels(tmp_path):
    text = (Path(dino_cache.__file__).parent / "config" / "data" / "dino_cache.yaml").read_text()
    path = tmp_path / "my.yaml"
    path.write_text(re.sub(r"(?m)^dino_model_type: large", "dino_model_type: siglip2_base", text))
    (config,) = load_config(path)
    assert config.spec.pixel_mean == (0.5, 0.5, 0.5)
    assert config.cache_dir.name == "dino_cache_siglip2_base"
    (config,) = load_config(path, {"dino_model_type": TINY})
    assert config.cache_dir.name == "dino_cache_timm_vit_tiny_patch16_224.augreg_in21k"


def test_default_tokens_of_a_model_without_class_token_are_refused_with_those_that_it_has(cut):
    cut(depth=1)
    spec = CacheSpec(dino_model_type="siglip2_base", image_size=(224, 224))
    with pytest.raises(
        RefusedError,
        match=r"tokens: \['cls'\]: dino_model_type siglip2_base gives no cls token; it gives patch, mean, ",
    ):
        check_tokens(spec, model_shape("siglip2_base"))


def test_a_model_that_timm_does_not_have_is_refused_with_near_names(monkeypatch):
    with pytest.raises(RefusedError, match=r"has no model resnet18\.a1_in1; did you mean timm:resnet18\.a1_in1k"):
        model_shape("timm:resnet18.a1_in1")
    older = [name for name in timm.list_pretrained() if "radio_v4" not in name]
    monkeypatch.setattr(timm, "list_pretrained", lambda *_: older)
    with pytest.raises(RefusedError, match=r"radio_v4_h: timm .* has no model .*; update it: pip install -U timm"):
        build_model(CacheSpec(dino_model_type="radio_v4_h", weights="random"))


def test_precision_on_cuda_is_bf16_but_for_dinov2():
    found = {name: default_precision("cuda", name) for name in ("large", "dinov3_base", "siglip2_base", TINY)}
    assert found == {"large": "fp16", "dinov3_base": "bf16", "siglip2_base": "bf16", TINY: "bf16"}


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


def test_a_file_with_a_classifier_is_loaded_and_one_that_lacks_a_tensor_refused(cut, tmp_path):
    cut(layers=(1, 1, 1, 1))
    model = build_model(spec_of("timm:resnet18.a1_in1k", (64, 64)))
    weights, path = model.state_dict(), tmp_path / "resnet.pth"
    torch.save({**weights, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, path)
    spec = spec_of("timm:resnet18.a1_in1k", (64, 64), weights=str(path))
    assert weights_digest(build_model(spec)) == weights_digest(model)
    for changed, fault in (
        ({key: value for key, value in weights.items() if key != "layer4.0.bn2.weight"}, r"missing: \['layer4\.0\.bn2"),
        ({**weights, "extra.weight": torch.zeros(3)}, r"not the model's: \['extra\.weight'\]"),
    ):
        torch.save(changed, path)
        with pytest.raises(RefusedError, match=rf"weights: {path}: cannot be loaded into resnet18.*{fault}"):
            build_model(spec)


CARD = "---\nlicense: {licence}\n{more}---\n# A card\n"


@pytest.mark.parametrize(
    ("licence", "more", "said"),
    [
        ("cc-by-nc-4.0", "", "cc-by-nc-4.0 (https://huggingface.co/timm/vit_base_patch16_224.mae)"),
        ("other", "license_name: some\nlicense_link: https://x.y\n", "some (https://x.y)"),
        (None, "", "unknown: read it at https://huggingface.co/timm/vit_base_patch16_224.mae"),
    ],
)
def test_the_licence_is_the_one_on_the_hubs_card(tmp_path, monkeypatch, licence, more, said):
    card = tmp_path / "README.md"
    card.write_text(CARD.format(licence=licence, more=more))
    found = str(card) if licence else None
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: found)
    assert timm_models.licence("mae_base") == said


@pytest.mark.parametrize("is_kept", [False, True])
def test_the_card_comes_along_with_weights_that_are_downloaded_and_only_then(monkeypatch, is_kept):
    asked: list[str] = []

    def create(name: str, *, pretrained: bool, **_: Any) -> torch.nn.Module:
        assert pretrained
        return torch.nn.Linear(1, 1)

    def download(repository: str, file: str) -> None:
        asked.append(f"{repository}/{file}")
        raise OSError("lost")

    monkeypatch.setattr(dino_cache, "HUB_MODULE", "dino_cache_extras.no_hub")
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/some/file" if is_kept else None)
    build_model(CacheSpec(dino_model_type="mae_base"))
    assert asked == ([] if is_kept else ["timm/vit_base_patch16_224.mae/README.md"])


# ----------------------------------------------------------------------------------------------------------------------
# Layers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_layers_are_those_of_timms_get_intermediate_layers(norm):
    size, model_type = (32, 48), TINY
    spec = spec_of(model_type, size, tokens=("cls", "patch", "mean"), layers=[11, 2], layer_norm=norm)
    pixels, (encoder, _) = frames(size), load_encoder(spec, "cpu")
    model = build_model(spec).eval()
    model.set_input_size(img_size=size)
    with torch.inference_mode():
        values = normalised(pixels, model.pretrained_cfg)
        found = model.get_intermediate_layers(values, [2, 11], return_prefix_tokens=True, norm=norm)
    tokens = encoder.encode(pixels)().tokens
    names = [
        "cls_token_l02",
        "cls_token_l11",
        "patch_tokens_l02",
        "patch_tokens_l11",
        "mean_token_l02",
        "mean_token_l11",
    ]
    assert [*tokens] == [*dino_cache.token_shapes(spec, model_shape(model_type))] == names
    for layer, (patches, prefix) in zip(("l02", "l11"), found):
        for name, expected in (("cls_token", prefix[:, 0]), ("mean_token", patches.mean(1)), ("patch_tokens", patches)):
            stored = tokens[f"{name}_{layer}"]
            assert stored.tobytes() == expected.half().contiguous().numpy().tobytes(), (name, layer)


@torch.inference_mode()
def official_layers(
    weights: dict[str, torch.Tensor], values: torch.Tensor, layers: list[int], *, norm: bool
) -> list[torch.Tensor]:
    """get_intermediate_layers of facebookresearch/dinov2: outputs of these blocks, through the final norm or not, each
    (B, 1 + R + h*w, D). The blocks are transformers', which shares no code with timm."""
    reference = transformers_model(weights, "small_reg")
    hidden = reference(pixel_values=values, output_hidden_states=True).hidden_states  # [0]: what the first block gets
    return [reference.layernorm(hidden[layer + 1]) if norm else hidden[layer + 1] for layer in layers]


@pytest.mark.parametrize("norm", [True, False])
def test_layers_are_those_of_facebooks_dinov2(tmp_path, norm):
    weights, size, path = official_state_dict("small_reg"), (28, 42), tmp_path / "small_reg.pth"
    torch.save(weights, path)
    tokens = ("cls", "patch", "register")
    spec = spec_of("small_reg", size, weights=str(path), tokens=tokens, layers=[0, 7, 11], layer_norm=norm)
    model, pixels = build_model(spec), frames(size)
    values = normalised(pixels, {"mean": spec.pixel_mean, "std": spec.pixel_std})
    expected = official_layers(weights, values, [0, 7, 11], norm=norm)
    encoder = DinoEncoder(model, spec, "cpu")
    with torch.inference_mode():
        ours = token_layers(model, spec)(values).unflatten(1, (3, -1))
    torch.testing.assert_close(ours, torch.stack(expected, 1), rtol=1e-4, atol=1e-4)
    stored = encoder.encode(pixels)().tokens
    for layer, found in zip((0, 7, 11), expected):
        parts = {"cls_token": found[:, 0], "register_tokens": found[:, 1:5], "patch_tokens": found[:, 5:]}
        for name, part in parts.items():
            here = stored[f"{name}_l{layer:02d}"].astype(np.float32).reshape(part.shape)
            np.testing.assert_allclose(here, part, rtol=2e-3, atol=2e-3)


def test_layers_of_dinov3_are_timms_with_the_official_periods():
    size = (32, 48)
    spec = spec_of("dinov3_small", size, tokens=("patch",), layers=[3, 11])
    pixels, model = frames(size), build_model(spec).eval()
    model.rope.periods = model.rope.periods.bfloat16().float()
    with torch.inference_mode():
        values = normalised(pixels, model.pretrained_cfg)
        found = model.forward_intermediates(values, [3, 11], norm=True, output_fmt="NLC", intermediates_only=True)
    stored = DinoEncoder(build_model(spec), spec, "cpu").encode(pixels)().tokens
    for name, patches in zip(("patch_tokens_l03", "patch_tokens_l11"), found):
        assert stored[name].tobytes() == patches.half().contiguous().numpy().tobytes()


def test_the_last_layer_is_what_comes_without_layers():
    size, model = (28, 42), build_model(spec_of("small", (28, 42)))
    plain, layered = spec_of("small", size), spec_of("small", size, layers=[11])
    found = [DinoEncoder(copy.deepcopy(model), spec, "cpu").encode(frames(size))().tokens for spec in (plain, layered)]
    np.testing.assert_array_equal(found[0]["patch_tokens"], found[1]["patch_tokens_l11"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_NAMES)
def test_the_number_of_layers_is_the_models(model_type):
    with torch.device("meta"):
        model = timm.create_model(MODEL_NAMES[model_type], num_classes=0)
    assert model_parts(model_type).num_layers == len(model.blocks)


def test_a_layer_that_a_model_does_not_have_is_refused(cut):
    check_tokens(spec_of("small", (28, 28), layers=[11]), model_shape("small"))
    with pytest.raises(RefusedError, match=r"layers: \[3, 12\]: dino_model_type small has 12, from 0 to 11"):
        check_tokens(spec_of("small", (28, 28), layers=[12, 3]), model_shape("small"))
    cut(layers=(1, 1, 1, 1))
    with pytest.raises(RefusedError, match=r"layers: \[3\]: those of .*resnet18.* differ in size"):
        check_tokens(spec_of("timm:resnet18.a1_in1k", (64, 64), layers=[3]), model_shape("timm:resnet18.a1_in1k"))


# ----------------------------------------------------------------------------------------------------------------------
# A cache of layers, from outside
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def layered(tmp_path, run_here, monkeypatch) -> tuple[Path, Path]:
    """A cache with two layers of a model of timm, and its config."""
    for name, real in REAL.items():
        monkeypatch.setattr(dino_cache, name, real)
    for stamp, name in enumerate(("a", "b")):
        make_trajectory(tmp_path / "data" / name, 9, stamp=stamp)
    weights = tmp_path / "tiny.pth"
    torch.save(build_model(spec_of(TINY, (32, 48))).state_dict(), weights)
    settings = {"dino_model_type": TINY, "image_size": [32, 48], "tokens": ["cls", "patch", "mean"], "layers": [11, 3]}
    settings["weights"] = str(weights)
    config = write_config(tmp_path / "config.yaml", tmp_path / "data", precision="fp32", **settings)
    outcome = run_here(config)
    assert outcome.code == 0, outcome.err
    assert "Licence of these weights: unknown: read it at https://huggingface.co/timm/vit_tiny" in outcome.out
    return tmp_path / "data" / "dino_cache_timm_vit_tiny_patch16_224.augreg_in21k", config


NAMES = ["cls_token_l03", "cls_token_l11", "patch_tokens_l03", "patch_tokens_l11", "mean_token_l03", "mean_token_l11"]


def test_a_cache_of_layers_is_verified_read_exported_reported_and_rebuilt(layered, run_here, tmp_path, capsys):
    cache, config = layered
    attributes, stored = read_chunk(next((cache / "a").glob("*.h5")))
    assert set(NAMES) == {name for name in stored if "token" in name}
    assert stored["patch_tokens_l03"].shape[1:] == (2, 3, 192)
    assert json.loads(attributes["spec"])["layers"] == [3, 11]
    where = ["--cache-dir", str(cache)]
    assert progress_main(["verify", *where, "--deep"]) == 0

    windows = CacheWindows(cache, 4, tokens=("cls", "patch_tokens_l11"))
    sample = windows[0]
    assert [key for key in sample if "token" in key] == ["cls_token_l03", "cls_token_l11", "patch_tokens_l11"]
    np.testing.assert_array_equal(sample["patch_tokens_l11"].numpy(), stored["patch_tokens_l11"][:4])
    assert sample["cls_token_l03"].dtype == torch.float16
    with pytest.raises(RefusedError, match=r"register is asked for, and this cache holds cls, patch, mean"):
        CacheWindows(cache, 4, tokens=("register",))
    for name in ("patch_tokens_l05", "patch_tokens"):
        there = "this cache holds patch_tokens_l03, patch_tokens_l11: name one of those, or patch, which is all of them"
        with pytest.raises(RefusedError, match=f"tokens: {name} is asked for, and {there}"):
            CacheWindows(cache, 4, tokens=(name,))

    out = tmp_path / "flat.h5"
    assert progress_main(["export", *where, "--to", "flat", "-o", str(out)]) == 0
    columns = columns_of(out)
    assert set(NAMES) <= set(columns)
    np.testing.assert_array_equal(columns["patch_tokens_l03"][:4], stored["patch_tokens_l03"][:4])
    capsys.readouterr()
    assert progress_main(["export", *where, "--to", "vint", "-o", str(tmp_path / "vint")]) == 2
    assert "has 2 class tokens a frame: cls_token_l03, cls_token_l11" in capsys.readouterr().err
    assert progress_main(["report", *where, "-o", str(tmp_path / "report.html")]) == 0

    (cache / "progress.json").unlink()
    assert progress_main(["rebuild", *where, "--yes"]) == 0
    outcome = run_here(config)
    assert outcome.code == 0
    assert "2 completed (+0)" in outcome.out


def columns_of(path: Path) -> dict[str, np.ndarray]:
    """The columns of a flat export."""
    with h5py.File(path) as file:
        return {name: file[name][...] for name in file}


def test_a_dry_run_names_the_licence_and_compares_tokens_of_all_layers(layered, run_here):
    _, config = layered
    outcome = run_here(config, "--dry-run", "--force-rebuild")
    assert outcome.code == 0, outcome.err
    assert "licence of the weights: unknown: read it at https://huggingface.co/timm/vit_tiny_patch16" in outcome.out
    other = run_here(config, "--dry-run", "--force-rebuild", "--set", "layers=[3]").out
    sizes = [int(re.search(r"bytes they take: (\d+)", text)[1]) for text in (outcome.out, other)]
    assert sizes[0] > 1.5 * sizes[1]


# ----------------------------------------------------------------------------------------------------------------------
# Other engines and executors
# ----------------------------------------------------------------------------------------------------------------------

OTHERS = [  # timm's name, what cuts it, layers, and what it has
    ("vit_tiny_patch16_224.augreg_in21k", {"depth": 2}, [0, 1], ("cls", "patch", "mean")),
    ("eva02_tiny_patch14_224.mim_in22k", {"depth": 2}, None, ("cls", "patch")),
    ("convnext_atto.d2_in1k", {"depths": (1, 1, 1, 1)}, None, ("patch", "mean")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "layers", "tokens"), OTHERS, ids=[row[0] for row in OTHERS])
def test_openvino_gives_torchs_features(cut, tmp_path, monkeypatch, name, how, layers, tokens):
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cut(**how)
    size = tuple(timm.get_pretrained_cfg(name).input_size[1:])
    found = {}
    for engine in ("torch", "openvino"):
        spec = spec_of(f"timm:{name}", size, tokens=tokens, layers=layers, engine=engine)
        found[engine] = load_encoder(spec, "cpu")[0].encode(frames(size))().tokens
    assert found["torch"].keys() == found["openvino"].keys()
    for key, values in found["torch"].items():
        np.testing.assert_allclose(found["openvino"][key], values, rtol=4e-3, atol=4e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "layers", "tokens"), OTHERS, ids=[row[0] for row in OTHERS])
def test_a_compiled_model_has_the_same_features(cut, monkeypatch, name, how, layers, tokens):
    """torch.compile as it traces, without its code generator, which needs a compiler."""
    cut(**how)
    compile_for_real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_for_real(function, backend="eager"))
    size = tuple(timm.get_pretrained_cfg(name).input_size[1:])
    spec = spec_of(f"timm:{name}", size, tokens=tokens, layers=layers)
    model = build_model(spec)
    compiled = DinoEncoder(copy.deepcopy(model), spec.model_copy(update={"compile": True}), "cpu")
    plain = DinoEncoder(model, spec, "cpu")
    for count in (2, 1):
        expected = plain.encode(frames(size, count))().tokens
        for key, values in compiled.encode(frames(size, count))().tokens.items():
            np.testing.assert_allclose(values, expected[key], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_ray_makes_the_same_cache_of_layers(layered, tmp_path):
    pytest.importorskip("ray")
    cache, config = layered
    settings = yaml.safe_load(config.read_text())
    settings |= {"executor": "ray", "num_workers": 1, "cpus_per_worker": 1}
    settings["datasets"]["robot"]["cache_dir"] = str(tmp_path / "by_ray")
    config.write_text(yaml.safe_dump(settings))
    done = run_cache(config, fake=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for path in sorted(cache.rglob("*.h5")):
        (_, here), (_, there) = read_chunk(path), read_chunk(tmp_path / "by_ray" / path.relative_to(cache))
        assert here.keys() == there.keys()
        for name, values in here.items():
            np.testing.assert_allclose(there[name], values, rtol=4e-3, atol=4e-3)


def test_a_cache_of_layers_is_cut_anew(layered, run_here):
    cache, config = layered
    _, before = read_chunk(next((cache / "a").glob("*.h5")))
    outcome = run_here(
        config, "--recut", "--yes", "--set", "max_chunk_distance_m=1.0", "--set", "overlap_distance_m=0.0"
    )
    assert outcome.code == 0, outcome.err
    paths = sorted((cache / "a").glob("*.h5"))
    assert len(paths) > 1
    for path in paths:
        _, after = read_chunk(path)
        for name in NAMES:
            np.testing.assert_array_equal(after[name], before[name][after["frame_index"]])
