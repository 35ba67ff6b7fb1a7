"""dino_model_type: timm:<name>, any image model of timm that has forward_intermediates, and short names for a few.

What a model is, timm says: its patches, prefix tokens, own pixel mean and standard deviation and how it takes other
input sizes. Where its makers' rule is another than timm's, it has a row in OFFICIAL_RULES. A model is looked at on
torch's meta device, where building and running one takes neither memory nor arithmetic.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import yaml

from dino_cache import (
    HUB_MODULE,
    IMAGENET,
    LOG,
    MODEL_NAMES,
    CacheSpec,
    Encoder,
    ModelParts,
    ModelShape,
    one_line,
    set_input_size,
    token_layers,
    token_shapes,
)
from progress_utils import RefusedError, open_door

if TYPE_CHECKING:
    import torch

Found = TypeVar("Found")

PREFIX = "timm:"
MODEL_NAME = re.compile(r"[\w.-]+")
SIGLIP_PIXELS = {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.5, 0.5, 0.5)}
CLIP_PIXELS = {
    "pixel_mean": (0.48145466, 0.4578275, 0.40821073),
    "pixel_std": (0.26862954, 0.26130258, 0.27577711),
}


class ShortName(NamedTuple):
    """What timm calls a model, and its pixel mean and deviation, so that a night with nothing to do needs no timm."""

    timm_name: str
    pixels: dict[str, tuple[float, float, float]]


SHORT_NAMES = {
    "siglip2_base": ShortName("vit_base_patch16_siglip_224.v2_webli", SIGLIP_PIXELS),
    "siglip2_so400m": ShortName("vit_so400m_patch14_siglip_224.v2_webli", SIGLIP_PIXELS),
    "radio_v4_h": ShortName("vit_huge_patch16_radio_v4.c_radio", CLIP_PIXELS),
    "pe_spatial_base": ShortName("vit_pe_spatial_base_patch16_512.fb", SIGLIP_PIXELS),
    "mae_base": ShortName("vit_base_patch16_224.mae", IMAGENET),
    "clip_base": ShortName("vit_base_patch16_clip_quickgelu_224.openai", CLIP_PIXELS),  # OpenAI's own activation
}
OFFICIAL_RULES: tuple[tuple[str, Callable[..., tuple[int, int]]], ...] = (  # of a timm name -> how its input is settled
    (r"vit_\w+_patch14(_reg4)?_dinov2\..*", set_input_size),
    (r"vit_\w+_patch16_dinov3(_qkvb)?\.(lvd1689m|sat493m)", set_input_size),
)
WITHOUT_NORM = ("Hiera", "HieraDet")  # classes that refuse to give features after a final norm, which their heads have


# ----------------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------------


def checked_name(name: str) -> str:
    """The dino_model_type that a name means: a short one, where the model has one, so that it makes one cache.

    Raises:
        ValueError: it is no name of a model. Whether timm has it is known later, without which nothing is loaded.
    """
    of_timm = name.removeprefix(PREFIX)
    if name in SHORT_NAMES:
        return name
    if of_timm == name or not MODEL_NAME.fullmatch(of_timm):
        known = ", ".join((*MODEL_NAMES, *SHORT_NAMES))
        raise ValueError(f"should be one of {known}, or timm:<name> of a model of timm")
    short = {**MODEL_NAMES, **{short: row.timm_name for short, row in SHORT_NAMES.items()}}
    return next((ours for ours, theirs in short.items() if theirs == of_timm), name)


def timm_name(model_type: str) -> str:
    """What timm calls a model."""
    return SHORT_NAMES[model_type].timm_name if model_type in SHORT_NAMES else model_type.removeprefix(PREFIX)


def is_known(name: str) -> bool:
    """Whether the timm that is installed has a model of this name; one with a tag, with that tag."""
    import timm

    tags = timm.list_pretrained() if "." in name else ()
    return timm.is_model(name) and ("." not in name or name in tags)


def check_known(model_type: str) -> None:
    """Raise RefusedError unless the timm that is installed has the model."""
    import timm

    name = timm_name(model_type)
    if is_known(name):
        return
    near = difflib.get_close_matches(name, [*timm.list_pretrained(), *timm.list_models()], n=3)
    hint = f"did you mean {' or '.join(PREFIX + found for found in near)}?" if near and model_type != name else ""
    if model_type in SHORT_NAMES:
        hint = "update it: pip install -U timm"
    raise RefusedError(
        f"dino_model_type: {model_type}: timm {timm.__version__}, which is installed, has no model {name}"
        f"{'; ' * bool(hint)}{hint}"
    )


def own_config(model_type: str) -> Any:
    """timm's configuration of a model's weights; None where it has none."""
    import timm

    return timm.get_pretrained_cfg(timm_name(model_type)) if is_known(timm_name(model_type)) else None


def pixels(model_type: str) -> dict[str, tuple[float, float, float]]:
    """A model's own pixel_mean and pixel_std; of one that timm does not have, and is refused later, ImageNet's."""
    if model_type in SHORT_NAMES:
        return SHORT_NAMES[model_type].pixels
    config = own_config(model_type)
    if config is None:
        return IMAGENET
    return {"pixel_mean": tuple(map(float, config.mean)), "pixel_std": tuple(map(float, config.std))}


# ----------------------------------------------------------------------------------------------------------------------
# Shapes
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def empty_model(model_type: str) -> torch.nn.Module:
    """A model on the meta device, to be copied before it is changed.

    Raises:
        RefusedError: timm does not have it, or gives none of its features.
    """
    import timm
    import torch

    check_known(model_type)
    name = timm_name(model_type)
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, NotImplementedError):  # of older timm, which computes with numbers of some models
        model = timm.create_model(name, pretrained=False, num_classes=0).to("meta")
    if not hasattr(model, "forward_intermediates"):
        raise RefusedError(f"dino_model_type: {model_type}: timm gives no features of it (no forward_intermediates)")
    return model.eval()


def own_size(model: torch.nn.Module) -> tuple[int, int]:
    """Height and width [px] that a model is made for."""
    return tuple(model.pretrained_cfg["input_size"][1:])


def look_at(model_type: str, look: Callable[[torch.nn.Module, str], Found]) -> Found:
    """What look(model, device) finds of a model; of a real one on the CPU, where the meta device cannot do it."""
    import timm
    import torch

    model = copy.deepcopy(empty_model(model_type))
    try:
        with torch.device("meta"), torch.no_grad():
            return look(model, "meta")
    except Exception as error:  # of models of any kind they come in many classes
        if "meta" not in str(error) and not isinstance(error, NotImplementedError):
            raise
    with torch.no_grad():
        return look(timm.create_model(timm_name(model_type), pretrained=False, num_classes=0).eval(), "cpu")


def num_tokens(model: torch.nn.Module, spec: CacheSpec, device: str) -> int:
    """Tokens that a model gives of a frame."""
    import torch

    return token_layers(model, spec)(torch.zeros((1, 3, *spec.image_size), device=device)).shape[1]


def model_shape(model_type: str) -> ModelShape:
    """As dino_cache.model_shape."""
    return seen(model_type)[0]


def model_parts(model_type: str) -> ModelParts:
    """As dino_cache.model_parts."""
    return seen(model_type)[1]


@functools.cache
def seen(model_type: str) -> tuple[ModelShape, ModelParts]:
    """What a model's tokens look like, as it gives them at its own size.

    Raises:
        RefusedError: timm does not have it, or its features are no map over the image.
    """
    import torch

    model = empty_model(model_type)
    height, width = own_size(model)
    spec = CacheSpec(dino_model_type=model_type, image_size=(height, width), **IMAGENET)

    def look(model: torch.nn.Module, device: str) -> tuple[torch.Size, int]:
        frame = torch.zeros((1, 3, height, width), device=device)
        how = {"indices": 1, "output_fmt": "NCHW", "intermediates_only": True, **end_of(model)}
        features = model.forward_intermediates(frame, **how)
        return features[-1].shape, num_tokens(model, spec, device)

    try:
        (_, depth, rows, columns), count = look_at(model_type, look)
    except Exception as error:  # as in look_at, all of them before work
        raise RefusedError(
            f"dino_model_type: {model_type}: timm gives no map of its features: {one_line(error)[:300]}"
        ) from error
    if height % rows or width % columns or height // rows != width // columns:
        raise RefusedError(
            f"dino_model_type: {model_type}: its {rows} x {columns} patches are not square parts of its "
            f"{height} x {width} px"
        )
    num_prefix = count - rows * columns
    has_class_token = num_prefix > 0 and getattr(model, "cls_token", None) is not None
    has_registers = getattr(model, "dist_token", None) is None  # a distillation token is none
    num_registers = (num_prefix - has_class_token) * has_registers
    shape = ModelShape(patch_size=height // rows, width=depth, num_registers=num_registers)
    blocks = [(block["num_chs"], block["reduction"]) for block in model.feature_info]
    return shape, ModelParts(has_class_token, num_layers=len(blocks) if len(set(blocks)) == 1 else 0)


def check_input(spec: CacheSpec, shape: ModelShape) -> None:
    """Raise RefusedError unless the model takes frames of the spec's image_size, and gives a token for each patch."""
    model = empty_model(spec.dino_model_type)
    own, refusal = own_size(model), f"image_size: {list(spec.image_size)}: {spec.dino_model_type}"
    at_end = spec.model_copy(update={"layers": None, "layer_norm": True})

    def look(model: torch.nn.Module, device: str) -> int:
        before = num_tokens(model, at_end.model_copy(update={"image_size": own}), device)
        settle_input(model, spec, device)
        return num_tokens(model, at_end, device) - before

    try:
        more = look_at(spec.dino_model_type, look)
    except Exception as error:  # as in look_at
        is_fixed = model.pretrained_cfg.get("fixed_input_size") and not hasattr(model, "set_input_size")
        if is_fixed and not getattr(model, "dynamic_img_size", False):
            raise RefusedError(f"{refusal} takes only its own size, {list(own)}") from error
        raise RefusedError(
            f"{refusal} does not take this size: {one_line(error)[:300]}. Its own is {list(own)}"
        ) from error
    if more != num_patches(spec.image_size, shape) - num_patches(own, shape):
        raise RefusedError(f"{refusal} does not give one token a patch at this size. Its own is {list(own)}")


def num_patches(size: tuple[int, int], shape: ModelShape) -> int:
    """Of an image."""
    return (size[0] // shape.patch_size) * (size[1] // shape.patch_size)


# ----------------------------------------------------------------------------------------------------------------------
# Encoding
# ----------------------------------------------------------------------------------------------------------------------


def settle_input(model: torch.nn.Module, spec: CacheSpec, device: str) -> tuple[int, int]:
    """Settle the size of a model's input, by its makers' rule or timm's own; returns the patch grid (h, w)."""
    for names, rule in OFFICIAL_RULES:
        if re.fullmatch(names, timm_name(spec.dino_model_type)):
            return rule(model, spec.image_size, device)
    if spec.image_size != own_size(model) and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=spec.image_size)
    patch_size = model_shape(spec.dino_model_type).patch_size
    return spec.image_size[0] // patch_size, spec.image_size[1] // patch_size


def end_of(model: torch.nn.Module) -> dict[str, bool]:
    """Arguments of forward_intermediates with which its last features are what forward_features gives."""
    return {"norm": type(model).__name__ not in WITHOUT_NORM}


def check_output(encoder: Encoder, spec: CacheSpec) -> None:
    """Raise RefusedError unless an encoder gives tokens of the shapes that chunk files are made for."""
    tokens = encoder.encode(encoder.new_pixels(1).zero_())().tokens
    for name, shape in token_shapes(spec, model_shape(spec.dino_model_type)).items():
        if (found := tokens[name].shape[1:]) != shape:
            way = "leave out layers, or layer_norm: false" if spec.layers else "take another model"
            raise RefusedError(
                f"dino_model_type: {spec.dino_model_type}: gives {name} of shape {found}, and at the end of its blocks "
                f"of {shape}; {way}"
            )


def cast(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model on its device in a precision; rotary embeddings, by which queries and keys are turned, stay in fp32."""
    rotary = [module for module in model.modules() if type(module).__name__.startswith("RotaryEmbedding")]
    exact = [copy.deepcopy(module).to(device) for module in rotary]
    model = model.to(device, dtype)
    for module, kept in zip(rotary, exact):
        module.__dict__.update(kept.__dict__)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


def load_weight_file(path: Path, name: str) -> torch.nn.Module:
    """The model with the weights of a file, by timm's names or by those that timm knows to translate. A classifier's
    weights are left out.

    Raises:
        ValueError: a tensor is missing, or is none of the model's.
    """
    import timm

    weights = timm.models.load_state_dict(str(path), weights_only=True)  # which timm < 1.0.26 does not do unasked
    model = timm.create_model(name, pretrained=False, num_classes=0)
    translate = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if translate is not None:
        weights = translate(weights, model)
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    unexpected = [key for key in unexpected if not key.startswith(tuple(f"{name}." for name in classifiers))]
    if missing or unexpected:
        raise ValueError(f"tensors are missing: {missing[:5]}, or are not the model's: {unexpected[:5]}")
    return model


def repository(model_type: str) -> str:
    """Where the Hugging Face hub has timm's copy of the weights."""
    config = own_config(model_type)
    return getattr(config, "hf_hub_id", None) or f"timm/{timm_name(model_type)}"


@contextlib.contextmanager
def with_card(hub_id: str) -> Iterator[None]:
    """For loading weights: where they are downloaded, the hub's card comes along, for `licence`. What is in the hub's
    cache already asks the network for nothing more."""
    import huggingface_hub

    names = open_door(HUB_MODULE).WEIGHTS_FILES
    is_kept = any(isinstance(huggingface_hub.try_to_load_from_cache(hub_id, name), str) for name in names)
    yield
    if is_kept:
        return
    try:
        huggingface_hub.hf_hub_download(hub_id, "README.md")
    except Exception as error:  # of the network and the hub in many classes; the licence is then said to be unknown
        LOG.debug("No card of %s: %s", hub_id, error)


def licence(model_type: str) -> str:
    """The licence of a model's weights as the hub's card names it, where the card is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    hub_id = repository(model_type)
    address = f"https://huggingface.co/{hub_id}"
    card = try_to_load_from_cache(hub_id, "README.md")
    facts: Any = None
    if isinstance(card, str):
        front = Path(card).read_text(encoding="utf-8", errors="replace").split("---\n")
        try:
            facts = yaml.safe_load(front[1]) if len(front) > 2 else None
        except yaml.YAMLError:
            facts = None
    if isinstance(facts, dict) and facts.get("license"):
        name = facts.get("license_name") if facts["license"] == "other" else None
        return f"{name or facts['license']} ({facts.get('license_link') or address})"
    return f"unknown: read it at {address}"
