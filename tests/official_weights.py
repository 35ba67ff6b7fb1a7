"""Stand-ins for the official DINOv2 and DINOv3 weight files, and a second implementation to compare features with.

`official_state_dict` has the tensor names and shapes of the .pth files of facebookresearch/dinov2 and /dinov3, with
random values, so that loading such a file is tested without a download. `transformers_model` runs the same tensors in
Hugging Face transformers: other code, other names, no timm. `transformers_tokens` gives its normed tokens.

    weights = official_state_dict("small_reg")
    torch.save(weights, path)                           # or safetensors.torch.save_file(weights, path)
    expected = transformers_tokens(transformers_model(weights, "small_reg"), images)["patch"]

Where transformers gives what the official code gives (all that may differ is how the 37x37 position grid is resampled):
  register models   at every image size: both use size=(h, w), bicubic, antialias=True.
  plain models      at 518x518 alone, where nothing is resampled. Elsewhere the official code uses
                    scale_factor=((h + 0.1) / 37, (w + 0.1) / 37) and transformers size=(h, w); the features differ by
                    far more than rounding.
  DINOv3            at every image size, once transformers has the periods of the official file (in bfloat16), as
                    `transformers_model` gives it; its own are exact, and the features differ by up to 1e-2.

Axes: B images, D width, R registers, h w patch grid, N block.
"""

from dataclasses import dataclass

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Model types: the four sizes of DINOv2 as published, and two of DINOv3.
# ---------------------------------------------------------------------------------------------------------------------

PATCH_SIZE = 14  # px, of DINOv2
DINOV3_PATCH_SIZE = 16
NATIVE_GRID = 37  # 518 px / 14 px: the position grid of every published file
REGISTERS = 4
MLP_RATIO = 4


@dataclass(frozen=True)
class Architecture:
    """What a model type fixes; `hidden` is the inner width of the MLP, for SwiGLU that of one of its two halves."""

    width: int
    depth: int
    heads: int
    hidden: int
    swiglu: bool = False


ARCHITECTURES = {
    "small": Architecture(width=384, depth=12, heads=6, hidden=1536),
    "base": Architecture(width=768, depth=12, heads=12, hidden=3072),
    "large": Architecture(width=1024, depth=24, heads=16, hidden=4096),
    "giant": Architecture(width=1536, depth=40, heads=24, hidden=4096, swiglu=True),
    "dinov3_small": Architecture(width=384, depth=12, heads=6, hidden=1536),
    "dinov3_small_plus": Architecture(width=384, depth=12, heads=6, hidden=1536, swiglu=True),
}


def architecture(model_type: str) -> Architecture:
    return ARCHITECTURES[model_type.removesuffix("_reg")]


def is_dinov3(model_type: str) -> bool:
    return model_type.startswith("dinov3_")


def register_count(model_type: str) -> int:
    return REGISTERS if model_type.endswith("_reg") or is_dinov3(model_type) else 0


# ---------------------------------------------------------------------------------------------------------------------
# Official files: names, shapes and random values.
# ---------------------------------------------------------------------------------------------------------------------

WEIGHT_STD = 0.04
BIAS_STD = 0.02
POSITION_STD = 0.2  # large enough, beside patch embeddings of about 1, for a wrong resampling to show in every token


def official_state_dict(model_type: str, seed: int = 0, depth: int | None = None) -> dict[str, torch.Tensor]:
    """Random float32 tensors under the names, in the shapes and in the order of an official .pth file.

    `model_type` is a key of ARCHITECTURES, DINOv2's also with _reg; `depth` keeps only so many blocks. The same
    arguments give the same values. Every LayerScale gamma is 1: with timm's starting value of 1e-5 all CLS tokens
    would be equal whatever the image. In DINOv3's files the biases of queries, keys and values are 0 with their mask,
    and the periods of the rotary embedding bfloat16.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (dinov3_shapes if is_dinov3(model_type) else official_shapes)(model_type, depth)
    weights = {name: random_tensor(name, shape, generator) for name, shape in shapes.items()}
    if is_dinov3(model_type):
        weights |= {name: torch.zeros(shape) for name, shape in shapes.items() if ".qkv.bias" in name}
        exponents = torch.arange(16) / 16  # a quarter of a head's 64 channels
        weights["rope_embed.periods"] = (100**exponents).to(torch.bfloat16)
    return weights


def official_shapes(model_type: str, depth: int | None = None) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of the official file of `model_type`, cut to `depth` blocks."""
    arch = architecture(model_type)
    d, registers = arch.width, register_count(model_type)
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + NATIVE_GRID**2, d)}
    if registers:
        shapes["register_tokens"] = (1, registers, d)
    shapes["mask_token"] = (1, d)
    shapes |= with_bias("patch_embed.proj", (d, 3, PATCH_SIZE, PATCH_SIZE))
    for n in range(arch.depth if depth is None else depth):
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block_shapes(arch).items()}
    return shapes | with_bias("norm", (d,))


def dinov3_shapes(model_type: str, depth: int | None = None) -> dict[str, tuple[int, ...]]:
    """As official_shapes, of DINOv3: no position grid, storage tokens for registers, periods, masks of the qkv bias."""
    arch = architecture(model_type)
    d, hidden = arch.width, arch.hidden
    shapes = {"cls_token": (1, 1, d), "storage_tokens": (1, REGISTERS, d), "mask_token": (1, d)}
    shapes |= with_bias("patch_embed.proj", (d, 3, DINOV3_PATCH_SIZE, DINOV3_PATCH_SIZE))
    shapes["rope_embed.periods"] = (16,)
    for n in range(arch.depth if depth is None else depth):
        block = block_shapes(arch)
        if arch.swiglu:
            block = {name: shape for name, shape in block.items() if not name.startswith("mlp.")}
            block |= with_bias("mlp.w1", (hidden, d)) | with_bias("mlp.w2", (hidden, d))
            block |= with_bias("mlp.w3", (d, hidden))
        block["attn.qkv.bias_mask"] = (3 * d,)
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    return shapes | with_bias("norm", (d,))


def block_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape within one block."""
    d, hidden = arch.width, arch.hidden
    shapes = with_bias("norm1", (d,)) | with_bias("attn.qkv", (3 * d, d)) | with_bias("attn.proj", (d, d))
    shapes |= {"ls1.gamma": (d,)} | with_bias("norm2", (d,))
    if arch.swiglu:
        shapes |= with_bias("mlp.w12", (2 * hidden, d)) | with_bias("mlp.w3", (d, hidden))
    else:
        shapes |= with_bias("mlp.fc1", (hidden, d)) | with_bias("mlp.fc2", (d, hidden))
    return shapes | {"ls2.gamma": (d,)}


def with_bias(name: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values scaled like a trained network's; all but the gammas differ, so that mixing up two of them shows."""
    if name.endswith(".gamma"):
        return torch.ones(shape)
    values = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return values * BIAS_STD
    if "norm" in name:
        return 1 + values * 0.1
    return values * (POSITION_STD if name == "pos_embed" else WEIGHT_STD)


# ---------------------------------------------------------------------------------------------------------------------
# transformers: the same tensors in an implementation that shares no code with timm.
# ---------------------------------------------------------------------------------------------------------------------

# Official name -> transformers names. Where there are several, the official tensor is theirs, stacked along axis 0.
TRANSFORMERS_NAMES = {
    "cls_token": ["embeddings.cls_token"],
    "mask_token": ["embeddings.mask_token"],
    "pos_embed": ["embeddings.position_embeddings"],
    "register_tokens": ["embeddings.register_tokens"],
    "patch_embed.proj": ["embeddings.patch_embeddings.projection"],
    "norm": ["layernorm"],
}
TRANSFORMERS_BLOCK_NAMES = {
    "norm1": ["norm1"],
    "attn.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "attn.proj": ["attention.o_proj"],
    "ls1.gamma": ["layer_scale1.lambda1"],
    "norm2": ["norm2"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
    "mlp.w12": ["mlp.gate_proj", "mlp.up_proj"],  # silu goes on the first half
    "mlp.w3": ["mlp.down_proj"],
    "ls2.gamma": ["layer_scale2.lambda1"],
}


def transformers_model(state_dict: dict[str, torch.Tensor], model_type: str) -> torch.nn.Module:
    """Dinov2Model, or Dinov2WithRegistersModel for a _reg type, with copies of the official tensors; float32, eval.

    The number of blocks is that of `state_dict`. Attention is transformers' own, written out, not torch's fused one.
    Written for the tensor names of transformers 5.23; 4.x names those of the attention otherwise, and loading, which is
    strict, then raises RuntimeError.
    """
    # Imported here: making weight files must not need transformers, which takes seconds to import.
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    arch, registers = architecture(model_type), register_count(model_type)
    settings = {
        "hidden_size": arch.width,
        "num_hidden_layers": block_count(state_dict),
        "num_attention_heads": arch.heads,
        "mlp_ratio": MLP_RATIO,  # transformers derives the width of SwiGLU from it
        "use_swiglu_ffn": arch.swiglu,
        "image_size": NATIVE_GRID * PATCH_SIZE,
        "patch_size": PATCH_SIZE,
        "layer_norm_eps": 1e-6,
        "attn_implementation": "eager",
    }
    with torch.device("meta"):  # initial values would be thrown away, and drawing them moves torch's global generator
        if registers:
            model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **settings))
        else:
            model = Dinov2Model(Dinov2Config(**settings))
    model.load_state_dict(transformers_state_dict(state_dict), strict=True, assign=True)
    return model.eval()


def block_count(state_dict: dict[str, torch.Tensor]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))


def transformers_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official tensors, in float32, under transformers' names, stacked ones taken apart."""
    renamed = {}
    for official_name, tensor in state_dict.items():
        names = transformers_names(official_name)
        for name, part in zip(names, tensor.float().chunk(len(names)), strict=True):
            renamed[name] = part.clone()
    return renamed


def transformers_names(official_name: str) -> list[str]:
    """`blocks.3.attn.proj.bias` -> [`encoder.layer.3.attention.o_proj.bias`]; three names for the stacked qkv.

    Raises KeyError for a name that no official file has.
    """
    prefix, table, rest = "", TRANSFORMERS_NAMES, official_name
    if official_name.startswith("blocks."):
        _, n, rest = official_name.split(".", 2)
        prefix, table = f"encoder.layer.{n}.", TRANSFORMERS_BLOCK_NAMES
    return [prefix + name for name in names_in(table, rest)]


def names_in(table: dict[str, list[str]], name: str) -> list[str]:
    if name in table:  # a parameter without .weight and .bias
        return table[name]
    module, _, kind = name.rpartition(".")
    return [f"{other}.{kind}" for other in table[module or name]]


DINOV3_TRANSFORMERS_NAMES = {
    **TRANSFORMERS_NAMES,
    "storage_tokens": ["embeddings.register_tokens"],
    "patch_embed.proj": ["embeddings.patch_embeddings"],
    "norm": ["norm"],
}
DINOV3_TRANSFORMERS_BLOCK_NAMES = {
    **TRANSFORMERS_BLOCK_NAMES,
    "mlp.fc1": ["mlp.up_proj"],
    "mlp.fc2": ["mlp.down_proj"],
    "mlp.w1": ["mlp.gate_proj"],  # silu goes on this one
    "mlp.w2": ["mlp.up_proj"],
}


def transformers_dinov3_model(state_dict: dict[str, torch.Tensor], model_type: str) -> torch.nn.Module:
    """DINOv3ViTModel with copies of the official tensors, and their periods; float32, eval."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    arch = architecture(model_type)
    config = DINOv3ViTConfig(
        hidden_size=arch.width, num_hidden_layers=block_count(state_dict), num_attention_heads=arch.heads,
        intermediate_size=arch.hidden, use_gated_mlp=arch.swiglu, hidden_act="silu" if arch.swiglu else "gelu",
        num_register_tokens=REGISTERS, attn_implementation="eager",
    )  # fmt: skip
    model = DINOv3ViTModel(config)
    model.load_state_dict(transformers_dinov3_state_dict(state_dict), strict=True)
    model.rope_embeddings.inv_freq = 1 / state_dict["rope_embed.periods"].float()
    return model.eval()


def transformers_dinov3_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official tensors under transformers' names; keys have no bias there."""
    renamed = {}
    for official_name, tensor in state_dict.items():
        if official_name.endswith((".bias_mask", ".periods")):
            continue
        prefix, table, rest = "", DINOV3_TRANSFORMERS_NAMES, official_name
        if official_name.startswith("blocks."):
            _, n, rest = official_name.split(".", 2)
            prefix, table = f"model.layer.{n}.", DINOV3_TRANSFORMERS_BLOCK_NAMES
        names = [prefix + name for name in names_in(table, rest)]
        renamed |= zip(names, tensor.chunk(len(names)), strict=True)
    return {name: part.clone() for name, part in renamed.items() if not name.endswith("k_proj.bias")} | {
        "embeddings.mask_token": state_dict["mask_token"][None]
    }


@torch.inference_mode()
def transformers_tokens(model: torch.nn.Module, normalised_images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens after the final norm: cls (B, D), register (B, R, D) with R = 0 for a plain model, patch (B, h, w, D).

    `normalised_images` is (B, 3, H, W) float32, mean and std applied, H and W h and w times the patch size.
    """
    height, width = normalised_images.shape[-2:]
    patch_size = model.config.patch_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"images are {height}x{width}, expected multiples of {patch_size}")
    tokens = model(pixel_values=normalised_images).last_hidden_state  # (B, 1 + R + h * w, D)
    registers = getattr(model.config, "num_register_tokens", 0)
    patches = tokens[:, 1 + registers :].unflatten(1, (height // patch_size, width // patch_size))
    return {"cls": tokens[:, 0], "register": tokens[:, 1 : 1 + registers], "patch": patches}
