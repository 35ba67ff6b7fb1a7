"""DINOv3's weights as transformers names them, brought to their official names."""

from __future__ import annotations

import re

import torch

# What transformers (facebook's repositories on the Hugging Face hub) names otherwise than facebookresearch/dinov3 does.
_DINOV3_NAMES_IN_TRANSFORMERS = {
    r"^embeddings\.patch_embeddings": "patch_embed.proj",
    r"^embeddings\.register_tokens": "storage_tokens",
    r"^embeddings\.": "",
    r"^(?:model\.)?layer\.": "blocks.",
    r"\.attention\.": ".attn.",
    r"\.o_proj\.": ".proj.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
}
_DINOV3_MLP = {r"\.up_proj\.": ".fc1.", r"\.down_proj\.": ".fc2."}
_DINOV3_GATED_MLP = {r"\.gate_proj\.": ".w1.", r"\.up_proj\.": ".w2.", r"\.down_proj\.": ".w3."}  # silu goes on w1


def official_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DINOv3's tensors of a file from transformers under their official names; query, key and value stacked."""
    is_gated = any(".gate_proj." in name for name in weights)
    table = _DINOV3_NAMES_IN_TRANSFORMERS | (_DINOV3_GATED_MLP if is_gated else _DINOV3_MLP)
    renamed = {_substitute(table, name): tensor for name, tensor in weights.items()}
    for name in [name for name in renamed if name.endswith(".q_proj.weight")]:
        parts = [renamed.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        renamed[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return renamed


def _substitute(table: dict[str, str], text: str) -> str:
    for pattern, replacement in table.items():
        text = re.sub(pattern, replacement, text)
    return text
